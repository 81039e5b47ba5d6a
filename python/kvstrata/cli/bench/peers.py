"""Other attention kernels beside ours, where they are installed: on CUDA, for queries of 16 bits."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvstrata.cli.bench.clock import Call, Clock
from kvstrata.cli.bench.common import SLOTS, Filled

NAMES = ("flashinfer", "flash_attn")
WORKSPACE = 128 << 20
"""Bytes that FlashInfer's documentation gives a decode."""


def peers(clock: Clock, q: Tensor, data: list[Filled]) -> dict[str, Call]:
    """Calls by name of those that are here and take q [R, T, G, D]: over the same keys and values, as each wants them laid
    out. A peer that fails fails the bench: its number would be missed otherwise."""
    if clock.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return {}
    found = {}
    if find_spec("flash_attn") is not None:
        found["flash_attn"] = _flash_attn(q, data)
    if find_spec("flashinfer") is not None and q.shape[1] == 1:
        found["flashinfer"] = _flashinfer(q, data)
    return found


def _flash_attn(q: Tensor, data: list[Filled]) -> Call:
    """Dense keys and values, one sequence of R KV heads."""
    attend: Any = importlib.import_module("flash_attn").flash_attn_with_kvcache
    rows, queries, group, dim = q.shape
    mine = q.transpose(0, 1).reshape(1, queries, rows * group, dim).contiguous()
    stored = [tuple(t.unsqueeze(0).transpose(1, 2) for t in (d.k, d.v)) for d in data]
    return lambda i: attend(mine, *stored[i % len(stored)])


def _flashinfer(q: Tensor, data: list[Filled]) -> Call:
    """Pages of 16 tokens in random places, R sequences of one KV head."""
    library: Any = importlib.import_module("flashinfer")
    rows, _, group, dim = q.shape
    tokens, device = data[0].k.shape[1], q.device
    space = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    call = library.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=group >= 4)
    first = torch.arange(rows + 1, dtype=torch.int32, device=device) * (tokens // SLOTS)
    places = torch.randperm(rows * tokens // SLOTS, device=device).to(torch.int32)
    last = torch.full((rows,), SLOTS, dtype=torch.int32, device=device)
    call.plan(first, places, last, group, 1, dim, SLOTS, q_data_type=q.dtype, kv_data_type=q.dtype)
    stored = [tuple(t.view(-1, SLOTS, 1, dim) for t in (d.k, d.v)) for d in data]
    one = q[:, 0].contiguous()
    return lambda i: call.run(one, stored[i % len(stored)])
