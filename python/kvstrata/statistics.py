"""ARKV's statistics of a cache's layers: what was measured last, and when it is time again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """One layer of one sequence.

    values: f32 [H, 3], entropy, variance, kurtosis, mean over the query heads of each KV head; oq: f32 [H]; at: tokens that
    the sequence had.
    """

    values: Tensor
    oq: Tensor
    at: int


class Statistics:
    """The last measurement by layer and sequence."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Measured] = {}

    def oq(self, layer: int, ids: list[int], heads: int) -> Tensor:
        """f32 [R], rows of ``ids``: the last OQ; 1 where nothing was measured."""
        return torch.cat([m.oq if (m := self._known.get((layer, i))) else torch.ones(heads) for i in ids])

    def values(self, layer: int, ids: list[int], heads: int) -> Tensor:
        """f32 [R, 3], rows of ``ids``: the last entropy, variance and kurtosis; 0 where nothing was measured."""
        return torch.cat([m.values if (m := self._known.get((layer, i))) else torch.zeros(heads, 3) for i in ids])

    def due(self, layer: int, ids: list[int], lengths: list[int], every: int) -> list[bool]:
        """Which of ``ids`` were never measured, or have grown by ``every`` tokens since."""
        known = [self._known.get((layer, i)) for i in ids]
        return [m is None or n - m.at >= every for m, n in zip(known, lengths, strict=True)]

    def note(self, layer: int, seq: int, values: Tensor, oq: Tensor, at: int) -> None:
        """values: f32 [H, 3]; oq: f32 [H]; at: tokens of the sequence."""
        self._known[layer, seq] = Measured(values.clone(), oq.clone(), at)

    def follow(self, seq: int, source: int) -> None:
        """What is known of ``source`` holds for ``seq`` that continues it."""
        known = {layer: m for (layer, i), m in self._known.items() if i == source}
        self._known |= {(layer, seq): m for layer, m in known.items()}

    def cropped(self, seq: int, length: int) -> None:
        """The sequence was shortened: measured again once it has grown from there."""
        for at, m in self._known.items():
            if at[1] == seq and m.at > length:
                self._known[at] = Measured(m.values, m.oq, length)

    def forget(self, gone: set[int]) -> None:
        """Drops what is known of sequences that ended."""
        self._known = {at: m for at, m in self._known.items() if at[1] not in gone}
