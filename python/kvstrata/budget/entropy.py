"""How much of each layer stays Full, from its attention statistic (ARKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvstrata.budget.allocate import Allocation, RowsSeen, divide
from kvstrata.budget.split import level


@dataclass(frozen=True)
class EntropyShare:
    """The share r of pages that stay Full, high where attention is diffuse, restless and heavy-tailed (ARKV, code).

    Reads ``seen.oq`` f32 [L, R], >= 0. Per layer of one sequence OQ_l = mean over its rows, r_l = OQ_l / max_j OQ_j.
    full_share: x in (0, 1] makes r_l = min(1, lambda * OQ_l) with mean x instead (ours); per_head: r for each (layer, row),
    the maximum over all of a sequence's; capacity: bytes in proportion to OQ, too (ours), else uniform.
    Without statistics, or with all of them 0: r = 1.
    """

    full_share: float | None = None
    per_head: bool = False
    capacity: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"oq"})

    def __post_init__(self) -> None:
        if self.full_share is not None and not 0 < self.full_share <= 1:
            raise ValueError(f"EntropyShare: full_share is {self.full_share}, expected None or 0 < full_share <= 1")

    def allocate(
        self, seen: RowsSeen, total: int, floor: Tensor | None = None, cap: Tensor | None = None
    ) -> Allocation:
        share = torch.ones(seen.tokens.shape)
        if seen.oq is None or seen.oq.numel() == 0:
            return divide(seen, total, np.ones((1, 1)), floor, cap, share)
        if not seen.oq.isfinite().all() or (seen.oq < 0).any():
            raise ValueError("EntropyShare: oq holds a value that is negative or not finite, expected OQ >= 0")
        oq = seen.oq.double()
        weights = torch.ones_like(oq)
        for rows in seen.sequences():
            own = oq[:, rows] if self.per_head else oq[:, rows].mean(1, keepdim=True).expand(-1, len(rows))
            share[:, rows] = self._share(own).float()
            weights[:, rows] = own
        return divide(seen, total, weights.numpy() if self.capacity else np.ones((1, 1)), floor, cap, share)

    def _share(self, oq: Tensor) -> Tensor:
        """r of one sequence, f64 as ``oq``."""
        most = oq.max()
        if most == 0:
            return torch.ones_like(oq)
        if self.full_share is None:
            return oq / most
        flat = oq.flatten().numpy()
        return torch.from_numpy(level(self.full_share * len(flat), flat, 0.0, 1.0)).view(oq.shape)
