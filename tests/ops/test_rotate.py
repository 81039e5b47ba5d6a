"""rotate: orthonormal, its own inverse undone, and bit for bit the reference."""

from __future__ import annotations

import re

import pytest
import torch
from vectors import KINDS, vectors

from kvstrata import ops, reference

EMULATED = 1.0
DIMS = [32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512]  # of the acceptance list
ODD = [144, 176, 240, 336, 480, 496]
IDENTITY = 1e-6  # f32 sums of at most nine butterflies and one mix; measured below 7e-7


def test_signs() -> None:
    assert "".join("-+"[reference.splitmix64(d) % 2 == 0] for d in range(16)) == "--+-+++-+++---+-"


@pytest.mark.parametrize("dim", DIMS)
def test_identities(isa: str, dim: int) -> None:
    eye = torch.eye(dim)
    r = ops.rotate(eye).t()  # columns R e_d
    assert (r.double() @ r.double().t() - eye).abs().max() <= IDENTITY  # in f64: the product is not what is tested
    assert (ops.rotate(ops.rotate(eye), inverse=True) - eye).abs().max() <= IDENTITY
    assert (ops.rotate(ops.rotate(eye, inverse=True)) - eye).abs().max() <= IDENTITY
    assert (ops.rotate(eye, inverse=True) - r).abs().max() <= IDENTITY  # the inverse is the transpose


@pytest.mark.parametrize(("dim", "largest"), [(128, 1.0), (96, 1.155), (192, 1.155), (80, 1.342), (112, 1.89)])
def test_largest_entry(dim: int, largest: float) -> None:
    assert ops.rotate(torch.eye(dim)).abs().max() * dim**0.5 == pytest.approx(largest, abs=2e-3)


@pytest.mark.parametrize("dim", DIMS)
def test_exact_arithmetic_agrees(dim: int) -> None:
    x = vectors("gaussian", 8, dim)
    exact = reference.rotate(x.double())
    assert (reference.rotate(exact, inverse=True) - x.double()).abs().max() <= 1e-12
    assert (ops.rotate(x).double() - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dim", DIMS + ODD)
def test_same_bits_as_reference(isa: str, dim: int, inverse: bool) -> None:
    x = torch.cat([vectors(kind, 3, dim) for kind in KINDS])
    got, want = ops.rotate(x, inverse), reference.rotate(x, inverse)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0).view(torch.int32), want.nan_to_num(0.0).view(torch.int32))


@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (2, 3, 5, 64), (65, 64)])
def test_shapes(isa: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    before = x.clone()
    got = ops.rotate(x)
    assert got.shape == x.shape and torch.equal(x, before) and torch.equal(got, reference.rotate(x))
    assert ops.rotate(x, out=x) is x and torch.equal(x, got)


def test_threads(isa: str) -> None:
    x = torch.randn(1000, 96)
    one = ops.rotate(x, threads=1)
    assert all(torch.equal(one, ops.rotate(x, threads=n)) for n in (2, 3, 8))


def test_a_nan_stays_in_its_vector(isa: str) -> None:
    x = torch.randn(5, 160)
    x[2, 7] = float("nan")
    got = ops.rotate(x)
    assert got[2].isnan().all() and not got[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(2, 40), "rotate: head_dim is 40, expected a multiple of 16 in 32 to 512"),
        (torch.zeros(2, 16), "rotate: head_dim is 16, expected a multiple of 16 in 32 to 512"),
        (torch.zeros(2, 528), "rotate: head_dim is 528, expected a multiple of 16 in 32 to 512"),
        (torch.zeros(2, 64, dtype=torch.bfloat16), "rotate: x has dtype bf16, expected f32"),
        (torch.zeros(64, 2).t(), "rotate: strides of x, out are (1, 2), (1, 2), expected contiguous"),
        (torch.zeros(()), "rotate: out is [], x is [], expected [..., D] twice"),
    ],
)
def test_refusals(x: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        ops.rotate(x)


def test_out_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("rotate: out is [3, 64], x is [2, 64]")):
        ops.rotate(torch.zeros(2, 64), out=torch.zeros(3, 64))
