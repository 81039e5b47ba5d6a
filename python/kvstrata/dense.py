"""Dense attention of a prompt chunk over its own keys and values, with its log-sum-exp.

torch's SDPA where it applies, on CUDA flash-attn where that is installed; where a soft-cap or a sliding window rules it out,
the same in blocks of queries.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

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
        return _on_cuda(q, k, v, scale) if q.is_cuda else _sdpa(q, k, v, scale)
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


def _on_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """flash-attn, else torch's copy of it, which both know groups of heads; what it does not take, the efficient kernel."""
    heads, d = q.shape[2:]
    if q.dtype not in (torch.float16, torch.bfloat16) or d % 8 or d > 256:
        wide = (q.transpose(1, 2), _expand(k, heads), _expand(v, heads))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*wide, None, True, 0.0, True, scale=scale)
        lse = lse[:, :, : q.shape[1]]  # its rows are padded
        out = out.transpose(1, 2)
    elif (flash := _flash_attn()) is not None:
        out, lse, _ = flash.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, return_attn_probs=True)
    else:
        rows = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*rows, 0.0, True, scale=scale)
        out = out.transpose(1, 2)
    return out.float().contiguous(), lse.float().transpose(1, 2).contiguous()


@cache
def _flash_attn() -> Any:
    """The package, or None."""
    return None if importlib.util.find_spec("flash_attn") is None else importlib.import_module("flash_attn")


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
