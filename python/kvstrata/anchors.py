"""Layers that read what an earlier one selects have its pages: they take its plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstrata.policy.base import Plan, Planner, Seen

if TYPE_CHECKING:
    from kvstrata.cache import Cache

Key = tuple[int, tuple[int, ...], int]
"""An anchor, sequences, and what was seen of them."""


class Anchors:
    """The plans of anchors, until the last layer that follows has taken them or the step is over. Where a layer's rows are not
    as its anchor's were, it is planned by itself, and selects for itself (``csrc/store/follow.cpp``)."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._made: dict[Key, tuple[Tensor, Plan]] = {}

    def plan(self, planner: Planner, seen: Seen, ids: list[int], layers: list[int]) -> Plan:
        """The layer's plan. layers: those that are planned, in order."""
        reuse = getattr(self._cache.policy.selector, "reuse", 1)
        if reuse == 1:
            return planner.plan(seen)
        at = layers.index(seen.layer)
        anchor, last = layers[at - at % reuse], layers[min(at - at % reuse + reuse, len(layers)) - 1]
        key = (anchor, tuple(ids), _fingerprint(seen))
        if seen.layer == anchor:
            plan = planner.plan(seen)
            if last != anchor:
                self._made[key] = _kept(seen, plan)
            return plan
        found = self._made.pop(key, None) if seen.layer == last else self._made.get(key)
        return planner.plan(seen) if found is None else _given(seen, *found)

    def forget(self) -> None:
        """The step is over."""
        self._made.clear()


def _fingerprint(seen: Seen) -> int:
    """Of what the planner goes by: the same for rows of the same tokens in the same pages."""
    columns = (seen.positions, seen.open, seen.state, seen.tier, seen.grouped, seen.entry)
    return hash(tuple(None if c is None else c.numpy().tobytes() for c in columns))


def _kept(seen: Seen, plan: Plan) -> tuple[Tensor, Plan]:
    """Which places a plan changes, and its columns there."""
    changes = torch.zeros(seen.positions.shape, dtype=torch.bool)
    for column, now in ((plan.state, seen.state), (plan.tier, seen.tier)):
        if column is not None and now is not None:
            changes |= column != now
    if plan.group is not None:
        changes |= plan.group >= 0
    return changes.flatten().nonzero().flatten(), Plan(
        *(None if c is None else c[changes] for c in (plan.state, plan.tier, plan.group))
    )


def _given(seen: Seen, places: Tensor, kept: Plan) -> Plan:
    """The plan of the same changes."""
    as_it_is = Plan(seen.state, seen.tier, torch.full(seen.positions.shape, -1, dtype=torch.int32))
    columns: dict[str, Tensor] = {}
    for name in ("state", "tier", "group"):
        values, now = getattr(kept, name), getattr(as_it_is, name)
        if values is not None:
            columns[name] = now.flatten().index_put((places,), values).view(now.shape)
    return Plan(**columns)
