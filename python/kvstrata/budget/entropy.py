"""How much of each layer stays Full, from its attention statistic (ARKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from kvstrata.budget.allocate import Allocation, RowsSeen, divide
from kvstrata.budget.split import level

LEAST_QUERIES = 8
LEAST_TOKENS = 64
"""Below these, statistics say nothing: a row keeps the last OQ it had, at first 1."""

_LEAST = 1e-3
"""What each statistic counts at least in the product."""


@dataclass(frozen=True)
class EntropyShare:
    """The share r of pages that stay Full, high where attention is diffuse, restless and heavy-tailed (ARKV, code).

    Reads ``seen.oq`` f32 [L, R], >= 0. Per layer of one sequence OQ_l = mean over its rows, r_l = OQ_l / max_j OQ_j.
    full_share: x in (0, 1] makes r_l = min(1, lambda * OQ_l) with mean x instead (ours); per_head: r for each (layer, row),
    the maximum over all of a sequence's; capacity: bytes in proportion to OQ, too (ours), else uniform.
    Without statistics, or with all of them 0: r = 1.

    queries, stats, tau: how OQ is found: the statistics of the last ``queries`` queries (0: nothing is measured, OQ is 1
    everywhere), "sound" (ours) or as the "code" has them, and their exponents 1 / tau (code; tuned on its test tasks). every:
    tokens that a sequence grows by before it is measured again (ours; 0: at each plan, paper): all those queries read all
    that is stored, twice. ValueError for parameters.
    """

    full_share: float | None = None
    per_head: bool = False
    capacity: bool = False
    queries: int = 32
    stats: Literal["sound", "code"] = "sound"
    tau: tuple[float, float, float] = (7.7744, 5.4070, 5.5277)
    every: int = 512
    needs: ClassVar[frozenset[str]] = frozenset({"oq"})

    def __post_init__(self) -> None:
        if self.full_share is not None and not 0 < self.full_share <= 1:
            raise ValueError(f"EntropyShare: full_share is {self.full_share}, expected None or 0 < full_share <= 1")
        if self.queries != 0 and self.queries < LEAST_QUERIES:
            raise ValueError(f"EntropyShare: queries is {self.queries}, expected 0 or >= {LEAST_QUERIES}")
        if self.every < 0:
            raise ValueError(f"EntropyShare: every is {self.every}, expected >= 0 tokens")
        if self.stats not in ("sound", "code"):
            raise ValueError(f"EntropyShare: stats is {self.stats!r}, expected 'sound' or 'code'")
        if len(self.tau) != 3 or not all(t > 0 for t in self.tau):
            raise ValueError(f"EntropyShare: tau is {self.tau}, expected three numbers > 0")

    def known(self, queries: Tensor, past: Tensor) -> Tensor:
        """bool [R]: rows with enough queries and past tokens, i64 [R] each, for their statistics to say something."""
        return (queries >= LEAST_QUERIES) & (past >= LEAST_TOKENS)

    def oq(self, statistics: Tensor) -> Tensor:
        """OQ of each row of a layer, max(E, e)^(1/tau_1) * max(V, e)^(1/tau_2) * max(K, e)^(1/tau_3): f32 [R].

        statistics: f32 [R, G, 3], entropy, variance, kurtosis, each averaged over G (what is not finite counts 0).
        """
        mean = torch.nan_to_num(statistics, nan=0.0, posinf=0.0, neginf=0.0).mean(1).clamp_min(_LEAST)
        exponents = torch.tensor([1 / t for t in self.tau], dtype=mean.dtype, device=mean.device)
        return (mean**exponents).prod(1)

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
