"""Dense attention of a chunk with itself, and its log-sum-exp, against the formula."""

from __future__ import annotations

import pytest
import torch

from kvstrata import dense

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # of inputs rounded to the type


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 20])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, None), (0.0, 40), (0.0, 200), (5.0, None)])
def test_is_causal_attention(device: str, dtype: torch.dtype, dim: int, softcap: float, window: int | None) -> None:
    g = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(2, 150, heads, dim, generator=g).to(dtype) for heads in (6, 2, 2))
    out, lse = (x.cpu() for x in dense.attend(*(x.to(device) for x in (q, k, v)), dim**-0.5, softcap, window))
    keys, values = (x.double().repeat_interleave(3, 2) for x in (k, v))
    z = torch.einsum("bthd,bshd->bhts", q.double(), keys) * dim**-0.5
    z = (z / softcap).tanh() * softcap if softcap else z
    ahead = torch.arange(150)[:, None] - torch.arange(150)
    z = z.masked_fill((ahead < 0) | (ahead >= (window or 1000)), -torch.inf)
    expected = torch.einsum("bhts,bshd->bthd", z.softmax(-1), values)
    assert out.dtype == lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), z.logsumexp(-1).transpose(1, 2), rtol=1e-3, atol=TOLERANCE[dtype])
