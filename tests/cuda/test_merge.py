"""merge on CUDA against its formula (csrc/ops/merge.h) in float64."""

from __future__ import annotations

import ctypes

import pytest
import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/types.h
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # f32 order; one output rounding


class MergeParams(ctypes.Structure):
    """csrc/ops/merge.h, field by field."""

    _fields_ = (
        ("outs", ctypes.POINTER(ctypes.c_void_p)),
        ("lses", ctypes.POINTER(ctypes.c_void_p)),
        ("parts", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("head_dim", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_uint8),
        ("lse", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
    )


def params(outs: list[torch.Tensor], lses: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor | None):
    pointers = ctypes.c_void_p * max(len(outs), 1)
    return MergeParams(
        pointers(*[o.data_ptr() for o in outs]),
        pointers(*[x.data_ptr() for x in lses]),
        len(outs),
        out.shape[0],
        out.shape[1],
        out.data_ptr(),
        DTYPES[out.dtype],
        None if lse is None else lse.data_ptr(),
        1,
    )


def merge(cuda: ctypes.CDLL, outs, lses, dtype=torch.float32):
    """outs: J of f32 [N, D]; lses: J of f32 [N] -> out [N, D] of dtype, lse f32 [N]."""
    out = torch.full(outs[0].shape, float("nan"), dtype=dtype, device="cuda")
    lse = torch.full(lses[0].shape, float("nan"), device="cuda")
    call = params(outs, lses, out, lse)
    stream = torch.cuda.current_stream().cuda_stream
    code = cuda.kvstrata_cuda_merge(ctypes.byref(call), ctypes.c_void_p(stream))
    assert code == 0, cuda.kvstrata_cuda_last_error().decode()
    torch.cuda.synchronize()
    return out, lse


def expected(outs, lses):
    lse = torch.stack(lses).double()
    top = lse.max(0).values
    weights = (lse - torch.where(top.isinf(), torch.zeros_like(top), top)).exp()
    total = weights.sum(0)
    values = torch.stack(outs).double().masked_fill((lse == -torch.inf)[..., None], 0.0)
    out = (weights[..., None] * values).sum(0) / total.clamp_min(1e-300)[..., None]
    return out, top + total.log()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 31, 64, 80, 128, 512])
@pytest.mark.parametrize("parts", [1, 2, 7, 128])
def test_formula(cuda: ctypes.CDLL, parts: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(parts * 1000 + dim)
    outs = [torch.randn(37, dim, device="cuda") for _ in range(parts)]
    lses = [torch.randn(37, device="cuda") * 5 for _ in range(parts)]
    lses[0][::5] = -torch.inf
    outs[0][::5] = float("nan")  # takes no part, whatever it holds
    out, lse = merge(cuda, outs, lses, dtype)
    want, want_lse = expected(outs, lses)
    torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    again, _ = merge(cuda, outs, lses, dtype)
    assert torch.equal(out.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.cuda
def test_empty_alias_and_nan(cuda: ctypes.CDLL) -> None:
    outs = [torch.randn(4, 96, device="cuda") for _ in range(2)]
    lses = [torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")]
    lses[0][1] = lses[1][1] = -torch.inf
    lses[1][2] = float("nan")
    want, _ = merge(cuda, outs, lses)
    assert torch.all(want[1] == 0) and torch.all(want[2].isnan())
    assert torch.equal(want[0], (outs[0][0] + outs[1][0]) / 2) and not want[3].isnan().any()
    call = params(outs, lses, outs[0], lses[0])
    assert cuda.kvstrata_cuda_merge(ctypes.byref(call), ctypes.c_void_p(0)) == 0
    torch.cuda.synchronize()
    assert torch.equal(outs[0].nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula_emulated(emulated_cuda: ctypes.CDLL, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(7)
    outs = [torch.randn(13, 80, generator=g) for _ in range(3)]
    lses = [torch.randn(13, generator=g) * 5 for _ in range(3)]
    lses[0][::5] = -torch.inf
    outs[0][::5] = float("nan")
    out, lse = torch.full((13, 80), float("nan"), dtype=dtype), torch.full((13,), float("nan"))
    assert emulated_cuda.kvstrata_cuda_merge(ctypes.byref(params(outs, lses, out, lse)), ctypes.c_void_p(0)) == 0
    want, want_lse = expected(outs, lses)
    torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("parts", 0, "parts is not in 1..128"),
        ("parts", 129, "parts is not in 1..128"),
        ("head_dim", 513, "head_dim is not in 1..512"),
        ("n", -1, "n is not in"),
        ("out_dtype", 3, "out_dtype is not f32, bf16 or f16"),
    ],
)
def test_refusals_need_no_device(cuda: ctypes.CDLL, field: str, value: int, reason: str) -> None:
    out, lse = torch.zeros(2, 8), torch.zeros(2)
    call = params([out], [lse], out, lse)
    setattr(call, field, value)
    assert cuda.kvstrata_cuda_merge(ctypes.byref(call), ctypes.c_void_p(0)) == -1
    assert reason in cuda.kvstrata_cuda_last_error().decode()
