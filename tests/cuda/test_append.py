"""append on CUDA, emulated, as the store calls it: tokens chosen along a strided axis, pools with and without positions."""

from __future__ import annotations

import ctypes

import pytest
import torch

SLOTS, DIM = 16, 32
F32, BF16 = 0, 1  # csrc/common/types.h, Format and DType


class PoolView(ctypes.Structure):
    """csrc/ops/pool_view.h, field by field."""

    _fields_ = (
        ("format", ctypes.c_uint8),
        ("n_slabs", ctypes.c_int32),
        ("stride", ctypes.c_int64),
        ("slabs", ctypes.POINTER(ctypes.c_void_p)),
        ("positions", ctypes.POINTER(ctypes.c_void_p)),
    )


class AppendRow(ctypes.Structure):
    """csrc/ops/append.h, field by field."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("position", ctypes.c_int32),
        ("positions", ctypes.c_void_p),
    )


class AppendParams(ctypes.Structure):
    """csrc/ops/append.h, field by field."""

    _fields_ = (
        ("rows", ctypes.POINTER(AppendRow)),
        ("n_rows", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8),
        ("pools", ctypes.POINTER(PoolView)),
        ("threads", ctypes.c_int32),
    )


@pytest.mark.parametrize("positions", ["none", "of no slab", "of the slab"])
def test_chosen_tokens(emulated_cuda: ctypes.CDLL, positions: str) -> None:
    g = torch.Generator().manual_seed(1)
    k, v = torch.randn(50, 3, DIM, generator=g), torch.randn(50, 3, DIM, generator=g)  # token, head, dim
    tokens = torch.randperm(50, generator=g)[:20].int()
    pages, slots = (torch.arange(20) // SLOTS).int(), (torch.arange(20) % SLOTS).to(torch.uint8)
    slab = torch.full((2, 2, SLOTS * DIM), float("nan"))  # f32 [pages, K then V, ...]
    held = torch.full((2, SLOTS), -7, dtype=torch.int32)
    of_slab = (ctypes.c_void_p * 1)(held.data_ptr() if positions == "of the slab" else None)
    pools = (PoolView * 8)()
    pools[0] = PoolView(F32, 1, slab[0].nbytes, (ctypes.c_void_p * 1)(slab.data_ptr()), of_slab)
    if positions == "none":
        pools[0].positions = None
    row = AppendRow(
        *(t[:, 1].data_ptr() for t in (k, v)),
        3 * DIM,
        3 * DIM,
        *(t.data_ptr() for t in (tokens, pages, slots)),
        20,
        100,
    )
    call = AppendParams(ctypes.pointer(row), 1, DIM, F32, pools, 1)
    assert emulated_cuda.kvstrata_cuda_append(ctypes.byref(call), ctypes.c_void_p(0)) == 0
    keys = slab[:, 0].view(2, DIM, SLOTS).transpose(1, 2).flatten(0, 1)[:20]
    values = slab[:, 1].view(2, SLOTS, DIM).flatten(0, 1)[:20]
    assert torch.equal(keys, k[tokens.long(), 1]) and torch.equal(values, v[tokens.long(), 1])
    want = torch.full((32,), -7, dtype=torch.int32)
    if positions == "of the slab":
        want[:20] = torch.arange(100, 120)
    assert torch.equal(held.flatten(), want)


@pytest.mark.parametrize(("field", "value", "reason"), [("head_dim", 513, "head_dim is not in"), ("dtype", 5, "dtype")])
def test_refusals(emulated_cuda: ctypes.CDLL, field: str, value: int, reason: str) -> None:
    call = AppendParams(None, 0, DIM, BF16, None, 1)
    setattr(call, field, value)
    assert emulated_cuda.kvstrata_cuda_append(ctypes.byref(call), ctypes.c_void_p(0)) == -1
    assert reason in emulated_cuda.kvstrata_cuda_last_error().decode()
