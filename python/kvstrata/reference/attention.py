"""Attention over canonical k, v [R, K, 16, D] of each row's page list."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SLOTS = 16
INF = float("inf")


def visible_slots(pages: Tensor, visible: Tensor | None) -> Tensor:
    """bool [R, K, 16] from page ids i32 [R, K] and masks u16 [R, K] (None: all)."""
    bits = torch.full(pages.shape, 0xFFFF) if visible is None else visible.to(torch.int64)
    slots = (bits.unsqueeze(-1) >> torch.arange(SLOTS)) & 1
    return (slots == 1) & (pages >= 0).unsqueeze(-1)


def readable(
    slots: Tensor,
    queries: int,
    own: Tensor | None = None,
    tree: Tensor | None = None,
    window: int = 0,
    q_pos: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Which slots each query may read: bool [R, T, K, 16] from the visible slots [R, K, 16].

    The last own[r] visible slots are the call's tokens j = 0, 1, ...; query t reads those with j <= t, or those whose bit
    is set in tree [R, T]. A window leaves only slots with q_pos [R, T] - positions [R, K, 16] < window.
    """
    rows, entries = slots.shape[:2]
    read = slots.unsqueeze(1).expand(rows, queries, entries, SLOTS).clone()
    if own is not None:
        flat = slots.reshape(rows, -1)
        rank = flat.cumsum(1) - 1
        token = rank - (flat.sum(1, keepdim=True) - own.to(torch.int64).unsqueeze(1))  # negative: an earlier token
        token = token.view(rows, 1, entries, SLOTS)
        query = torch.arange(queries).view(1, queries, 1, 1)
        if tree is None:
            allowed = token <= query
        else:
            bits = tree.view(torch.int64).view(rows, queries, 1, 1) >> token.clamp(0, 63)
            allowed = (token < 0) | (bits & 1 == 1)
        read &= allowed
    if window > 0:
        assert q_pos is not None and positions is not None
        distance = q_pos.to(torch.int64).view(rows, queries, 1, 1) - positions.to(torch.int64).unsqueeze(1)
        read &= distance < window
    return read


def logits(
    q: Tensor, k: Tensor, read: Tensor, scale: float, softcap: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """z [R, G, T, K, 16] of q [R, T, G, D] on k [R, K, 16, D]; -inf where `read` [R, T, K, 16] is false."""
    clean = torch.where(read.any(1).unsqueeze(-1), k, torch.zeros((), dtype=k.dtype))
    z = scale * torch.einsum("rtgd,rksd->rgtks", q, clean)
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    if bias is not None:
        z = z + bias[:, None, None].to(z.dtype)
    return z.masked_fill(~read.unsqueeze(1), -INF)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Tensor,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [R, T, G, D], lse [R, T, G] of q [R, T, G, D] over k, v [R, K, 16, D] where `read` [R, T, K, 16]; sinks [R, G]."""
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    z = logits(q, k, read, factor, softcap, bias)
    rows, group, queries = z.shape[:3]
    flat = z.reshape(rows, group, queries, -1)
    if sinks is not None:
        flat = torch.cat([flat, sinks.to(z.dtype).view(rows, group, 1, 1).expand(-1, -1, queries, 1)], dim=-1)
    else:
        flat = torch.cat([flat, torch.full((rows, group, queries, 1), -INF, dtype=z.dtype)], dim=-1)
    lse = torch.logsumexp(flat, dim=-1)
    p = torch.exp(z - lse[..., None, None]).masked_fill(z == -INF, 0.0)
    clean = torch.where(read.any(1).unsqueeze(-1), v, torch.zeros((), dtype=v.dtype))
    out = torch.einsum("rgtks,rksd->rtgd", p, clean)
    return out, lse.transpose(1, 2)


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """out [..., D], lse [...] of parts with outs [..., D] and lses [...]."""
    weight = torch.stack(list(lses))
    most = weight.amax(0)
    base = torch.where(most == -INF, torch.zeros_like(most), most)
    w = torch.exp(weight - base)
    parts = torch.where((weight == -INF).unsqueeze(-1), torch.zeros((), dtype=outs[0].dtype), torch.stack(list(outs)))
    total = w.sum(0)
    out = (w.unsqueeze(-1) * parts).sum(0) / total.clamp_min(torch.finfo(total.dtype).tiny).unsqueeze(-1)
    return out, base + torch.log(total)


def mass(z: Tensor, lse: Tensor, reduce: str = "sum") -> Tensor:
    """[R, K, 16] of logits z [R, G, T, K, 16] and lse [R, T, G]: exp(z - lse), reduced over G and T."""
    weight = lse.transpose(1, 2)[..., None, None]
    share = torch.exp(z - weight).masked_fill((z == -INF) | (weight == -INF), 0.0)
    if reduce == "max":
        return share.amax((1, 2))
    return share.mean((1, 2)) if reduce == "mean" else share.sum((1, 2))
