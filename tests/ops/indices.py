"""Summaries of random pages, poisoned wherever nothing may be read, and selections by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cases import made_once
from tolerances import LSE, VOTE_TIE, assert_close
from torch import Tensor

from kvstrata import ops, reference

INF = float("inf")


@dataclass
class Index:
    q: Tensor  # [R, G, D]
    blocks: Tensor  # u8 [R, B, bytes]
    visible: Tensor  # u16 [R, M]
    k: Tensor  # [R, M, 16, D], what was summarized
    kind: Any = "mean"

    def x(self, **more: Any) -> Tensor:
        return ops.score_pages(self.q, self.blocks, self.visible, kind=self.kind, **more)

    def select(self, k: Tensor | int, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.select(self.q, self.blocks, self.visible, k, kind=self.kind, **more)

    def row(self, r: int) -> Index:
        one = slice(r, r + 1)
        return Index(self.q[one], self.blocks[one], self.visible[one], self.k[one], self.kind)


@made_once
def make_index(
    entries: int,
    *,
    group: int = 4,
    dim: int = 64,
    rows: int = 2,
    holes: float = 0.1,
    more: int = 1,
    seed: int = 0,
    kind: str = "mean",
) -> Index:
    """Pages of keys about Gaussian means, any number of them visible; `holes` of the pages have none. Values are the keys.

    Where nothing may be read, codes and floats are 0xFF, which is NaN: of hidden entries, absent lanes and `more` blocks.
    """
    g = torch.Generator().manual_seed(seed * 10007 + entries * 17 + dim + group)
    k = torch.randn(rows, entries, 1, dim, generator=g) + torch.randn(rows, entries, 16, dim, generator=g)
    visible = torch.randint(1, 1 << 16, (rows, entries), generator=g)
    visible[torch.rand(rows, entries, generator=g) < 0.4] = 0xFFFF
    visible[torch.rand(rows, entries, generator=g) < holes] = 0
    slots = (visible.unsqueeze(-1) >> torch.arange(16)) & 1 == 1
    count = -(-entries // 16)
    blocks = torch.full((rows, count + more, ops.summary_bytes(dim, kind)), 0xFF, dtype=torch.uint8)  # type: ignore[arg-type]
    blocks[:, :count] = reference.summarize(k, slots, kind, k)
    gone = torch.ones(rows, count * 16, dtype=torch.bool)
    gone[:, :entries] = visible == 0
    poison_lanes(blocks[:, :count], gone, dim, kind)
    q = 2 * torch.randn(rows, group, dim, generator=g)
    return Index(q, blocks, visible.to(torch.uint16), k, kind)


def poison_lanes(blocks: Tensor, gone: Tensor, dim: int, kind: str) -> None:
    """0xFF into the lanes gone [R, 16 B] of blocks [R, B, bytes], in place."""
    by_lane = gone.view(*blocks.shape[:2], 16)
    mean, codes = 16 * dim + 192, 16 * dim
    parts = {
        "mean": [(0, mean, dim // 4 + 3, 4)],
        "bounds": [(0, 64 * dim, 2 * dim, 2)],
        "mean_value": [
            (0, mean, dim // 4 + 3, 4),
            (mean, mean + codes, 1, dim),
            (mean + codes, mean + codes + 128, 2, 4),
        ],
        "halves": [(0, 16 * dim + 192, dim // 4 + 3, 4)],
        "quarters": [(0, 32 * dim + 320, dim // 2 + 5, 4)],
    }
    for start, end, lines, width in parts[kind]:  # lines of 16 lanes of so many bytes
        part = blocks[..., start:end]
        lanes = part.reshape(*blocks.shape[:2], lines, 16, width)
        part.copy_(lanes.masked_fill(by_lane[:, :, None, :, None], 0xFF).view(part.shape))


def check_selection(index: Index, k: Tensor | int, base: Tensor | None = None, **more: Any) -> None:
    """The selection that the reference makes from the op's own x, but for votes that tie with the K-th."""
    aggregate = more.pop("aggregate", "sum")
    x = index.x(**more).double()
    entries, count, rest = index.select(k, lse_base=base, aggregate=aggregate, **more)
    want, want_count, _ = reference.select(x, k, base, aggregate)
    vote = reference.page_votes(x, base, aggregate)
    assert entries.dtype == torch.int32 and entries.shape == want.shape
    assert count.dtype == torch.int32 and torch.equal(count, want_count)
    left = x.clone()
    for r, n in enumerate(count.tolist()):
        mine, theirs = entries[r, :n].tolist(), want[r, :n].tolist()
        assert torch.all(entries[r, n:] == -1) and mine == sorted(set(mine))
        assert all(index.visible[r, p].item() > 0 for p in mine)
        for p in set(mine) ^ set(theirs):
            last = float(vote[r, theirs].min())
            assert abs(float(vote[r, p]) - last) <= VOTE_TIE * last, f"row {r}, entry {p}"
        left[r, :, mine] = -INF
    assert_close(rest, torch.logsumexp(left, -1), LSE)
