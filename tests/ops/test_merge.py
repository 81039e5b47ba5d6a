"""merge: the reference, its laws, and what a part that takes no part may hold."""

from __future__ import annotations

import pytest
import torch
from tolerances import MERGE_ULP, OUT_BF16_OUTPUT, OUT_F16_OUTPUT, assert_close, assert_close_rows
from torch import Tensor

from kvstrata import ops, reference

INF, NAN = float("inf"), float("nan")
EMULATED = 0.5


def parts(count: int, n: int, dim: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    outs = [torch.randn(n, dim, generator=g) for _ in range(count)]
    lses = [4 * torch.randn(n, generator=g) for _ in range(count)]
    return outs, lses


@pytest.mark.parametrize("dim", [1, 7, 16, 17, 40, 64, 128, 333, 512])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 33])
def test_parity(isa: str, count: int, dim: int) -> None:
    outs, lses = parts(count, 19, dim, seed=dim)
    for j in range(count):  # parts without a slot, holding anything
        lses[j][j % 5] = -INF
        outs[j][j % 5] = NAN
    for t in lses:
        t[6] = -INF
    out, lse = ops.merge(outs, lses, out=torch.full((19, dim), NAN), lse=torch.full((19,), NAN))
    ref, ref_lse = reference.merge([o.double() for o in outs], [t.double() for t in lses])
    if dim >= 7:  # few elements may cancel to almost nothing
        assert_close_rows(out, ref, 8 * MERGE_ULP)
    assert_close(out, ref, 8 * MERGE_ULP)
    assert_close(lse, ref_lse, 2 * MERGE_ULP)
    assert torch.all(out[6] == 0) and lse[6] == -INF


@pytest.mark.parametrize("n", [0, 1, 3, 63, 64, 65, 1000])
def test_sizes_and_threads(isa: str, n: int) -> None:
    outs, lses = parts(3, n, 48)
    once = ops.merge(outs, lses, threads=1)
    for threads in (2, 3, 8):
        more = ops.merge(outs, lses, threads=threads)
        assert torch.equal(more[0], once[0]) and torch.equal(more[1], once[1])
    assert_close_rows(once[0], reference.merge(outs, lses)[0], 8 * MERGE_ULP)


def test_shapes(isa: str) -> None:
    outs, lses = parts(2, 24, 16)
    flat = ops.merge(outs, lses)
    deep = ops.merge([o.view(2, 3, 4, 16) for o in outs], [t.view(2, 3, 4) for t in lses])
    assert torch.equal(deep[0].view(24, 16), flat[0]) and torch.equal(deep[1].view(24), flat[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, OUT_BF16_OUTPUT), (torch.float16, OUT_F16_OUTPUT)])
def test_output_types(isa: str, dtype: torch.dtype, tolerance: float) -> None:
    outs, lses = parts(3, 20, 40)
    exact = ops.merge(outs, lses)[0]
    out = ops.merge(outs, lses, out=torch.full((20, 40), NAN, dtype=dtype))[0]
    assert torch.equal(out, exact.to(dtype))
    assert_close_rows(out, exact, tolerance)


def test_result_may_take_the_place_of_the_first_part(isa: str) -> None:
    outs, lses = parts(3, 200, 40)
    fresh = ops.merge(outs, lses)
    place = ops.merge(outs, lses, out=outs[0], lse=lses[0], threads=3)
    assert place[0] is outs[0] and torch.equal(outs[0], fresh[0]) and torch.equal(lses[0], fresh[1])


def test_identity(isa: str) -> None:
    """(0, -inf) changes nothing, nor does being alone: bit for bit."""
    (a,), (x,) = parts(1, 50, 40)
    nothing, never = torch.zeros(50, 40), torch.full((50,), -INF)
    for outs, lses in (([a], [x]), ([a, nothing], [x, never]), ([nothing, a], [never, x])):
        out, lse = ops.merge(outs, lses)
        assert torch.equal(out, a) and torch.equal(lse, x)


def test_commutes_and_associates(isa: str) -> None:
    outs, lses = parts(3, 100, 64)
    (a, b, c), (x, y, z) = outs, lses

    def close(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor], count: int) -> None:
        size = reference.merge([t.abs() for t in outs[:count]], lses[:count])[0]  # ulps of the terms: sums may cancel
        assert ((p[0] - q[0]).abs() / size).max() <= MERGE_ULP
        assert_close(p[1], q[1], MERGE_ULP)

    close(ops.merge([a, b], [x, y]), ops.merge([b, a], [y, x]), 2)
    ab, bc = ops.merge([a, b], [x, y]), ops.merge([b, c], [y, z])
    whole = ops.merge(outs, lses)
    close(ops.merge([ab[0], c], [ab[1], z]), whole, 3)
    close(ops.merge([a, bc[0]], [x, bc[1]]), whole, 3)


def test_far_apart_weights(isa: str) -> None:
    outs, _ = parts(2, 4, 16)
    lses = [torch.tensor([0.0, 3e38, -3e38, 100.0]), torch.tensor([-200.0, -3e38, 3e38, 100.0])]
    out, lse = ops.merge(outs, lses)
    assert torch.equal(out[:3], torch.stack([outs[0][0], outs[0][1], outs[1][2]]))
    assert torch.equal(lse[:3], torch.tensor([0.0, 3e38, 3e38]))


@pytest.mark.parametrize("where", ["out", "lse"])
def test_nan_shows_in_its_own_result_only(isa: str, where: str) -> None:
    outs, lses = parts(3, 30, 40)
    clean = ops.merge(outs, lses)
    if where == "out":
        outs[1][7] = NAN
    else:
        lses[1][7] = NAN
    out, lse = ops.merge(outs, lses)
    assert out[7].isnan().all()
    if where == "lse":
        assert lse[7].isnan()
    others = torch.arange(30) != 7
    assert torch.equal(out[others], clean[0][others]) and torch.equal(lse[others], clean[1][others])
