"""Recall: pages of keys that resemble each other, what is known of a page without reading it, and which ones to read."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata.reference.pages import SLOTS, rotate
from kvstrata.reference.parts import PARTS, by_lanes, split_blocks, summary_split

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


def cluster_greedy(keys: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """page_of, pages as `cluster`'s. A page: the unplaced key farthest from the mean, and its 15 of largest inner product."""
    page_of = torch.full(keys.shape[:2], -1, dtype=torch.int32)
    pages = torch.zeros(keys.shape[0], dtype=torch.int32)
    for r, row in enumerate(keys):
        here = torch.ones(len(row), dtype=torch.bool) if live is None else live[r]
        y = row[here] - row[here].mean(0)
        placed = torch.full((len(y),), -1, dtype=torch.int32)
        while (placed < 0).any():
            left = (placed < 0).nonzero().flatten()
            seed = left[(y[left] ** 2).sum(1).argmax()]  # the first of equals
            placed[seed] = pages[r]
            left = left[left != seed]
            order = torch.sort(y[left] @ y[seed], descending=True, stable=True).indices
            placed[left[order[: SLOTS - 1]]] = pages[r]
            pages[r] += 1
        page_of[r, here] = placed
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


def summarize(k: Tensor, slots: Tensor, kind: str = "mean", v: Tensor | None = None) -> Tensor:
    """Blocks u8 [R, ceil(M / 16), bytes] of k, v [R, M, 16, D] as stored and the visible slots bool [R, M, 16].

    kind mean: 16 D + 192 bytes; bounds: 64 D; mean_value, which needs v: 32 D + 320; halves: 16 D + 192, quarters: 32 D + 320.
    A page with a key that is not finite: codes 128, scale, spread and radius NaN, bounds NaN, of parts codes 8 and scales NaN;
    with a value that is not: their codes 128, scale NaN.
    """
    if kind == "bounds":
        return bounds_blocks(k, slots)
    if kind in PARTS:
        return split_blocks(k, slots, kind)
    blocks = mean_blocks(k, slots)
    if kind == "mean":
        return blocks
    assert v is not None
    return torch.cat([blocks, value_blocks(v, slots)], -1)


def mean_codes(mean: Tensor) -> tuple[Tensor, Tensor]:
    """codes [..., D] in -127..127 of mean [..., D], and their scale f32 [...]; 0 and NaN where it is not finite."""
    bad = ~mean.isfinite().all(-1)
    scale = (mean.abs().amax(-1) / 127).to(torch.float32)
    step = scale.to(mean.dtype).unsqueeze(-1)
    codes = torch.round(mean / step).clamp(-127, 127).masked_fill((step == 0) | bad.unsqueeze(-1), 0.0)
    return codes, scale.masked_fill(bad, float("nan"))


def mean_blocks(k: Tensor, slots: Tensor) -> Tensor:
    """Blocks of kind mean, as `summarize` has them."""
    codes, scale = mean_codes(page_means(k, slots))
    spread, radius = page_spreads(k, slots, scale.to(k.dtype).unsqueeze(-1) * codes)
    floats = torch.stack([scale, spread.to(torch.float32), radius.to(torch.float32)], -1)  # [R, M, 3]
    floats.masked_fill_(scale.isnan().unsqueeze(-1), float("nan"))
    lanes = by_lanes((codes + 128).to(torch.uint8), 128)
    means = lanes.view(*lanes.shape[:3], k.shape[-1] // 4, 4).transpose(2, 3).flatten(2)
    rest = by_lanes(floats, 0.0).transpose(2, 3).flatten(2)
    return torch.cat([means, rest.contiguous().view(torch.uint8)], -1)


def value_blocks(v: Tensor, slots: Tensor) -> Tensor:
    """What blocks of kind mean_value have beyond those of kind mean."""
    codes, scale = mean_codes(page_means(v, slots))
    mask = (slots.to(torch.int32) << torch.arange(SLOTS, dtype=torch.int32)).sum(-1).to(torch.int32)
    facts = torch.stack([by_lanes(scale, 0.0).view(torch.int32), by_lanes(mask, 0)], 2).flatten(2)
    return torch.cat([by_lanes((codes + 128).to(torch.uint8), 128).flatten(2), facts.view(torch.uint8)], -1)


def bounds_blocks(k: Tensor, slots: Tensor) -> Tensor:
    """Blocks of kind bounds, as `summarize` has them."""
    lo, hi = (x.to(torch.float32) for x in page_bounds(k, slots))
    below, above = lo.to(torch.bfloat16), hi.to(torch.bfloat16)
    below = torch.where(below.float() > lo, torch.nextafter(below, torch.full_like(below, -INF)), below)
    above = torch.where(above.float() < hi, torch.nextafter(above, torch.full_like(above, INF)), above)
    seen = torch.where(slots.unsqueeze(-1), k, torch.zeros((), dtype=k.dtype))
    bad = ~seen.isfinite().all(2).all(-1, keepdim=True)
    both = torch.stack([below, above], -2).masked_fill(bad.unsqueeze(-1), float("nan"))  # [R, M, 2, D]
    return by_lanes(both, 0.0).permute(0, 1, 3, 4, 2).flatten(2).contiguous().view(torch.uint8)


def page_bounds(k: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """lo, hi [R, M, D] over the visible slots [R, M, 16] of k [R, M, 16, D]; 0 where there are none."""
    seen, some = slots.unsqueeze(-1), slots.any(-1, keepdim=True)
    lo = k.masked_fill(~seen, INF).amin(2).masked_fill(~some, 0.0)
    return lo, k.masked_fill(~seen, -INF).amax(2).masked_fill(~some, 0.0)


def summary_bounds(blocks: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """lo, hi f32 [R, 16 B, D] of blocks u8 [R, B, 64 D] of kind bounds."""
    lines = blocks.contiguous().view(torch.bfloat16).view(*blocks.shape[:2], 2, dim, SLOTS).transpose(3, 4)
    lo, hi = (part.flatten(1, 2).float() for part in lines.unbind(2))
    return lo, hi


def summary_values(blocks: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes u8 [R, 16 B, D], scale f32 [R, 16 B] and slots i64 [R, 16 B] of the value means of blocks of kind mean_value."""
    rest = blocks[..., SLOTS * (dim + 12) :]
    codes = rest[..., : SLOTS * dim].reshape(len(blocks), -1, dim)
    facts = rest[..., SLOTS * dim :].contiguous()
    scale, slots = (part.flatten(1) for part in facts.view(torch.int32).view(*blocks.shape[:2], 2, SLOTS).unbind(2))
    return codes, scale.contiguous().view(torch.float32), slots.long()


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


def counts(visible: Tensor) -> Tensor:
    """Visible slots i64 [R, M] of masks u16 [R, M]."""
    return ((visible.to(torch.int64).unsqueeze(-1) >> torch.arange(SLOTS)) & 1).sum(-1)


def score_pages(
    q: Tensor,
    blocks: Tensor,
    visible: Tensor,
    scale: float | None = None,
    spread_weight: float = 1.0,
    kind: str = "mean",
    softcap: float = 0.0,
) -> Tensor:
    """x f64 [R, G, M] of queries q [R, G, D], not rotated, blocks u8 [R, >= ceil(M / 16), bytes], visible u16 [R, M].

    x = log of the page's estimated mass, or of kind bounds at least that of its mass; -inf where no slot is visible.
    """
    dim, entries = q.shape[-1], visible.shape[1]
    scale = dim**-0.5 if scale is None else scale
    if kind in PARTS:
        return split_scores(q, blocks, visible, scale, spread_weight, softcap)
    curved = torch.zeros(())
    if kind == "bounds":
        lo, hi = (part[:, :entries].double() for part in summary_bounds(blocks, dim))
        heads = (one.unsqueeze(1) for one in q.double().unbind(1))  # [R, 1, D]
        x = scale * torch.stack([torch.maximum(one * lo, one * hi).sum(-1) for one in heads], 1)
    else:
        codes, step, spread, _ = summary_codes(blocks[..., : SLOTS * (dim + 12)], dim)
        mean = (step.double().unsqueeze(-1) * (codes.double() - 128))[:, :entries]
        exact, delta = query_codes(q)
        rounded = delta.double().unsqueeze(-1) * torch.round(exact).clamp(-127, 127).double()
        square = (q.double() ** 2).sum(-1)
        x = scale * rounded @ mean.mT
        curved = 0.5 * spread_weight * scale**2 * torch.einsum("rg,rp->rgp", square, spread[:, :entries].double())
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    n = counts(visible).unsqueeze(1)
    return torch.where(n == 0, torch.full_like(x, -INF), x + curved + torch.log(n.clamp_min(1).double()))


def split_scores(
    q: Tensor, blocks: Tensor, visible: Tensor, scale: float, spread_weight: float, softcap: float
) -> Tensor:
    """x of kinds halves and quarters, as `score_pages` has it: the log of what the parts of a page sum to."""
    codes, step, spread, parts = (part[:, : visible.shape[1]] for part in summary_split(blocks, q.shape[-1]))
    exact, delta = query_codes(q)
    rounded = delta.double().unsqueeze(-1) * torch.round(exact).clamp(-127, 127).double()
    x = scale * torch.einsum("rgd,rmpd->rgmp", rounded, step.double().unsqueeze(-1) * codes.double())
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    square = (q.double() ** 2).sum(-1)
    x = x + 0.5 * spread_weight * scale**2 * torch.einsum("rg,rmp->rgmp", square, spread.double())
    seen = (visible.long().unsqueeze(-1) >> torch.arange(SLOTS)) & 1 == 1
    n = (parts & seen.unsqueeze(2)).sum(-1).unsqueeze(1)  # [R, 1, M, P]
    return torch.logsumexp(torch.where(n == 0, torch.full_like(x, -INF), x + n.clamp_min(1).double().log()), -1)


def page_votes(x: Tensor, lse_base: Tensor | None = None, aggregate: str = "sum") -> Tensor:
    """vote [R, M] of x [R, G, M]: each head's share of its mass, over the heads; lse_base [R, G]: what is read anyway."""
    z = torch.logsumexp(x, -1)
    if lse_base is not None:
        z = torch.logaddexp(z, lse_base.to(x.dtype))
    share = torch.where(x == -INF, torch.zeros((), dtype=x.dtype), torch.exp(x - z.unsqueeze(-1)))
    return share.amax(1) if aggregate == "max" else share.sum(1)


def select(
    x: Tensor,
    k: Tensor | int,
    lse_base: Tensor | None = None,
    aggregate: str = "sum",
    mass: float = 0.0,
    least: int = 0,
    others: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """entries i32 [R, max k], count i32 [R] and lse_rest [R, G] of x [R, G, M] (-inf: not to be selected), k [R].

    The k[r] entries of highest vote, ties the lower index, by rising index, then -1; and the log-sum-exp of the others. mass:
    the least number of them, from `least` on, that hold this share together with what is read anyway. others [R, G, n]: logits
    that count, but are not selected.
    """
    rows = x.shape[0]
    most = [k] * rows if isinstance(k, int) else k.tolist()
    whole = x if others is None else torch.cat([x, others.to(x.dtype)], -1)
    vote = page_votes(whole, lse_base, aggregate)[:, : x.shape[-1]]
    entries = torch.full((rows, max(most, default=0)), -1, dtype=torch.int32)
    count = torch.zeros(rows, dtype=torch.int32)
    rest = whole.clone()
    for r in range(rows):
        may = (x[r] != -INF).any(0).nonzero().flatten()
        order = may[torch.sort(vote[r, may], descending=True, stable=True).indices][: most[r]]
        if mass > 0:
            reached = held_mass(whole[r], vote[r], order, None if lse_base is None else lse_base[r]) >= mass
            reached[:least] = False
            order = order[: int(reached.to(torch.int8).argmax()) if reached.any() else len(order)]
        chosen = order.sort().values
        entries[r, : len(chosen)], count[r] = chosen.to(torch.int32), len(chosen)
        rest[r, :, chosen] = -INF
    return entries, count, torch.logsumexp(rest, -1)


def held_mass(x: Tensor, vote: Tensor, order: Tensor, lse_base: Tensor | None) -> Tensor:
    """Share [n + 1] of a row's mass, over its heads, in what is read anyway and the first 0..n entries of `order`; x [G, M]."""
    steady = torch.zeros((), dtype=x.dtype)
    if lse_base is not None:
        base = lse_base.to(x.dtype)
        share = torch.exp(base - torch.logaddexp(torch.logsumexp(x, -1), base))
        steady = share.nan_to_num(0.0).sum()  # of nothing at all: none
    held = torch.cat([steady.view(1), steady + vote[order].cumsum(0)])
    return held / len(x)


def zone(vote: Tensor, may: Tensor, selected: Tensor, most: int) -> Tensor:
    """Entries i32 [most] of highest vote [M] of those that may [M] and are not selected, ties the lower, rising, then -1."""
    here = may.clone()
    here[selected[selected >= 0].long()] = False
    left = here.nonzero().flatten()
    best = left[torch.sort(vote[left], descending=True, stable=True).indices][:most].sort().values
    out = torch.full((most,), -1, dtype=torch.int32)
    out[: len(best)] = best.to(torch.int32)
    return out


# --- estimate -------------------------------------------------------------------------------------------------------


def estimate(
    q: Tensor,
    blocks: Tensor,
    visible: Tensor,
    zone: Tensor,
    scale: float | None = None,
    spread_weight: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """out f64 [R, G, D], not rotated, and lse f64 [R, G] of the pages of zone i32 [R, E], -1 beyond the last.

    Each acts as one token whose logit is x of `score_pages` and whose value is its mean; not those whose summary was made
    from other slots than the visible ones.
    """
    dim, entries = q.shape[-1], visible.shape[1]
    x = score_pages(q, blocks, visible, scale, spread_weight, "mean_value", softcap)
    codes, step, slots = summary_values(blocks, dim)
    value = rotate(step.double().unsqueeze(-1) * (codes.double() - 128), inverse=True)[:, :entries]
    inside = torch.zeros(visible.shape, dtype=torch.bool)
    for r, listed in enumerate(zone):
        inside[r, listed[listed >= 0].long()] = True
    inside &= (slots[:, :entries] == visible.long()) & (visible.long() != 0)
    x = x.masked_fill(~inside.unsqueeze(1), -INF)
    lse = torch.logsumexp(x, -1)
    weight = torch.exp(x - lse.unsqueeze(-1)).masked_fill(~inside.unsqueeze(1), 0.0)
    return weight @ value.masked_fill(~inside.unsqueeze(-1), 0.0), lse
