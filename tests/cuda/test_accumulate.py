"""accumulate on CUDA, emulated, against its formula (csrc/ops/accumulate.h): bit for bit."""

from __future__ import annotations

import ctypes

import pytest
import torch


class AccumulateParams(ctypes.Structure):
    """csrc/ops/accumulate.h, field by field."""

    _fields_ = (
        ("score", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("decay", ctypes.c_float),
        ("combine", ctypes.c_uint8),
        ("threads", ctypes.c_int32),
    )


@pytest.mark.parametrize("combine", ["sum", "max"])
@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 2500])
def test_formula(emulated_cuda: ctypes.CDLL, n: int, combine: str) -> None:
    g = torch.Generator().manual_seed(n)
    score, mass = torch.randn(n + 1, generator=g), torch.randn(n + 1, generator=g)
    if n > 2:
        score[0], mass[1] = float("nan"), float("nan")
    decayed = torch.tensor(0.75) * score
    want = decayed + mass if combine == "sum" else torch.where((mass > decayed) | mass.isnan(), mass, decayed)
    want[n] = score[n]  # not asked for
    call = AccumulateParams(score.data_ptr(), mass.data_ptr(), n, 0.75, combine == "max", 1)
    assert emulated_cuda.kvstrata_cuda_accumulate(ctypes.byref(call), ctypes.c_void_p(0)) == 0
    assert torch.equal(score.nan_to_num(77.0), want.nan_to_num(77.0))
