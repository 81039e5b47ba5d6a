"""compact: slots between pages of one format, byte for byte."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import poisoned_pools
from torch import Tensor
from vectors import POISON, SLOTS, ragged_moves

from kvstrata import ops, reference

EMULATED = 1.0
FORMATS = [*ops.FORMATS, *ops.QUANTIZED]
CASES = [(f, d) for f in FORMATS for d in (32, 80, 128)] + [("f32", 17), ("bf16", 17), ("f16", 1), ("int4", 512)]


def slots_of(pool: ops.Pool, slab: int) -> list[Tensor]:
    """The canonical contents of a slab's pages, slots in dimension 1."""
    padded = reference.padded(pool.head_dim)
    k, v, *scales = reference.unpack(pool.payload(slab), pool.format, padded)
    return [k.clone(), v.clone(), *[s.permute(0, 3, 1, 2).clone() for s in scales], pool.positions(slab).clone()]


def random_pool(fmt: str, dim: int, pages: int) -> ops.Pool:
    """Two slabs of any bits, NaNs among them."""
    pool = ops.Pool.allocate(fmt, dim, pages, 2)
    g = torch.Generator().manual_seed(dim)
    for slab in pool.slabs:
        slab.copy_(torch.randint(0, 256, slab.shape, generator=g))
    return pool


def as_bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


@pytest.mark.parametrize(("fmt", "dim"), CASES)
def test_slots_anywhere(isa: str, fmt: str, dim: int) -> None:
    """From slab 1 to slab 0: scattered slots, a whole page, a page in another order, skipped moves that hold anything."""
    pool = random_pool(fmt, dim, 6)
    g = torch.Generator().manual_seed(1)
    moves = [[i, s, 0, s] for i in (4,) for s in range(SLOTS)]
    moves += [[2, 15 - s, 5, s] for s in range(SLOTS)]
    for slot in torch.randperm(SLOTS, generator=g)[:7].tolist():
        source = torch.randint(0, 6 * SLOTS, (1,), generator=g).item()
        moves.append([source // SLOTS, source % SLOTS, 3, slot])
    want = slots_of(pool, 0)
    for source, target in zip(slots_of(pool, 1), want, strict=True):
        reference.compact(as_bits(source), as_bits(target), torch.tensor(moves))
    ids = [[ops.make_page(1, 1, a), b, ops.make_page(1, 0, c), d] for a, b, c, d in moves]
    for at in (0, 20, 40):
        ids[at:at] = [[-1, 99, ids[at][2], 3], [1 << 30, 0, -1, -4]]
    pools = [ops.Pool.allocate("f32", dim, 1), pool]
    before = pool.slabs[1].clone()
    ops.compact(torch.tensor(ids).int(), pools)
    for got, expected in zip(slots_of(pool, 0), want, strict=True):
        assert torch.equal(as_bits(got), as_bits(expected))
    assert torch.equal(pool.slabs[1], before)


@pytest.mark.parametrize("fmt", FORMATS)
def test_pages_begin_anywhere_in_the_list(isa: str, fmt: str) -> None:
    pool = random_pool(fmt, 32, 40)
    moves = ragged_moves(40, 40 * SLOTS, seed=3)
    want = slots_of(pool, 0)
    for source, target in zip(slots_of(pool, 1), want, strict=True):
        reference.compact(as_bits(source), as_bits(target), torch.tensor(moves))
    ids = [[a if a < 0 else a | 1 << 16, b, c, d] for a, b, c, d in moves]
    ops.compact(torch.tensor(ids).int(), [pool])
    for got, expected in zip(slots_of(pool, 0), want, strict=True):
        assert torch.equal(as_bits(got), as_bits(expected))


def test_a_pool_of_another_head_dim_beside(isa: str) -> None:
    """Where ids are read, what is not named does not matter; elsewhere every pool has to be of the call's head dim."""
    pools = [ops.Pool.allocate("f32", 8, 1), *poisoned_pools(("f32",), 64, 2, 1)]
    move = torch.tensor([[1 << 28, 0, 1 << 28 | 1, 0]]).int()
    if isa in ("emulated", "cuda"):
        with pytest.raises(ValueError, match=re.escape("compact: pools[1] has head_dim 64, expected 8")):
            ops.compact(move, pools)
    else:
        ops.compact(move, pools)


@pytest.mark.parametrize("fmt", FORMATS)
def test_other_slots_keep_their_bytes(isa: str, fmt: str) -> None:
    pools = poisoned_pools((fmt,), 64, 4, 1)
    pools[0].slabs[0][: pools[0].stride] = 0
    ops.compact(torch.tensor([[0, 9, 2, 6]]).int(), pools)
    changed = (pools[0].payload()[2] != POISON).sum()
    bits = {"f32": 32, "bf16": 16, "f16": 16, "int8": 8, "int4": 4, "int2": 2}[fmt]
    values = 64 if bits < 8 else 64 * bits // 8  # a V code of fewer bits shares its byte with other slots
    assert changed == 64 * bits // 8 + values + 4 * ops.scale_groups(fmt, 64)
    assert torch.all(pools[0].payload()[[1, 3]] == POISON)
    kept = [t[[2]][:, [s for s in range(SLOTS) if s != 6]] for t in slots_of(pools[0], 0)]
    untouched = [t[[1]][:, :15] for t in slots_of(pools[0], 0)]
    assert all(torch.equal(as_bits(a), as_bits(b)) for a, b in zip(kept, untouched, strict=True))


@pytest.mark.parametrize("fmt", ["bf16", "int4"])
def test_threads(isa: str, fmt: str) -> None:
    g = torch.Generator().manual_seed(2)
    moves = []
    for page in range(200):
        for slot in range(int(torch.randint(1, 17, (1,), generator=g))):
            source = int(torch.randint(0, 200 * SLOTS, (1,), generator=g))
            moves.append([ops.make_page(0, 1, source // SLOTS), source % SLOTS, page, slot])
    results = []
    for threads in (1, 2, 3, 8):
        pool = random_pool(fmt, 64, 200)
        ops.compact(torch.tensor(moves).int(), [pool], threads=threads)
        results.append(pool.slabs[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_nothing_to_move(isa: str) -> None:
    pools = poisoned_pools(("f32",), 8, 1, 1)
    ops.compact(torch.empty(0, 4, dtype=torch.int32), pools)
    ops.compact(torch.tensor([[-1, -1, -1, -1]]).int(), pools)
    assert torch.all(pools[0].slabs[0] == POISON)


def moved(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


INT8, INT4 = 1 << 28, 2 << 28
CENTRE, ROWS = torch.zeros(2, 64), torch.zeros(1, dtype=torch.int32)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("compact", {"moves": moved([0, 0, INT8, 0])}, "compact: moves[0] goes from bf16 to int8, expected pages of one"),
    ("compact", {"moves": moved([0, 16, 1, 0])}, "compact: moves[0, 1] is 16, expected slot 0 to 15"),
    ("compact", {"moves": moved([0, 0, 1, -1])}, "compact: moves[0, 3] is -1, expected slot 0 to 15"),
    (
        "compact",
        {"moves": moved([9, 0, 1, 0])},
        "compact: moves[0, 0] names page 9 of pool 0 slab 0, expected one of 4",
    ),
    ("compact", {"moves": moved([0, 0, -2, 0])}, "compact: moves[0, 2] is -2, expected a page or -1"),
    ("compact", {"moves": moved([0, 0, 5 << 28, 0])}, "compact: moves[0, 2] names pool 5, expected one of 3 pools"),
    (
        "compact",
        {"moves": moved([0, 0, 1, 0], [0, 1, 2, 0], [0, 2, 1, 1])},
        "compact: moves[2, 2] comes back to page 1, expected the moves into one page to follow each other",
    ),
    (
        "compact",
        {"moves": moved([0, 0, 1, 0], [0, 1, 1, 0])},
        "compact: moves[1] writes slot 0 of page 1 again, expected each slot once",
    ),
    (
        "compact",
        {"moves": moved([1, 0, 2, 0], [0, 0, 1, 0])},
        "compact: moves[0, 0] reads page 1, expected one that is not written to",
    ),
    ("compact", {"moves": torch.zeros(3, 3).int()}, "compact: moves is [3, 3], expected [n=3, 4]"),
    ("compact", {"moves": torch.zeros(3, 4)}, "compact: moves has dtype f32, expected i32"),
    ("compact", {"moves": torch.zeros(4, 3).int().t()}, "compact: moves has stride"),
    ("compact", {"threads": 0}, "compact: threads is 0, expected at least 1"),
    (
        "quantize",
        {"moves": moved([INT4, 0, INT8, 0])},
        "quantize: moves[0] goes from int4 to int8, expected fewer bits",
    ),
    (
        "quantize",
        {"moves": moved([INT8, 0, INT8 + 1, 0])},
        "quantize: moves[0] goes from int8 to int8, expected fewer bits (compact copies within a format)",
    ),
    (
        "quantize",
        {"moves": moved([INT8, 0, 0, 0])},
        "quantize: moves[0] goes to a page of format bf16, expected int8, int4 or int2",
    ),
    ("quantize", {"centre": CENTRE}, "quantize: row_of is missing, expected centre and row_of together"),
    ("quantize", {"row_of": ROWS}, "quantize: centre is missing, expected centre and row_of together"),
    ("quantize", {"centre": CENTRE, "row_of": ROWS + 2}, "quantize: row_of[0] is 2, expected a row of centre, 0 to 1"),
    ("quantize", {"centre": CENTRE, "row_of": ROWS - 1}, "quantize: row_of[0] is -1, expected a row of centre, 0 to 1"),
    ("quantize", {"centre": torch.zeros(2, 32), "row_of": ROWS}, "quantize: centre is [2, 32], expected [R=2, D=64]"),
    ("quantize", {"centre": CENTRE.bfloat16(), "row_of": ROWS}, "quantize: centre has dtype bf16, expected f32"),
    ("quantize", {"centre": CENTRE, "row_of": torch.zeros(3).int()}, "quantize: row_of is [3], expected [n=1]"),
]


@pytest.mark.parametrize(("op", "change", "text"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refusals_come_before_any_write(op: str, change: dict[str, Any], text: str) -> None:
    pools = poisoned_pools(("bf16", "int8", "int4"), 64, 4, 1)
    good = moved([0, 0, INT8, 0]) if op == "quantize" else moved([0, 0, 1, 0])
    arguments = {"moves": good, **change}
    with pytest.raises(ValueError, match=re.escape(text)):
        getattr(ops, op)(arguments.pop("moves"), pools, **arguments)
    assert all(torch.all(pool.slabs[0] == POISON) for pool in pools)


def test_append_refuses_quantized_pools() -> None:
    pools = poisoned_pools(("bf16", "int8"), 64, 1, 1)
    token, place = torch.zeros(1, 1, 64), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape("append: pools[1] has format int8, expected f32, bf16 or f16")):
        ops.append(token, token, place, place.to(torch.uint8), pools, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("dim", [16, 40, 528])
def test_dims_that_quantized_pages_cannot_hold(dim: int) -> None:
    with pytest.raises(ValueError, match=f"page_bytes: head_dim is {dim}, expected"):
        ops.Pool.allocate("int4", dim, 1)
