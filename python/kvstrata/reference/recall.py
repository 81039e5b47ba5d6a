"""Recall: pages of keys that resemble each other, what is known of a page without reading it, and which ones to read."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata.reference.pages import SLOTS, rotate

INF = float("inf")
BEST_PAGES = 4  # of a token, that it bids for one after the other
LATE_ROUNDS = 8  # of bids for the best page with room


# --- cluster --------------------------------------------------------------------------------------------------------


def cluster(keys: Tensor, live: Tensor | None = None, iters: int = 4) -> tuple[Tensor, Tensor]:
    """page_of i32 [R, T] (-1: not live) and pages i32 [R] of keys [R, T, D] and live bool [R, T] (None: all).

    Spherical k-means of the row's live keys less their mean, then exactly 16 seats to a page.
    """
    page_of = torch.full(keys.shape[:2], -1, dtype=torch.int32)
    pages = torch.zeros(keys.shape[0], dtype=torch.int32)
    for r, row in enumerate(keys):
        here = torch.ones(len(row), dtype=torch.bool) if live is None else live[r]
        pages[r] = -(-int(here.sum()) // SLOTS)
        if pages[r] > 0:
            page_of[r, here] = seats(similarities(row[here], int(pages[r]), iters)).to(torch.int32)
    return page_of, pages


def similarities(keys: Tensor, pages: int, iters: int) -> Tensor:
    """s [n, C] = y_i . z_j of the keys [n, D] less their mean and the centroids as `iters` rounds leave them."""
    y = keys - keys.mean(0)
    z = unit(y[(2 * torch.arange(pages) + 1) * len(y) // (2 * pages)])
    for _ in range(iters):
        nearest = (y @ z.T).max(1).indices  # the first of equals
        total = torch.zeros_like(z).index_add_(0, nearest, y)
        z = torch.where((total == 0).all(1, keepdim=True), z, unit(total))
    return y @ z.T


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; 0 stays 0."""
    size = x.norm(dim=-1, keepdim=True)
    return torch.where(size == 0, x, x / size)


def seats(s: Tensor) -> Tensor:
    """Page i64 [n] of each token by its similarities s [n, C], 16 tokens to a page at most."""
    count, pages = s.shape
    page_of = torch.full((count,), -1)
    room = torch.full((pages,), SLOTS)
    value, best = torch.sort(s, dim=1, descending=True, stable=True)
    for c in range(min(BEST_PAGES, pages)):
        priority = value[:, c] - value[:, c + 1] if c + 1 < pages else torch.zeros_like(value[:, c])
        take_bids(page_of, room, best[:, c], priority)
    for _ in range(LATE_ROUNDS):
        open_value, open_best = s.masked_fill(room == 0, -INF).max(1)  # the first of equals
        take_bids(page_of, room, open_best, open_value)
    waiting = (page_of < 0).nonzero().flatten()
    free = torch.arange(pages).repeat_interleave(room)
    page_of[waiting] = free[: len(waiting)]
    return page_of


def take_bids(page_of: Tensor, room: Tensor, wanted: Tensor, priority: Tensor) -> None:
    """Seats tokens without a page that bid for page wanted [n], by falling priority [n] while it has room; in place."""
    for j in range(len(room)):
        bids = ((page_of < 0) & (wanted == j)).nonzero().flatten()
        order = torch.sort(priority[bids], descending=True, stable=True).indices  # ties: the lower token
        taken = bids[order[: int(room[j])]]
        page_of[taken] = j
        room[j] -= len(taken)


# --- summarize ------------------------------------------------------------------------------------------------------


def page_means(k: Tensor, slots: Tensor) -> Tensor:
    """R mean(k) [R, M, D] over the visible slots [R, M, 16] of k [R, M, 16, D]; 0 where there are none."""
    seen = torch.where(slots.unsqueeze(-1), k, torch.zeros((), dtype=k.dtype))
    return rotate(seen.sum(2) / slots.sum(2).clamp_min(1).unsqueeze(-1))


def page_spreads(k: Tensor, slots: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """spread, radius [R, M]: sum_i |R k_i - mean|^2 / (n D) and max_i |R k_i - mean| over the visible slots."""
    seen = torch.where(slots.unsqueeze(-1), k, torch.zeros((), dtype=k.dtype))
    away = (rotate(seen) - mean.unsqueeze(2)).norm(dim=-1).masked_fill(~slots, 0.0)
    return (away**2).sum(2) / (slots.sum(2).clamp_min(1) * k.shape[-1]), away.amax(2)


def summarize(k: Tensor, slots: Tensor) -> Tensor:
    """Blocks u8 [R, ceil(M / 16), 16 D + 192] of k [R, M, 16, D] as stored and the visible slots bool [R, M, 16].

    A page with a key that is not finite: codes 128, scale, spread and radius NaN.
    """
    rows, entries, _, dim = k.shape
    mean = page_means(k, slots)
    bad = ~mean.isfinite().all(-1)
    scale = (mean.abs().amax(-1) / 127).to(torch.float32)
    step = scale.to(k.dtype).unsqueeze(-1)
    codes = torch.round(mean / step).clamp(-127, 127).masked_fill((step == 0) | bad.unsqueeze(-1), 0.0)
    spread, radius = page_spreads(k, slots, step * codes)
    floats = torch.stack([scale, spread.to(torch.float32), radius.to(torch.float32)], -1)  # [R, M, 3]
    floats.masked_fill_(bad.unsqueeze(-1), float("nan"))
    count = -(-entries // SLOTS)
    lanes = torch.full((rows, count * SLOTS, dim), 128, dtype=torch.uint8)
    facts = torch.zeros(rows, count * SLOTS, 3)
    lanes[:, :entries], facts[:, :entries] = (codes + 128).to(torch.uint8), floats
    means = lanes.view(rows, count, SLOTS, dim // 4, 4).transpose(2, 3).flatten(2)
    rest = facts.view(rows, count, SLOTS, 3).transpose(2, 3).flatten(2)
    return torch.cat([means, rest.contiguous().view(torch.uint8)], -1)


def summary_codes(blocks: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes u8 [R, 16 B, D], scale, spread and radius f32 [R, 16 B] of blocks u8 [R, B, 16 D + 192]."""
    rows, count, _ = blocks.shape
    codes = blocks[..., : SLOTS * dim].reshape(rows, count, dim // 4, SLOTS, 4).transpose(2, 3)
    rest = blocks[..., SLOTS * dim :].contiguous().view(torch.float32).view(rows, count, 3, SLOTS)
    scale, spread, radius = (part.flatten(1) for part in rest.unbind(2))
    return codes.reshape(rows, count * SLOTS, dim), scale, spread, radius


def summary_parts(blocks: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """mean f32 [R, 16 B, D], spread and radius f32 [R, 16 B] of blocks u8 [R, B, 16 D + 192]."""
    codes, scale, spread, radius = summary_codes(blocks, dim)
    return scale.unsqueeze(-1) * (codes.to(torch.float32) - 128), spread, radius


# --- score_pages and select -----------------------------------------------------------------------------------------


def query_codes(q: Tensor) -> tuple[Tensor, Tensor]:
    """R q / delta f32 [R, G, D], to be rounded, and delta = max |R q| / 127 f32 [R, G]; zeros for a zero query."""
    turned = rotate(q.to(torch.float32))
    delta = turned.abs().amax(-1) / 127
    return torch.where(delta.unsqueeze(-1) == 0, turned, turned / delta.unsqueeze(-1)), delta


def score_pages(
    q: Tensor, blocks: Tensor, visible: Tensor, scale: float | None = None, spread_weight: float = 1.0
) -> Tensor:
    """x f64 [R, G, M] of queries q [R, G, D], not rotated, blocks u8 [R, >= ceil(M / 16), bytes], visible u16 [R, M].

    x = log of the page's estimated mass; -inf where no slot is visible.
    """
    dim, entries = q.shape[-1], visible.shape[1]
    scale = dim**-0.5 if scale is None else scale
    codes, step, spread, _ = summary_codes(blocks, dim)
    mean = (step.double().unsqueeze(-1) * (codes.double() - 128))[:, :entries]
    exact, delta = query_codes(q)
    rounded = delta.double().unsqueeze(-1) * torch.round(exact).clamp(-127, 127).double()
    square = (q.double() ** 2).sum(-1)
    x = scale * rounded @ mean.mT + 0.5 * spread_weight * scale**2 * torch.einsum(
        "rg,rp->rgp", square, spread[:, :entries].double()
    )
    n = ((visible.to(torch.int64).unsqueeze(-1) >> torch.arange(SLOTS)) & 1).sum(-1).unsqueeze(1)
    return torch.where(n == 0, torch.full_like(x, -INF), x + torch.log(n.clamp_min(1).double()))


def page_votes(x: Tensor, lse_base: Tensor | None = None, aggregate: str = "sum") -> Tensor:
    """vote [R, M] of x [R, G, M]: each head's share of its mass, over the heads; lse_base [R, G]: what is read anyway."""
    z = torch.logsumexp(x, -1)
    if lse_base is not None:
        z = torch.logaddexp(z, lse_base.to(x.dtype))
    share = torch.where(x == -INF, torch.zeros((), dtype=x.dtype), torch.exp(x - z.unsqueeze(-1)))
    return share.amax(1) if aggregate == "max" else share.sum(1)


def select(
    x: Tensor, k: Tensor | int, lse_base: Tensor | None = None, aggregate: str = "sum"
) -> tuple[Tensor, Tensor, Tensor]:
    """entries i32 [R, max k], count i32 [R] and lse_rest [R, G] of x [R, G, M] (-inf: not to be selected), k [R].

    The k[r] entries of highest vote, ties the lower index, by rising index, then -1; and the log-sum-exp of the others.
    """
    rows = x.shape[0]
    most = [k] * rows if isinstance(k, int) else k.tolist()
    vote = page_votes(x, lse_base, aggregate)
    entries = torch.full((rows, max(most, default=0)), -1, dtype=torch.int32)
    count = torch.zeros(rows, dtype=torch.int32)
    rest = x.clone()
    for r in range(rows):
        may = (x[r] != -INF).any(0).nonzero().flatten()
        order = torch.sort(vote[r, may], descending=True, stable=True).indices
        chosen = may[order[: most[r]]].sort().values
        entries[r, : len(chosen)], count[r] = chosen.to(torch.int32), len(chosen)
        rest[r, :, chosen] = -INF
    return entries, count, torch.logsumexp(rest, -1)
