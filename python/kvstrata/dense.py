"""Dense attention of a prompt chunk over its own keys and values, with its log-sum-exp.

torch's SDPA where it applies; where a soft-cap or a sliding window rules it out, the same in blocks of queries.
"""

from __future__ import annotations

import torch

QUERY_BLOCK = 128
"""Queries per block of the general path: bounds its scratch to block * keys per head."""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float = 0.0, window: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a chunk with itself.

    q: [B, T, Hq, D]; k, v: [B, T, H, D], any strides. Returns out f32 [B, T, Hq, D] and lse f32 [B, T, Hq], contiguous.
    """
    if softcap == 0.0 and (window is None or window >= q.shape[1]):
        return _sdpa(q, k, v, scale)
    return _blocks(q, k, v, scale, softcap, window)


def join_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds each head's sink logit (f32 [Hq]) to a finished result: a token without a value. In place on ``out``."""
    joined = torch.logaddexp(lse, sinks.to(lse.dtype))
    out.mul_((lse - joined).exp().nan_to_num_(0.0).unsqueeze(-1))
    return out, joined


def _expand(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, H, D] -> [B, heads, T, D], each KV head repeated for its group."""
    b, t, h, d = x.shape
    return x.transpose(1, 2).unsqueeze(2).expand(b, h, heads // h, t, d).reshape(b, heads, t, d)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One call per KV head, so that no key is repeated in memory for its group."""
    b, t, heads, d = q.shape
    group = heads // k.shape[2]
    out = torch.empty(b, t, heads, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(b, t, heads, dtype=torch.float32, device=q.device)
    for h in range(k.shape[2]):
        mine = slice(h * group, (h + 1) * group)
        keys, values = (x[:, :, h : h + 1].transpose(1, 2).expand(b, group, t, d) for x in (k, v))
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, mine].transpose(1, 2), keys, values, 0.0, True, scale=scale
        )
        out[:, :, mine], lse[:, :, mine] = part.transpose(1, 2), part_lse.transpose(1, 2)
    return out, lse


def _blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    b, t, heads, d = q.shape
    keys, values = _expand(k, heads).float(), _expand(v, heads).float()
    out = torch.empty(b, t, heads, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(b, t, heads, dtype=torch.float32, device=q.device)
    for start in range(0, t, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, t)
        first = 0 if window is None else max(0, start - window + 1)
        z = q[:, start:stop].transpose(1, 2).float() @ keys[:, :, first:stop].mT * scale
        if softcap > 0.0:
            z = (z / softcap).tanh() * softcap
        ahead = torch.arange(start, stop).unsqueeze(1) - torch.arange(first, stop)
        hidden = ahead < 0 if window is None else (ahead < 0) | (ahead >= window)
        z = z.masked_fill(hidden.to(q.device), -torch.inf)
        block = z.logsumexp(-1)
        lse[:, start:stop] = block.transpose(1, 2)
        out[:, start:stop] = ((z - block.unsqueeze(-1)).exp() @ values[:, :, first:stop]).transpose(1, 2)
    return out, lse
