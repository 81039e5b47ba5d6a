"""Columns of a layer's tokens as allocators see them, and their choices as plans have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvstrata.policy.base import Plan, Seen


def wide_columns(found: list[Seen], free: list[Tensor], states: list[int], norms: bool = False) -> dict[str, Tensor]:
    """What an allocator that looks at tokens sees of them, each [L, R, N]: unprotected ones at the front of each row.

    free: bool [R, N] by layer; states: that tokens may have; norms: whether it sees the lengths of values.
    """
    most = max(int(f.sum(1).max()) for f in free)
    scores, stored, positions, mass, lengths = [], [], [], [], []
    for seen, f in zip(found, free, strict=True):
        assert seen.score is not None
        order = (~f).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
        order = torch.nn.functional.pad(order, (0, most - order.shape[1]))
        score = seen.score.nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)
        scores.append(score.gather(1, order))
        index = torch.zeros(max(states) + 1, dtype=torch.uint8)
        index[torch.tensor(states)] = torch.arange(len(states), dtype=torch.uint8)
        stored.append(index[seen.state.gather(1, order).long().clamp_max(max(states))])
        positions.append(seen.positions.gather(1, order))
        mass.append(torch.where(seen.stored, score, 0.0).sum(1))
        if norms:
            assert seen.read is not None
            lengths.append(seen.read.values().norm(dim=-1).gather(1, order))
    return {
        "scores": torch.stack(scores),
        "stored": torch.stack(stored),
        "positions": torch.stack(positions),
        "mass": torch.stack(mass),
    } | ({"norms": torch.stack(lengths)} if norms else {})


def chosen_states(seen: Seen, formats: Tensor, costs: Mapping[int, int]) -> Tensor:
    """u8 [R, N] in table order of an allocator's formats (0 Evicted, 1 + index) of unprotected tokens."""
    states = torch.tensor([0, *sorted(costs)])
    free = seen.stored & ~seen.protected
    out = seen.state.clone()
    rank = (free.cumsum(1) - 1).clamp(0, max(formats.shape[1] - 1, 0))
    chosen = states[formats.long()].to(torch.uint8).gather(1, rank)
    return torch.where(free, chosen, out)


def checked(plan: Plan, shape: torch.Size, has_far: bool) -> Plan:
    """The plan's columns, contiguous: no tier where the cache has no Far tier. ValueError for another dtype or shape."""
    tier = _column("tier", plan.tier, torch.uint8, shape) if has_far else None
    group, sets = (
        _column(name, column, dtype, shape)
        for name, column, dtype in (("group", plan.group, torch.int32), ("set", plan.set, torch.uint16))
    )
    return Plan(_column("state", plan.state, torch.uint8, shape), tier, group, sets)


def _column(name: str, column: Tensor | None, dtype: torch.dtype, shape: torch.Size) -> Tensor | None:
    if column is None:
        return None
    if column.dtype != dtype or column.shape != shape:
        raise ValueError(f"plan: {name} is {column.dtype} {list(column.shape)}, expected {dtype} {list(shape)}")
    return column.contiguous()
