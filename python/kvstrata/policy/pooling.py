"""Scores of neighbourhoods: what a token is worth depends on the tokens beside it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kvstrata.policy.base import Seen


class Pooling:
    """How a scorer pools over neighbours; a scorer that is a Pooling has these as fields of its own.

    kernel: neighbourhood in positions, odd, 1: none; pool: "avg" or "max" over it; divide: "present", the average over
    neighbours that are stored (ours), or "kernel", over the kernel's width, as a padded average pool does.
    """

    kernel: int
    pool: Literal["avg", "max"]
    divide: Literal["present", "kernel"]

    def check_pooling(self) -> None:
        """ValueError for parameters."""
        who = type(self).__name__
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"{who}: kernel is {self.kernel}, expected an odd number >= 1")
        if self.pool not in ("avg", "max"):
            raise ValueError(f"{who}: pool is {self.pool!r}, expected 'avg' or 'max'")
        if self.divide not in ("present", "kernel"):
            raise ValueError(f"{who}: divide is {self.divide!r}, expected 'present' or 'kernel'")

    def pooled(self, seen: Seen, score: Tensor) -> Tensor:
        """f32 [R, N] of score f32 [R, G, N], pooled for each query head, then the mean over them; or of f32 [R, N]."""
        if self.kernel == 1 and score.dim() == 2:
            return score
        assert seen.read is not None
        return seen.read.pool(score, self.kernel, self.pool, self.divide)
