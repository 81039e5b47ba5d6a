"""Scores of stored tokens: what a window of queries saw, what keys look like, and the statistics over them."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from kvstrata.reference.attention import logits

INF = float("inf")


def window_read(
    slots: Tensor, positions: Tensor, q_pos: Tensor | None, queries: Tensor, width: int, window: int = 0
) -> Tensor:
    """Which slots each window query reads: bool [R, W, K, 16] from the visible slots and positions [R, K, 16].

    Those not later than q_pos [R, W] (None: all), less than `window` tokens older than it if that is > 0, and none for
    the queries from queries[r] on, which do not exist.
    """
    read = slots.unsqueeze(1).expand(-1, width, -1, -1).clone()
    if q_pos is not None:
        distance = q_pos.to(torch.int64)[..., None, None] - positions.to(torch.int64).unsqueeze(1)
        read &= distance >= 0
        if window > 0:
            read &= distance < window
    real = torch.arange(width).unsqueeze(0) < queries.unsqueeze(1)
    return read & real[..., None, None]


def shares(
    q: Tensor, k: Tensor, read: Tensor, scale: float | None = None, softcap: float = 0.0, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A [R, G, W, K, 16] = exp(z - lse), 0 where unread, and lse [R, G, W], of q [R, W, G, D] on k [R, K, 16, D]."""
    z = logits(q, k, read, 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale, softcap)
    none = torch.full((*z.shape[:3], 1), -INF, dtype=z.dtype)
    if sinks is not None:
        none = sinks.to(z.dtype)[..., None, None].expand_as(none)
    lse = torch.logsumexp(torch.cat([z.flatten(3), none], -1), -1)
    return torch.exp(z - lse[..., None, None]).masked_fill(z == -INF, 0.0), lse


def score_window(share: Tensor, queries: Tensor, spread: str = "none", weight: float = 0.0) -> Tensor:
    """[R, G, K, 16] of A [R, G, W, K, 16]: mean over the first queries[r] of t, plus weight times variance or std."""
    score = torch.zeros(share.shape[0], share.shape[1], *share.shape[3:], dtype=share.dtype)
    for r, count in enumerate(queries.tolist()):
        if count == 0:
            continue
        seen = share[r, :, :count]
        score[r] = seen.mean(1)
        if count > 1 and spread != "none":
            score[r] += weight * (seen.var(1) if spread == "variance" else seen.std(1))
    return score


def score_max(
    q: Tensor,
    lse: Tensor,
    spans: list[int],
    k: Tensor,
    slots: Tensor,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """[E, R, K, 16] of q [R, G, W, D], lse [R, G, W], k [R, K, 16, D] and the visible slots [R, K, 16]: the largest
    exp(z - lse) over the heads and the queries spans[e] to spans[e + 1]; 0 where there is none, or of lse -inf."""
    read = slots.unsqueeze(1).expand(-1, q.shape[2], -1, -1)
    z = logits(q.transpose(1, 2), k, read, 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale, softcap)
    p = torch.exp(z - lse[..., None, None]).masked_fill((lse == -INF)[..., None, None] | ~read.unsqueeze(1), 0.0)
    out = [p[:, :, a:b].amax((1, 2)) if a < b else torch.zeros_like(p[:, 0, 0]) for a, b in pairwise(spans)]
    return torch.stack(out)


def pool(
    score: Tensor, positions: Tensor, slots: Tensor, kernel: int, kind: str = "avg", divide: str = "present"
) -> Tensor:
    """[R, K, 16] of score [R, G, K, 16]: over visible slots with |pos - pos_i| <= kernel // 2, then mean over G."""
    out = torch.zeros(score.shape[0], *score.shape[2:], dtype=score.dtype)
    for r in range(score.shape[0]):
        at = positions[r][slots[r]].to(torch.int64)
        near = (at.unsqueeze(0) - at.unsqueeze(1)).abs() <= kernel // 2
        values = score[r][:, slots[r]]  # [G, n]
        around = values.unsqueeze(1).expand(-1, len(at), -1)
        if kind == "max":
            pooled = around.masked_fill(~near, -INF).amax(-1) if len(at) else values
        else:
            total = torch.where(near, around, torch.zeros((), dtype=score.dtype)).sum(-1)
            pooled = total / (near.sum(1) if divide == "present" else kernel)
        out[r][slots[r]] = pooled.mean(0)
    return out


def accumulate(score: Tensor, mass: Tensor, decay: float = 1.0, combine: str = "sum") -> None:
    """score = decay * score + mass, or max(decay * score, mass), in place."""
    old = decay * score
    score.copy_(torch.maximum(old, mass) if combine == "max" else old + mass)


def score_keys(k: Tensor, slots: Tensor, kind: str) -> Tensor:
    """[R, K, 16] of k [R, K, 16, D]: -|k|, or -cos(k, anchor), the anchor the mean of a row's visible k / |k|."""
    clean = torch.where(slots.unsqueeze(-1), k, torch.zeros((), dtype=k.dtype))
    size: Tensor = clean.norm(dim=-1)
    if kind == "norm":
        return -size
    unit = torch.where((size == 0).unsqueeze(-1), clean, clean / size.unsqueeze(-1))
    anchor = unit.sum((1, 2), keepdim=True)
    length = anchor.norm(dim=-1, keepdim=True)
    direction = torch.where(length == 0, anchor, anchor / length)
    cosine: Tensor = (unit * direction).sum(-1)
    return -cosine.masked_fill(~slots, 0.0)


def measure(share: Tensor, past: Tensor, queries: Tensor, stats: str = "sound") -> Tensor:
    """E, V, K [R, G, 3] of A [R, G, W, K, 16] over the slots `past` bool [R, K, 16].

    sound: p = A / sum of a query's A over them. code: A as it is, sums instead of shares.
    """
    out = torch.zeros(*share.shape[:2], 3, dtype=share.dtype)
    for r, count in enumerate(queries.tolist()):
        n = int(past[r].sum())
        if count == 0 or n == 0:
            continue
        seen = share[r, :, :count][:, :, past[r]]  # [G, T, n]
        for g in range(share.shape[1]):
            out[r, g] = torch.stack(_code(seen[g]) if stats == "code" else _sound(seen[g]))
    return out


def _code(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moved = a - a.mean(0)
    m2, m4 = (moved**2).mean(0), (moved**4).mean(0)
    variance = a.var(0).sum() if len(a) > 1 else torch.zeros((), dtype=a.dtype)
    return -(a * torch.log(a + 1e-10)).sum(), variance, (m4 / m2.clamp_min(1e-8) ** 2).sum()


def _sound(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    queries, n = a.shape
    total = a.sum(1, keepdim=True)
    p = n * torch.where(total == 0, a, a / total)
    moved = p - p.mean(0)
    m2, m4 = (moved**2).mean(0), (moved**4).mean(0)
    zero = torch.zeros((), dtype=a.dtype)
    entropy = -(torch.xlogy(p / n, p / n)).sum(1).mean()
    energy, spread = (p**2).mean(0).sum(), m2.sum()
    kappa = torch.where(m2 == 0, zero, m4 / m2).sum() / spread
    most = queries - 2 + 1 / max(queries - 1, 1)
    return (
        entropy / math.log(n) if n > 1 else zero,
        spread / energy if energy != 0 else zero,
        (kappa - 1) / (most - 1) if spread != 0 and most > 1 else zero,
    )
