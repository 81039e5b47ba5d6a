"""choose_states: equal to the reference, token by token. The rule itself: tests/policy/test_choose.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvstrata import ops, reference

EVICTED, FULL, INT8, INT4, INT2 = range(5)
NAN, INF = float("nan"), float("inf")
EMULATED = 0.6
SIZES = [0, 1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 255, 256, 257, 1000, 4099]
Rows = dict[str, Any]


def whole(g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=g)


def scores(g: torch.Generator, which: str, rows: int, columns: int) -> Tensor:
    if which == "mass":
        return torch.rand(rows, columns, generator=g) ** 8
    if which == "equal":
        return torch.full((rows, columns), 0.25)
    if which == "ties":
        return whole(g, -2, 3, rows, columns).float() * -0.5  # -0.0 and 0.0 among them
    if which == "not finite":
        some = torch.tensor([NAN, INF, -INF, -NAN, -3.4028235e38, 0.0, -0.0, 1e-45])
        return some[whole(g, 0, len(some), rows, columns)]
    bits = whole(g, -(2**31), 2**31, rows, columns)  # any float there is
    return bits.to(torch.int32).view(torch.float32)


def make(g: torch.Generator, which: str, columns: int, states: list[int], rows: int = 6) -> Rows:
    """Row 0 is empty, row 1 full and wholly movable, row 2 protected; the others ragged, with poison where no token is."""
    positions = torch.rand(rows, columns, generator=g).argsort(1).int() * 3
    gone = torch.arange(columns) >= whole(g, 0, columns + 1, rows, 1)
    gone |= whole(g, 0, 20, rows, columns) == 0
    gone[0], gone[1] = True, False
    positions[gone] = -1
    now = torch.tensor(states)[whole(g, 0, len(states), rows, columns)].to(torch.uint8)
    now[gone] = 77
    protect = whole(g, 0, 10, rows, columns) == 0
    protect[1], protect[2] = False, True
    score = scores(g, which, rows, columns)
    score[gone] = NAN
    most = columns // 16 + 2
    return {
        "score": score,
        "now": now,
        "positions": positions,
        "protect": protect,
        "full_pages": whole(g, 0, most, rows),
        "quant_pages": whole(g, 0, most, rows),
    }


def choose(rows: Rows, target: int, **more: Any) -> Tensor:
    out = torch.full(rows["positions"].shape, 99, dtype=torch.uint8)
    return ops.choose_states(**rows, quantized_state=target, out=out, **more)


@pytest.mark.parametrize("which", ["mass", "equal", "ties", "not finite", "bits"])
@pytest.mark.parametrize("states", [[FULL], [FULL, INT4], [EVICTED, FULL, INT8, INT4, INT2]], ids=str)
def test_is_the_reference(isa: str, which: str, states: list[int]) -> None:
    seen = set()
    for columns in SIZES:
        g = torch.Generator().manual_seed(columns)
        for target in (INT8, INT4, INT2):
            rows = make(g, which, columns, states)
            got = choose(rows, target)
            assert torch.equal(got, reference.choose_states(**rows, quantized_state=target)), (columns, target)
            seen |= set(got.flatten().tolist())
    assert seen >= {EVICTED, FULL, INT8, INT4, INT2}


@pytest.mark.parametrize("which", ["mass", "equal", "ties"])
def test_many_small_cuts_between_formats(device: str, which: str) -> None:
    """Every number of pages, of three formats whose ranks are mixed."""
    for columns in (40, 100, 700):
        g = torch.Generator().manual_seed(columns)
        rows = make(g, which, columns, [INT8, INT4, INT2], rows=columns // 16 + 5)
        rows["full_pages"][:] = 0
        rows["quant_pages"][:] = torch.arange(columns // 16 + 5)
        for target in (INT8, INT4):
            assert torch.equal(choose(rows, target), reference.choose_states(**rows, quantized_state=target))


@pytest.mark.parametrize("states", [[FULL], [INT8, INT4, INT2]], ids=str)
def test_one_position_twice_goes_to_the_lower_index(device: str, states: list[int]) -> None:
    for columns in (100, 1000):
        rows = make(torch.Generator().manual_seed(3), "equal", columns, states)
        rows["positions"] = torch.where(rows["positions"] < 0, -1, rows["positions"] % 4)
        assert torch.equal(choose(rows, INT8), reference.choose_states(**rows, quantized_state=INT8))


def test_room_for_everything_and_for_nothing(device: str) -> None:
    rows = make(torch.Generator().manual_seed(4), "mass", 300, [FULL, INT8])
    for full, quant in ((2**62, 0), (0, 2**62), (0, 0), (2**62, 2**62)):
        rows["full_pages"][:], rows["quant_pages"][:] = full, quant
        got = choose(rows, INT4)
        movable = (rows["positions"] >= 0) & ~rows["protect"]
        was_full = rows["now"] == FULL
        assert torch.equal(got == FULL, (rows["positions"] >= 0) & was_full & (~movable | (full > 0)))
        assert bool((got[movable & ~(was_full & (full > 0))] == (INT4 if quant else EVICTED)).all())


def test_bits_do_not_depend_on_threads_or_neighbours(device: str) -> None:
    rows = make(torch.Generator().manual_seed(5), "ties", 2000, [FULL, INT8, INT4], rows=9)
    once = choose(rows, INT8, threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(choose(rows, INT8, threads=threads), once)
    for r in range(9):
        assert torch.equal(choose({name: t[r : r + 1] for name, t in rows.items()}, INT8), once[r : r + 1])


def test_any_strides(device: str) -> None:
    """Rows of a wider tensor, one row for all, and columns that do not lie side by side."""
    rows = make(torch.Generator().manual_seed(6), "mass", 400, [FULL])
    rows["positions"] = rows["positions"][1:2].expand(6, -1)
    rows["now"].fill_(FULL)
    once = choose(rows, INT8)
    wide = {name: torch.cat([t, t], 1) if t.dim() == 2 else t for name, t in rows.items()}
    assert torch.equal(choose({n: t[:, :400] if t.dim() == 2 else t for n, t in wide.items()}, INT8), once)
    assert torch.equal(choose({n: t.T.contiguous().T if t.dim() == 2 else t for n, t in rows.items()}, INT8), once)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"score": torch.zeros(2, 3, dtype=torch.float64)}, "score has dtype torch.float64, expected one of"),
        ({"score": torch.zeros(2, 3, dtype=torch.float16)}, "score has dtype f16, expected f32"),
        ({"score": torch.zeros(2, 4)}, r"score is \[2, 4\], expected \[R=2, N=3\] \(set by positions\)"),
        ({"score": [1.0]}, "score is a list, expected a tensor"),
        ({"now": torch.zeros(2, 4, dtype=torch.uint8)}, r"now is \[2, 4\], expected \[R=2, N=3\]"),
        ({"now": torch.full((2, 3), 5, dtype=torch.uint8)}, r"now\[0, 0\] is 5, expected 0 to 4"),
        ({"protect": torch.zeros(2, 3, dtype=torch.uint8)}, "protect is torch.uint8, expected torch.bool"),
        ({"protect": torch.zeros(2, 2, dtype=torch.bool)}, r"protect is \[2, 2\], expected \[R=2, N=3\]"),
        ({"full_pages": torch.tensor([0, -1])}, r"full_pages\[1\] is -1, expected at least 0"),
        ({"quant_pages": torch.tensor([-3, 0])}, r"quant_pages\[0\] is -3, expected at least 0"),
        ({"quant_pages": torch.zeros(3, dtype=torch.int64)}, r"quant_pages is \[3\], expected \[R=2\]"),
        ({"quant_pages": torch.zeros(2, dtype=torch.int32)}, "quant_pages has dtype i32, expected i64"),
        ({"quantized_state": FULL}, r"quantized_state is 1, expected one of \[2, 3, 4\]"),
        ({"quantized_state": 258}, r"quantized_state is 258, expected one of \[2, 3, 4\]"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, r"positions is \[3\], expected \[R, N\]"),
        ({"positions": torch.zeros(2, 3, dtype=torch.int64)}, "positions has dtype i64, expected i32"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
    ],
)
def test_bad_input(change: Rows, expected: str) -> None:
    out = torch.full((2, 3), 99, dtype=torch.uint8)
    good = {
        "score": torch.zeros(2, 3),
        "now": torch.ones(2, 3, dtype=torch.uint8),
        "positions": torch.arange(3, dtype=torch.int32).expand(2, -1),
        "protect": torch.zeros(2, 3, dtype=torch.bool),
        "full_pages": torch.zeros(2, dtype=torch.int64),
        "quant_pages": torch.zeros(2, dtype=torch.int64),
        "quantized_state": INT4,
        "out": out,
    }
    with pytest.raises(ValueError, match=f"choose_states: {expected}"):
        ops.choose_states(**(good | change))
    assert (out == 99).all(), "nothing is written"
