"""Chunks of 16 tokens as the knapsack's items: their order, and which step of the ladder each takes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata.reference.pages import SLOTS


def chunk_order(value: Tensor, kind: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of each row sorted into chunks of 16 of one kind: order i32 [R, N], w f32 [R, M], items i32 [R].

    value [R, N] >= 0; kind u8 [R, N], 0: not in any chunk; pos i32 [R, N]. order: the row's token indices by kind, then by
    falling value, ties older first; -1 beyond. Each kind's tokens are cut in 16s; w[m]: sum of chunk m, 0 from items[r] on.
    """
    rows, columns = value.shape
    by = pos.sort(dim=1, stable=True).indices
    by = by.gather(1, value.gather(1, by).sort(dim=1, descending=True, stable=True).indices)
    last_first = torch.where(kind == 0, 256, kind.to(torch.int32))  # kind 0 goes last
    by = by.gather(1, last_first.gather(1, by).sort(dim=1, stable=True).indices)
    kinds, values = kind.gather(1, by).to(torch.int64), value.gather(1, by).to(torch.float32)
    counts = torch.zeros(rows, 256, dtype=torch.int64).scatter_add_(1, kinds, torch.ones_like(kinds))
    counts[:, 0] = 0
    chunks = (counts + SLOTS - 1) // SLOTS
    first_token, first_chunk = counts.cumsum(1) - counts, chunks.cumsum(1) - chunks
    rank = torch.arange(columns).expand(rows, -1) - first_token.gather(1, kinds)
    present = kinds != 0
    chunk = torch.where(present, first_chunk.gather(1, kinds) + rank // SLOTS, 0)
    items = chunks.sum(1)
    w = torch.zeros(rows, max(int(items.max()) if rows else 0, 1), dtype=torch.float32)
    w.scatter_add_(1, chunk, torch.where(present, values, 0.0))
    return torch.where(present, by, -1).to(torch.int32), w[:, : int(items.max()) if rows else 0], items.to(torch.int32)


def choose_chunks(w: Tensor, ladder: Tensor, cost: Tensor, fidelity: Tensor, budget: int) -> tuple[Tensor, float, int]:
    """The step of each item on its ladder, for the most sum(w * fidelity) with sum(cost) <= budget: step u8 [n], lambda, cost.

    w f32 [n] >= 0; ladder u8 [n]: each item's column of cost i64 [J, F], fidelity f32 [J, F], whose steps rise on an upper
    concave hull (a shorter ladder repeats its last). An item goes up while w * df > lambda * dc; lambda bisected 64 times;
    then the remaining steps by falling density w * df / dc, ties by index, each if it fits. fp64. ValueError if step 0 of
    all items does not fit.
    """
    column = ladder.to(torch.int64)
    rise = cost[1:] - cost[:-1]
    gain = w.to(torch.float64) * (fidelity[1:].double() - fidelity[:-1].double())[:, column]  # [J - 1, n]
    price = rise[:, column]

    def chosen(at: float) -> tuple[Tensor, int]:
        step = (gain > at * price.double()).to(torch.int64).cumprod(0).sum(0)
        return step, int(cost[step, column].sum())

    lowest = int(cost[0, column].sum())
    if lowest > budget:
        raise ValueError(f"choose_chunks: budget is {budget}, the cheapest steps cost {lowest}")
    low, level = 0.0, 0.0
    step, held = chosen(level)
    if held > budget:
        density = torch.where(price > 0, gain / price, 0.0)
        level = float(density.max()) * (1 + 2.0**-20)
        for _ in range(64):
            middle = (low + level) / 2
            low, level = (low, middle) if chosen(middle)[1] <= budget else (middle, level)
        step, held = chosen(level)
    step, held = _fill(step, gain, price, budget, held)
    return step.to(torch.uint8), level, held


def _fill(step: Tensor, gain: Tensor, price: Tensor, budget: int, held: int) -> tuple[Tensor, int]:
    """Further steps in order of density, ties by item, each if the one below it was taken and it fits.

    What does not fit once never does: each round drops those, and takes the longest run that fits.
    """
    steps, items = gain.shape
    which = torch.arange(steps).unsqueeze(1)
    open_ = (which >= step) & (price > 0)
    item, at = torch.nonzero(open_.T, as_tuple=True)  # by item, then step
    density = torch.where(price > 0, gain / price, 0.0)
    density = density.cummin(0).values if steps else density  # rounding must not put a step before the one below it
    order = density[at, item].sort(descending=True, stable=True).indices
    item, at = item[order], at[order]
    step = step.clone()
    while item.numel():
        dear = price[at, item] > budget - held
        ends = torch.full((items,), steps).scatter_reduce(0, item[dear], at[dear], "amin")
        item, at = item[at < ends[item]], at[at < ends[item]]
        run = int((price[at, item].cumsum(0) <= budget - held).sum())
        step.scatter_add_(0, item[:run], torch.ones_like(item[:run]))
        held += int(price[at[:run], item[:run]].sum())
        item, at = item[run:], at[run:]
    return step, held
