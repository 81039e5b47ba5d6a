"""chunk_order: equal to the reference. Against a direct sort: tests/budget/test_knapsack.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstrata import ops, reference

NAN, INF = float("nan"), float("inf")
EMULATED = 0.3
SIZES = [0, 1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 257, 1000, 4099]


def values(g: torch.Generator, which: str, *shape: int) -> Tensor:
    if which == "mass":
        return torch.rand(*shape, generator=g) ** 8
    if which == "equal":
        return torch.full(shape, 0.25)
    if which == "ties":
        return torch.tensor([-0.0, 0.0, 0.5, 1.0])[torch.randint(0, 4, shape, generator=g)]
    if which == "not finite":
        some = torch.tensor([NAN, -NAN, INF, 3.4e38, 0.0, -0.0, 1e-45])
        return some[torch.randint(0, len(some), shape, generator=g)]
    return torch.randint(-(2**31), 2**31, shape, generator=g).to(torch.int32).view(torch.float32)  # any float there is


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0))


@pytest.mark.parametrize("order", ["in order", "shuffled", "one position"])
@pytest.mark.parametrize("which", ["mass", "equal", "ties", "not finite", "bits"])
def test_is_the_reference(device: str, which: str, order: str) -> None:
    for columns in SIZES:
        g = torch.Generator().manual_seed(columns)
        value = values(g, which, 5, columns)
        kind = torch.randint(0, 4, (5, columns), generator=g).to(torch.uint8)
        kind[0], kind[1], kind[2] = 0, 1, torch.arange(columns) % 256
        pos = torch.arange(columns, dtype=torch.int32).repeat(5, 1)
        if order == "shuffled":
            pos = torch.rand(5, columns, generator=g).argsort(1).int() * 5 - 7
        elif order == "one position":
            pos = torch.zeros_like(pos)
        same(ops.chunk_order(value, kind, pos), reference.chunk_order(value, kind, pos))


def test_no_rows_and_the_most_chunks(device: str) -> None:
    none = torch.zeros(0, 5)
    same(
        ops.chunk_order(none, none.to(torch.uint8), none.int()),
        reference.chunk_order(none, none.to(torch.uint8), none.int()),
    )
    kind = (
        torch.arange(1, 256).repeat_interleave(17).to(torch.uint8).unsqueeze(0)
    )  # 255 kinds of one chunk and one token
    value = torch.rand(kind.shape)
    got = ops.chunk_order(value, kind, torch.zeros(kind.shape, dtype=torch.int32))
    assert int(got[2]) == 510 and got[1].shape == (1, 510)
    same(got, reference.chunk_order(value, kind, torch.zeros(kind.shape, dtype=torch.int32)))


def test_bits_do_not_depend_on_threads_neighbours_or_strides(device: str) -> None:
    g = torch.Generator().manual_seed(1)
    value, kind = values(g, "mass", 9, 700), torch.randint(0, 3, (9, 700), generator=g).to(torch.uint8)
    pos = torch.randperm(700, generator=g).int().expand(9, -1)
    once = ops.chunk_order(value, kind, pos, threads=1)
    for threads in (2, 3, 16):
        same(ops.chunk_order(value, kind, pos, threads=threads), once)
    same(ops.chunk_order(value.T.contiguous().T, kind.T.contiguous().T, pos), once)
    for r in range(9):
        order, w, items = ops.chunk_order(*(t[r : r + 1] for t in (value, kind, pos)))
        assert torch.equal(order[0], once[0][r]) and torch.equal(w[0], once[1][r, : int(items)])


def test_bad_input() -> None:
    value, kind, pos = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"chunk_order: value is \[3\], expected \[R, N\]"):
        ops.chunk_order(value[0], kind, pos)
    with pytest.raises(ValueError, match="chunk_order: value has dtype f16, expected f32"):
        ops.chunk_order(value.half(), kind, pos)
    with pytest.raises(ValueError, match=r"chunk_order: kind is \[2, 2\], expected \[R=2, N=3\] \(set by value\)"):
        ops.chunk_order(value, kind[:, :2], pos)
    with pytest.raises(ValueError, match="chunk_order: pos has dtype i64, expected i32"):
        ops.chunk_order(value, kind, pos.long())
    with pytest.raises(ValueError, match="chunk_order: value is a list, expected a tensor"):
        ops.chunk_order([1.0], kind, pos)  # type: ignore[arg-type]
