"""One forward of one sequence through a step that somebody else opened, and will close."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvstrata.episodes.model import Attending
from kvstrata.hf.facts import Facts
from kvstrata.hf.feed import Feed
from kvstrata.hf.intake import Intake
from kvstrata.hf.step import Forward


class PackedStep:
    """A caller's step, which takes [T, heads, D], behind the layout [1, T, heads, D] of a forward. It is not ours to end."""

    closed = True

    def __init__(self, step: Attending) -> None:
        self._step = step

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **arithmetic: Any) -> Tensor:
        """Attention output [1, T, Hq, D] of q [1, T, Hq, D], k, v [1, T, H, D]; ValueError for one of another shape."""
        out = self._step.attend(layer, q[0], k[0], v[0], **arithmetic)
        if out.shape != q.shape[1:]:
            raise ValueError(f"attend: layer {layer} gave {list(out.shape)}, expected {list(q.shape[1:])}")
        return out[None]

    def commit(self) -> None:
        """Nothing: who opened the step closes it."""

    def rollback(self) -> None:
        """Nothing, likewise."""


class Passage(Intake):
    """Feeds `length` tokens, the first of them at position `first`, to `step`."""

    width = 1

    def __init__(self, facts: Facts, step: Attending, first: int, length: int) -> None:
        super().__init__(facts, Feed(lambda on: None))
        self.feed.columns = first
        self._step, self._length = step, length

    def open(
        self, facts: Facts, modules: frozenset[int], mask: Tensor | None, batch: int, length: int, positions: Any
    ) -> Forward:
        """See Intake. ValueError for another model."""
        self.require(facts)
        assert mask is None and (batch, length) == (1, self._length)
        self.feed.forward = forward = Forward(self, PackedStep(self._step), facts.name, modules, None, length)
        return forward

    def close(self, forward: Forward, failed: bool) -> None:
        """Unsupported unless every layer was reached; after a fault nothing is left to do."""
        self.feed.forward = None
        if not failed:
            forward.audit()
