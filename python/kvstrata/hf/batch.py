"""The rows of one KVCache: sequences of its core, what was fed to them, and the step that is open over them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvstrata.cache import Cache, Sequence
from kvstrata.hf.facts import Facts
from kvstrata.hf.feed import Feed
from kvstrata.hf.intake import Intake
from kvstrata.hf.step import Forward, PadStep

_BROKEN = "this cache is broken: a forward failed after recurrent states had changed; call reset()"
_BUSY = "this cache has a step open in another thread: one cache serves one thread at a time"


class Batch(Intake):
    """facts: the layers. core: where they are stored. rows: one sequence per row, none before the first forward."""

    def __init__(self, facts: Facts, core: Cache) -> None:
        super().__init__(facts, Feed(core.set_recording))
        self.core = core
        self.rows: list[Sequence] = []

    @property
    def width(self) -> int:
        """Rows."""
        return len(self.rows)

    # -- one forward ----------------------------------------------------------------------------------------------

    def open(
        self, facts: Facts, modules: frozenset[int], mask: torch.Tensor | None, batch: int, length: int, positions: Any
    ) -> Forward:
        """Check the inputs, reserve the step's pages and open it. Nothing has changed when this raises.

        mask: [B, columns + T] or None; batch, length: B, T of the new tokens; positions: position_ids or None.
        """
        self.settle()
        self.require(facts)
        if self.rows and batch != len(self.rows):
            raise ValueError(f"batch size: expected {len(self.rows)}, the sequences in the cache, got {batch}")
        new = self.feed.admit(mask, batch, length, positions)
        fresh = not self.rows
        with self._fresh_rows(batch if fresh else 0):
            lengths = [self.core.logical_length(row) for row in self.rows]
            padding = new is not None and not bool(new.any())
            step = PadStep() if padding else self.core.step(self.rows, valid=new, columns=length).open()
        forward = Forward(self, step, facts.name, modules, new, length)
        forward.fresh, forward.lengths = fresh, lengths
        self.feed.forward = forward
        return forward

    def append(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        queries: list[torch.Tensor] | None,
        scale: float | None,
        softcap: float | None,
    ) -> None:
        """Store T columns computed elsewhere, [B, heads, T, D] per layer of the core.

        When this raises nothing has changed, but that layers may be cut; or the tokens stand, and the plan after them failed.
        """
        self.settle()
        for name, given in (("keys", keys), ("values", values), ("queries", queries)):
            if given is not None and len(given) != len(self.facts.layers):
                raise ValueError(f"append: {name} has {len(given)} layers, expected {len(self.facts.layers)}")
        if keys[0].dim() != 4:
            raise ValueError(f"append: keys are {list(keys[0].shape)}, expected [B, H, T, D]")
        batch, _, length, _ = keys[0].shape
        if self.rows and batch != len(self.rows):
            raise ValueError(f"append: batch size is {batch}, expected {len(self.rows)}, the sequences in the cache")
        self.feed.admit(None, batch, length, None)
        with self._fresh_rows(0 if self.rows else batch):
            lengths = [self.core.logical_length(row) for row in self.rows]
            try:
                with self.core.step(self.rows, columns=length) as step:
                    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
                        q = None if queries is None else queries[i].transpose(1, 2)
                        step.append(i, k.transpose(1, 2), v.transpose(1, 2), q, scale=scale, softcap=softcap)
            except BaseException:
                if any(lengths) and [self.core.logical_length(row) for row in self.rows] != lengths:
                    self.feed.extend(None, batch, length)
                raise
        self.feed.extend(None, batch, length)

    @contextmanager
    def _fresh_rows(self, n: int) -> Iterator[None]:
        """Begin n rows, and end them again if the block raises."""
        if n:
            self.rows.extend(self.core.new(n))
        try:
            yield
        except BaseException:
            if n:
                self.release()
            raise

    def close(self, forward: Forward, failed: bool) -> None:
        """Audit and commit the open step, or roll it back. Unsupported when it did not reach every layer."""
        if failed:
            self.abort(forward)
            return
        try:
            forward.audit()
            forward.step.commit()
        except BaseException:
            if [self.core.logical_length(row) for row in self.rows] == forward.lengths:
                self.abort(forward)
            else:  # the tokens stand; what failed is the plan after them
                self._extend(forward)
            raise
        self._extend(forward)

    def _extend(self, forward: Forward) -> None:
        self.feed.forward = None
        self.feed.extend(forward.new, len(self.rows), forward.length)

    def abort(self, forward: Forward) -> None:
        """Roll back every layer touched."""
        self.feed.forward = None
        self.feed.broken |= forward.irreversible
        if not forward.step.closed:
            forward.step.rollback()
        if forward.fresh:
            self.release()

    def settle(self, broken: bool = False) -> None:
        """After this no step is open. RuntimeError: one is, in another thread; or the cache broke (unless `broken`)."""
        forward = self.feed.forward
        if forward is not None:
            alive = {thread.ident for thread in threading.enumerate()}
            if forward.thread != threading.get_ident() and forward.thread in alive:
                raise RuntimeError(_BUSY)
            self.abort(forward)  # left open by a fault in compiled code, where no hook runs
        if self.feed.broken and not broken:
            raise RuntimeError(_BROKEN)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def select(self, index: list[int]) -> None:
        """Row i continues row index[i]."""
        self.rows[:] = self.core.select(self.rows, index)
        self.feed.select(index)

    def fork_to(self, other: Batch) -> None:
        """Give `other`, empty and over the same core, a fork of every row."""
        other.rows.extend(self.core.fork(row, 1)[0] for row in self.rows)
        self.feed.copy_to(other.feed)

    def crop(self, columns: int) -> None:
        """Withdraw the last `columns` columns and confirm the rest; ValueError where the core cannot."""
        if self.rows:
            gone = self.feed.real_in_last(columns, len(self.rows))
            kept = [self.core.logical_length(row) - n for row, n in zip(self.rows, gone, strict=True)]
            self.core.crop(self.rows, kept)
        self.feed.withdraw(columns)

    def discard(self) -> None:
        """The KVCache is gone: roll back what is open, end every row."""
        if self.feed.forward is not None:
            self.abort(self.feed.forward)
        self.release()

    def release(self) -> None:
        """End every row."""
        rows, self.rows[:] = list(self.rows), []
        if rows:
            self.core.free(rows)
