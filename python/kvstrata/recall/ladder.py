"""``Ladder``: nothing is evicted; what matters most stays Full and Near, the rest goes down, quantized, to the Far tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvstrata.policy.base import FAR, FULL, GROUPED, NEAR, PROVISIONAL_GROUP, UNGROUPED, Allowance, Plan, Seen
from kvstrata.recall.archive import Archive

MOVED = 1 << 22
"""Numbers of a plan's groups from here on: pages that are together already, by their place in the table."""


@dataclass(frozen=True)
class PageMass:
    """What matters: the share of attention that a page receives from a row's last queries, as its summary estimates it.

    queries: how many of the last, >= 1. ValueError below. Ours; by summaries, so that a Far page is ranked without reading it.
    """

    queries: int = 16
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    by_summaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"PageMass: queries is {self.queries}, expected >= 1")

    def score(self, seen: Seen) -> Tensor:
        assert seen.read is not None
        return seen.read.page_mass(self.queries)


@dataclass(frozen=True)
class Ladder(Archive):
    """As :class:`Archive`, but a page goes Far only where the Near tier has no room for it: of each row, the pages of highest
    attention mass per byte stay Full and Near, as many as its allowance pays; the others are quantized and archived. A page
    that went down is read where it is, or from its Near copy; it does not come back.

    New pages that stay Near stand beside those that they replace until a row's plan is done: no more of them than what the row
    holds leaves of its bytes, and the allowance's spare ones. No allowance: all goes Far. The parameters are Archive's. Ours.
    """

    state: str = "int8"

    def plan(self, seen: Seen) -> Plan:
        plan = super().plan(seen)
        assert plan.group is not None and plan.state is not None and plan.tier is not None
        assert seen.tier is not None and seen.grouped is not None and seen.entry is not None
        new = plan.group >= 0
        together = seen.stored & ~seen.protected & (seen.tier == NEAR) & (seen.grouped != UNGROUPED)
        together &= seen.state == FULL  # without a Far tier, what is quantized stays Near
        movable = new | together
        moved = torch.where(seen.grouped == GROUPED, MOVED, PROVISIONAL_GROUP + MOVED) + seen.entry
        page = torch.where(new, plan.group, moved).to(torch.int32)
        stays = self.near(seen, page, movable & (seen.state == FULL) & (seen.tier == NEAR), new, together)
        down = movable & ~stays
        return Plan(
            state=torch.where(down, self.native_state, seen.state).to(torch.uint8),
            tier=torch.where(down, FAR, seen.tier).to(torch.uint8),
            group=torch.where(new | down, page, -1).to(torch.int32),
        )

    def near(self, seen: Seen, page: Tensor, movable: Tensor, new: Tensor, together: Tensor) -> Tensor:
        """bool [R, N]: tokens whose page stays Near. page: i32 [R, N]; movable: tokens that are Full and Near now; new: those
        whose page is a new one, which needs each of its tokens to be so; together: those of the Full pages that earlier plans
        made, whose bytes the row holds until this plan is done."""
        stays = torch.zeros_like(movable)
        if seen.allowance is None or seen.score is None:
            return stays
        assert seen.entry is not None
        for r in range(len(page)):
            most, spare = _pages(seen.allowance, r)
            free = max(0, most - len(torch.unique(seen.entry[r, together[r]])))
            stays[r] = _best(page[r], seen.score[r], movable[r], new[r], most, free + spare)
        return stays


def _pages(allowance: Allowance, row: int) -> tuple[int, int]:
    """Full pages that a row's bytes pay, and by how many they may be more while new ones stand beside what they replace."""
    cost = allowance.page_bytes[FULL]
    return max(0, int(allowance.bytes[row])) // cost, allowance.spare // cost


def _best(page: Tensor, score: Tensor, movable: Tensor, new: Tensor, most: int, most_new: int) -> Tensor:
    """bool [N]: tokens of the at most ``most`` pages of highest mass, at most ``most_new`` of them new, all of whose tokens are
    movable. Ties: the page of the lower number."""
    some = (movable | new).nonzero().flatten()
    numbers, index = torch.unique(page[some], return_inverse=True)
    n = len(numbers)
    mass = torch.zeros(n, dtype=torch.float64).index_add_(0, index, score[some].nan_to_num(0.0, 0.0, 0.0).double())
    whole = torch.ones(n, dtype=torch.bool).index_fill_(0, index[~movable[some]], False)
    is_new = torch.zeros(n, dtype=torch.bool).index_fill_(0, index[new[some]], True)
    order = mass.sort(descending=True, stable=True).indices
    order = order[whole[order]]
    order = order[~is_new[order] | (is_new[order].cumsum(0) <= most_new)][:most]
    keep = torch.zeros(n, dtype=torch.bool).index_fill_(0, order, True)
    stays = torch.zeros_like(movable)
    stays[some] = keep[index]
    return stays
