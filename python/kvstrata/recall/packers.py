"""Packers: which tokens shall share a page?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstrata.config import SLOTS
from kvstrata.policy.base import Seen


@dataclass(frozen=True)
class KMeans:
    """Tokens whose keys resemble each other: spherical k-means over a segment, then exactly 16 to a page.

    iters: assignments, at least 1. ValueError below. Source: :func:`kvstrata.ops.cluster`.
    """

    iters: int = 4

    def __post_init__(self) -> None:
        if self.iters < 1:
            raise ValueError(f"KMeans: iters is {self.iters}, expected at least 1")

    def group(self, seen: Seen, segment: Tensor) -> Tensor:
        """i32 [R, N]: tokens of one number of a row are to share a page, -1: none. segment: i32 [R, N], -1: none."""
        assert seen.read is not None
        return seen.read.cluster(segment, self.iters)


@dataclass(frozen=True)
class Greedy:
    """Tokens about the one farthest from the others: one page after another, of the unplaced key of largest norm and the 15 of
    largest inner product with it. What k-means is to be compared with: O(T^2) for a segment. Source:
    :func:`kvstrata.ops.cluster_greedy`.
    """

    def group(self, seen: Seen, segment: Tensor) -> Tensor:
        """As in :class:`KMeans`."""
        assert seen.read is not None
        return seen.read.cluster(segment, None)


@dataclass(frozen=True)
class Position:
    """Tokens that follow each other: no clustering. What clustering is to be compared with."""

    def group(self, seen: Seen, segment: Tensor) -> Tensor:
        """As in :class:`KMeans`."""
        taken = segment >= 0
        page = torch.div(taken.cumsum(1) - 1, SLOTS, rounding_mode="floor")
        return torch.where(taken, page, -1).to(torch.int32)
