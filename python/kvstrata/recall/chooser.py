"""``Chooser``: a selector of your own, in torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.config import DTYPES, SLOTS
from kvstrata.policy.base import Reading
from kvstrata.recall.selectors import PageVotes

_DTYPES = {number: dtype for dtype, number in DTYPES.items()}


class Summaries:
    """What is known of the pages of a layer's rows that a step may read beside sinks and tail. M: entries of the longest row.

    count: i64 [R, M], readable tokens of each page, 0: none, or there is no such page; base: f32 [R, G], log-sum-exp of sinks
    and tail, which are read anyway; scale: of q . k; most: K, pages of each row.
    """

    def __init__(self, blocks: Tensor, visible: Tensor, base: Tensor, dim: int, scale: float, most: int) -> None:
        """blocks: u8 [R, ceil(M / 16), summary_bytes(dim)]; visible: u16 [R, M]."""
        self._blocks, self._dim = blocks, dim
        self.base, self.scale, self.most = base, scale, most
        bits = visible.to(torch.int32).unsqueeze(-1) >> torch.arange(SLOTS, dtype=torch.int32)
        self.count = (bits & 1).sum(-1)

    def refuse_no_numbers(self, name: str) -> None:
        """ValueError for a page whose keys are not finite: it could not be found again."""
        scale = self._facts[:, :, 0].flatten(1)[:, : self.count.shape[1]]
        for r, e in (~scale.isfinite() & (self.count > 0)).nonzero().tolist():
            raise ValueError(f"{name}: the keys of page {e} of row {r} are not finite, expected finite ones")

    @cached_property
    def mean(self) -> Tensor:
        """f32 [R, M, D]: the mean key of each page, to 8 bits, as the model has keys; 0 of those that are not there."""
        dim, (rows, count, _) = self._dim, self._blocks.shape
        codes = self._blocks[..., : SLOTS * dim].view(rows, count, dim // 4, SLOTS, 4).transpose(2, 3)
        mean = (codes.reshape(rows, -1, dim).float() - 128) * self._facts[:, :, 0].reshape(rows, -1, 1)
        return ops.rotate(mean[:, : self.count.shape[1]].contiguous(), inverse=True)

    @property
    def spread(self) -> Tensor:
        """f32 [R, M]: mean variance of a page's keys about that, per channel."""
        return self._facts[:, :, 1].flatten(1)[:, : self.count.shape[1]]

    @property
    def radius(self) -> Tensor:
        """f32 [R, M]: distance of the farthest key from it."""
        return self._facts[:, :, 2].flatten(1)[:, : self.count.shape[1]]

    def best(self, vote: Tensor) -> Tensor:
        """i64 [R, K]: the pages of highest vote f32 [R, M], ties the lower one; -1 where there are fewer."""
        if vote.shape != self.count.shape:
            raise ValueError(f"best: vote is {list(vote.shape)}, expected {list(self.count.shape)}")
        order = torch.sort(vote.masked_fill(self.count == 0, -torch.inf), dim=1, descending=True, stable=True).indices
        chosen = order[:, : self.most]
        chosen = chosen.masked_fill(self.count.gather(1, chosen) == 0, -1)
        return torch.nn.functional.pad(chosen, (0, self.most - chosen.shape[1]), value=-1)

    @property
    def _facts(self) -> Tensor:
        """f32 [R, B, 3, 16]: scale, spread, radius."""
        facts = self._blocks[..., SLOTS * self._dim :].contiguous().view(torch.float32)
        return facts.view(*self._blocks.shape[:2], 3, SLOTS)


@dataclass(frozen=True, kw_only=True)
class Chooser(PageVotes):
    """A selector of your own: subclass it, and write ``choose``. The parameters are those of :class:`PageVotes`.

    A slow path: in each layer of each step of one token, the summaries of all pages are copied, and ``choose`` is called under
    the interpreter's lock. What it does not read is not estimated: nothing is reported as captured.
    """

    kind: ClassVar[Literal["mean"]] = "mean"

    def choose(self, q: Tensor, pages: Summaries) -> Tensor:
        """i64 or i32 [R, K]: of each row, places of the pages to read, each once, in any order; -1: none. q: f32 [R, G, D], the
        step's queries as the model has them. It must depend on its arguments alone."""
        raise NotImplementedError(f"{self._name}: choose(q, pages) is not written")

    def _read(self, reading: Reading) -> Reading:
        if self.audit:
            raise ValueError(
                f"{self._name}: audit is {self.audit}, expected 0: nothing is estimated of what is not read"
            )
        return reading

    def ask(
        self,
        rows: int,
        group: int,
        dim: int,
        entries: int,
        dtype: int,
        scale: float,
        most: int,
        q: bytearray,
        blocks: bytearray,
        visible: bytearray,
        base: bytearray,
    ) -> list[list[int]]:
        """As the store asks: the pages of each row, rising. ValueError for what ``choose`` may not return."""
        if entries == 0:
            return [[] for _ in range(rows)]
        size = ops.summary_bytes(dim, self.kind)
        known = Summaries(
            torch.frombuffer(blocks, dtype=torch.uint8).view(rows, -1, size),
            torch.frombuffer(visible, dtype=torch.uint16).view(rows, entries),
            torch.frombuffer(base, dtype=torch.float32).view(rows, group),
            dim,
            scale,
            most,
        )
        known.refuse_no_numbers(self._name)
        queries = torch.frombuffer(q, dtype=_DTYPES[dtype]).view(rows, group, dim).float()
        return self._checked(self.choose(queries, known), known)

    def _checked(self, chosen: Tensor, known: Summaries) -> list[list[int]]:
        where, size = f"{self._name}: choose", (*known.count.shape[:1], known.most)
        if not isinstance(chosen, Tensor) or chosen.dtype not in (torch.int32, torch.int64) or chosen.shape != size:
            got = f"{chosen.dtype} {list(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
            raise ValueError(f"{where} gave {got}, expected torch.int64 or torch.int32 {list(size)}")
        entries = known.count.shape[1]
        found = []
        for r, line in enumerate(chosen.tolist()):
            row = sorted(e for e in line if e != -1)
            for before, e in zip([-1, *row], row, strict=False):
                if not 0 <= e < entries:
                    raise ValueError(f"{where} gave page {e} in row {r}, expected -1 (none) to {entries - 1}")
                if e == before:
                    raise ValueError(f"{where} gave page {e} twice in row {r}, expected each once")
                if known.count[r, e] == 0:
                    raise ValueError(f"{where} gave page {e} in row {r}, expected one with readable tokens (count > 0)")
            found.append(row)
        return found
