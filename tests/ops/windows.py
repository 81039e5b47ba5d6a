"""Rows of window queries over lists of pages of any formats, poisoned wherever nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import SLOTS, made_once, poisoned_pools, slot_masks, write_pages, write_quantized
from torch import Tensor

from kvstrata import ops, reference

FULL = ("f32", "bf16", "f16")


@dataclass
class Window:
    q: Tensor  # [R, W, G, D]
    pages: Tensor  # i32 [R, K]
    visible: Tensor  # u16 [R, K]
    pools: list[ops.Pool]
    k: Tensor  # f64 [R, K, 16, D], what the pages hold
    positions: Tensor  # i64 [R, K, 16]
    q_pos: Tensor  # i32 [R, W]
    queries: Tensor  # i32 [R]
    centre: Tensor | None  # f32 [R, D]

    @property
    def slots(self) -> Tensor:
        return reference.visible_slots(self.pages, self.visible)

    def row(self, r: int, entries: int | None = None) -> Window:
        """One row alone, its first entries only."""
        one = slice(r, r + 1)
        return replace(
            self,
            q=self.q[one],
            pages=self.pages[one, :entries],
            visible=self.visible[one, :entries],
            k=self.k[one, :entries],
            positions=self.positions[one, :entries],
            q_pos=self.q_pos[one],
            queries=self.queries[one],
            centre=None if self.centre is None else self.centre[one],
        )

    def arguments(self, **more: Any) -> dict[str, Any]:
        own = {"queries": self.queries, "visible": self.visible, "centre": self.centre}
        return own | more

    def score(self, **more: Any) -> tuple[Tensor, Tensor]:
        out = torch.full((*self.q.shape[:1], self.q.shape[2], *self.pages.shape[1:], SLOTS), float("nan"))
        arguments = self.arguments(q_pos=self.q_pos, out=out) | more
        return ops.score_window(self.q, self.pages, self.pools, **arguments)

    def measure(self, **more: Any) -> Tensor:
        out = torch.full((self.q.shape[0], self.q.shape[2], 3), float("nan"))
        return ops.measure(self.q, self.pages, self.pools, self.q_pos, **self.arguments(out=out) | more)

    def shares(self, window: int = 0, q_pos: bool = True, **more: Any) -> tuple[Tensor, Tensor]:
        """The reference's A and lse."""
        at = self.q_pos if q_pos else None
        read = reference.window_read(self.slots, self.positions, at, self.queries, self.q.shape[1], window)
        return reference.shares(self.q.double(), self.k, read, **more)

    def past(self, skip: int = 0) -> Tensor:
        """bool [R, K, 16]: visible slots older than the row's oldest query, from position `skip` on."""
        oldest = torch.full((len(self.queries),), -1, dtype=torch.int64)
        for r, count in enumerate(self.queries.tolist()):
            if count:
                oldest[r] = self.q_pos[r, :count].min()
        return self.slots & (self.positions < oldest[:, None, None]) & (self.positions >= skip)


@made_once
def make_window(
    lengths: list[int],
    *,
    formats: tuple[str, ...] = ("bf16",),
    dim: int = 64,
    group: int = 2,
    width: int = 8,
    queries: list[int] | None = None,
    masks: str = "full",
    holes: float = 0.0,
    shuffle: bool = False,
    late: int = 4,
    spread: float = 1.0,
    seed: int = 0,
) -> Window:
    """A row per length. Positions have gaps; `shuffle`: in no order. The oldest query stands `late` positions before the
    end of the row's positions, so that younger ones see more; keys are Gaussian times `spread`."""
    g = torch.Generator().manual_seed(seed)
    rows, entries = len(lengths), max(lengths, default=0)
    per_pool = rows * max(entries, 1) // len(formats) + 1
    pools = poisoned_pools(formats, dim, per_pool, 1)
    order = torch.randperm(per_pool * len(formats), generator=g).tolist()
    pages = torch.full((rows, entries), -1, dtype=torch.int32)
    positions = torch.zeros(rows, entries, SLOTS, dtype=torch.int64)
    q_pos = torch.zeros(rows, width, dtype=torch.int32)
    for r, length in enumerate(lengths):
        for e in range(length):
            place = order[r * entries + e]
            pages[r, e] = ops.make_page(place % len(formats), 0, place // len(formats))
        at = torch.randperm(entries * SLOTS * 2, generator=g)[: entries * SLOTS]
        positions[r] = (at if shuffle else at.sort().values).view(entries, SLOTS)
        end = int(positions[r, :length].max()) if length else 0
        q_pos[r] = max(0, end - late) + 1 + torch.arange(width)
    pages[torch.rand(pages.shape, generator=g) < holes] = -1
    visible = slot_masks(pages, masks, g)
    k = spread * torch.randn(rows, entries, SLOTS, dim, generator=g)
    centre = None if all(f in FULL for f in formats) else torch.randn(rows, dim, generator=g)
    held = k.double()
    middle = torch.zeros(rows, dim) if centre is None else centre
    for p, pool in enumerate(pools):
        here = (pages >= 0) & (pages >> 28 == p)
        index = (pages[here] & 0xFFFF).long()
        row_of = torch.arange(rows).unsqueeze(1).expand(-1, entries)[here]
        if len(index):
            data = (pool, 0, index, k[here], k[here], visible[here])
            held[here] = write_pages(*data)[0] if pool.format in FULL else write_quantized(*data, middle[row_of])[0]
            pool.positions()[index] = positions[here].to(torch.int32)
    count = torch.tensor([width] * rows if queries is None else queries, dtype=torch.int32)
    q = torch.randn(rows, width, group, dim, generator=g)
    q[torch.arange(width).unsqueeze(0) >= count.unsqueeze(1)] = float("nan")  # queries that do not exist
    return Window(q, pages, visible, pools, held, positions, q_pos, count, centre)
