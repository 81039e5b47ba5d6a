"""``Archive``: nothing is evicted; what has left the tail goes to pages by meaning, in the Far tier where there is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kvstrata.policy.base import FAR, FULL, GROUPED, PROVISIONAL_GROUP, STATES, UNGROUPED, Plan, Seen
from kvstrata.recall.packers import KMeans

GRAIN = 256
"""Tokens: a segment is a multiple of it, so that pages are whole."""
UNIT = 64
"""Tokens by which is counted what is put together for the time being."""
MAX_SEGMENT = 1 << 16
"""Tokens that are clustered together at the most (``csrc/ops/cluster.h``)."""
REST = 1 << 20
"""The number of a row's segment of tokens that are put together for the time being, above those of all others."""


class Packer(Protocol):
    """Which tokens shall share a page?"""

    def group(self, seen: Seen, segment: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Archive:
    """Archives what has left the tail, clustered into pages: at each plan what came since the last one, for the time being, and
    by larger segments for good once there are enough tokens.

    packer: which tokens share a page; state: "full", or the quantized format that archived tokens take; segment: most tokens
    clustered together, at most 65,536, segment_min: fewest, both multiples of 256. ValueError for parameters.

    While tokens are put together, memory beside the cache's is taken that no limit counts and that is free again afterwards:
    for each thread the keys of a segment as f32 and what clustering it takes, for n tokens about n * (9 * D + n / 4) bytes,
    of 4,096 at D = 128 some 9 MB; and the keys of a row's other segments, where a plan finds several.

    Source: IceCache (arXiv 2604.10539). Deviations: it inserts token by token into a tree and rewrites pages; here a segment is
    clustered once and its pages never change.
    """

    packer: Packer = field(default_factory=KMeans)
    state: str = "full"
    segment: int = 4096
    segment_min: int = 1024
    archives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.state != "full" and self.state not in STATES:
            raise ValueError(f"Archive: state is {self.state!r}, expected 'full' or one of {', '.join(STATES)}")
        for name in ("segment", "segment_min"):
            value = getattr(self, name)
            if value < GRAIN or value % GRAIN:
                raise ValueError(f"Archive: {name} is {value}, expected a positive multiple of {GRAIN}")
        if self.segment > MAX_SEGMENT:
            raise ValueError(f"Archive: segment is {self.segment}, expected at most {MAX_SEGMENT}")
        if self.segment_min > self.segment:
            raise ValueError(f"Archive: segment_min is {self.segment_min}, expected at most segment={self.segment}")

    @property
    def native_state(self) -> int:
        """What an archived token is stored as."""
        return FULL if self.state == "full" else STATES[self.state]

    def plan(self, seen: Seen) -> Plan:
        waiting = self.waiting(seen)
        segment = self.segments(waiting)
        assert seen.tier is not None
        fresh = self.fresh(seen, waiting & (segment < 0))
        group = self.packer.group(seen, torch.where(fresh, REST, segment))
        taken = group >= 0
        return Plan(
            state=torch.where(taken, self.native_state, seen.state).to(torch.uint8),
            tier=torch.where(taken, FAR, seen.tier).to(torch.uint8),
            group=torch.where(fresh & taken, group + PROVISIONAL_GROUP, group),
        )

    def waiting(self, seen: Seen) -> Tensor:
        """bool [R, N]: sealed tokens that no plan has put together for good."""
        assert seen.grouped is not None
        return seen.stored & ~seen.protected & (seen.grouped != GROUPED)

    def fresh(self, seen: Seen, left: Tensor) -> Tensor:
        """bool [R, N]: of the tokens that wait on, those that are put together for the time being: what is new, and of the
        older ones as many as a binary counter of UNIT tokens would carry, so that each token is put together a logarithm of
        times and most of them among many. Whole pages."""
        assert seen.grouped is not None and seen.entry is not None
        new = left & (seen.grouped == UNGROUPED)
        count = torch.div(left.sum(1), UNIT, rounding_mode="floor")
        before = torch.div((left & ~new).sum(1), UNIT, rounding_mode="floor")
        carry = (1 + (count ^ before)).double().log2().ceil().long()  # bits of the counter that have changed
        start = ((count >> carry) << carry) * UNIT
        begins = torch.nn.functional.pad(seen.entry[:, 1:] != seen.entry[:, :-1], (1, 0), value=True)
        rank = left.cumsum(1) - 1
        first = torch.where(begins, rank, -1).cummax(1).values  # of the token's page
        return left & (new | (first >= start[:, None])) & new.any(1, keepdim=True)

    def segments(self, waiting: Tensor) -> Tensor:
        """i32 [R, N]: the segment of each waiting token, the oldest first in table order; -1: none, or it waits on. Segments
        are as equal as multiples of 256 can be, larger first."""
        grains = torch.div(waiting.sum(1), GRAIN, rounding_mode="floor")
        grains = torch.where(grains * GRAIN >= self.segment_min, grains, 0)
        count = -torch.div(-grains, self.segment // GRAIN, rounding_mode="floor")
        each = torch.div(grains, count.clamp_min(1), rounding_mode="floor")
        larger = grains - each * count  # segments of one grain more
        grain = torch.div(waiting.cumsum(1) - 1, GRAIN, rounding_mode="floor")
        first = (larger * (each + 1))[:, None]  # grains in the larger ones
        wide = torch.div(grain, (each + 1)[:, None], rounding_mode="floor")
        rest = torch.div(grain - first, each.clamp_min(1)[:, None], rounding_mode="floor") + larger[:, None]
        segment = torch.where(grain < first, wide, rest)
        return torch.where(waiting & (grain < grains[:, None]), segment, -1).to(torch.int32)
