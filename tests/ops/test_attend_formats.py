"""attend over quantized pages, alone and mixed with full ones in one list, against attention over what the pages hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, make_case, write_quantized
from tolerances import LOGITS_QUANTIZED, LSE, MASS, OUT_QUANTIZED, assert_close, assert_close_rows, out_tolerance

from conftest import at_scalar
from kvstrata import _C, ops, reference

EMULATED = 0.5
TILES = r"test_(?!long_list|lengths|small_values|zero_queries)"

ALONE = [("int8",), ("int4",), ("int2",)]
MIXED = [("bf16", "int8", "int4", "int2"), ("f32", "int4"), ("int8", "int2", "f16")]
DIMS = [32, 48, 64, 80, 96, 112, 128, 160, 256, 512]
INF = float("inf")


def name(formats: tuple[str, ...]) -> str:
    return "+".join(formats)


def check(case: Case, **more: Any) -> tuple[torch.Tensor, ...]:
    result = case.attend(**more)
    ref, ref_lse = case.reference()
    assert_close_rows(result[0], ref, out_tolerance(case.formats, result[0].dtype))
    assert_close(result[1], ref_lse, LOGITS_QUANTIZED)
    return result


@pytest.mark.parametrize("masks", ["full", "tail1", "tail15", "ragged"])
@pytest.mark.parametrize("formats", [*ALONE, *MIXED], ids=name)
def test_lengths(isa: str, formats: tuple[str, ...], masks: str) -> None:
    check(make_case([0, 1, 3, 7, 16, 17, 33, 64], formats=formats, masks=masks, slabs=2, holes=0.1))


@pytest.mark.parametrize("formats", [*ALONE, MIXED[0]], ids=name)
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(isa: str, dim: int, formats: tuple[str, ...]) -> None:
    check(make_case([9, 4], formats=formats, dim=dim, masks="ragged", group=3, seed=dim))
    check(make_case([9, 4], formats=formats, dim=dim, queries=5, masks="tail15", group=4, seed=dim))


@pytest.mark.parametrize("formats", [*ALONE, MIXED[0]], ids=name)
@pytest.mark.parametrize("dim", [64, 112, 128, 192, 256, 512])
def test_head_dims_of_many_rows(isa: str, dim: int, formats: tuple[str, ...]) -> None:
    """More than four query rows, up to 16."""
    check(make_case([9, 4], formats=formats, dim=dim, queries=2, masks="tail15", group=7, seed=dim))


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("formats", [*ALONE, MIXED[0]], ids=name)
def test_groups(isa: str, formats: tuple[str, ...], group: int) -> None:
    own = torch.tensor([0, 3], dtype=torch.int32)
    check(make_case([17, 5], formats=formats, group=group, masks="tail1", seed=group))
    check(make_case([17, 5], formats=formats, group=group, queries=3, masks="full", seed=group, own=own))


@pytest.mark.parametrize("queries", [2, 4, 15, 17, 33])
@pytest.mark.parametrize("formats", [*ALONE, MIXED[0]], ids=name)
def test_queries(isa: str, formats: tuple[str, ...], queries: int) -> None:
    """From few rows per page visit to several tiles of 64, each query on its own causal edge."""
    own = torch.tensor([queries, queries // 2, 0], dtype=torch.int32)
    check(make_case([20, 8, 3], formats=formats, queries=queries, masks="tail15", seed=queries, own=own))


def test_long_list(isa: str) -> None:
    check(make_case([1100, 70], formats=MIXED[0], group=2, masks="ragged", holes=0.01))


def test_all_full_pages_ignore_the_centre(isa: str) -> None:
    case = make_case([20, 9], queries=2, masks="ragged", formats=("bf16", "f32"))
    plain = case.attend()
    centred = case.attend(centre=torch.full((2, 64), float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(plain, centred, strict=True))


@pytest.mark.parametrize("formats", [("int4",), MIXED[0]], ids=name)
def test_features_together(isa: str, formats: tuple[str, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    extra: dict[str, Any] = {
        "softcap": 5.0,
        "bias": torch.randn(3, 30, 16, generator=g),
        "sinks": torch.tensor([[0.5, -3.0, 30.0, -INF], [1.0, 2.0, 3.0, 4.0], [-1.0, 0.0, 1.0, -INF]]),
        "window": 100,
        "q_pos": torch.tensor([[400, 401], [90, 95], [7, 8]], dtype=torch.int32),
        "own": torch.tensor([2, 2, 0], dtype=torch.int32),
    }
    check(make_case([30, 9, 0], formats=formats, queries=2, masks="tail15", **extra))


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("formats", [*ALONE, MIXED[0]], ids=name)
def test_logits_and_mass(isa: str, formats: tuple[str, ...], queries: int) -> None:
    own = torch.tensor([queries, 0], dtype=torch.int32)
    case = make_case([9, 20], formats=formats, queries=queries, masks="tail15", holes=0.1, own=own)
    out, lse, mass, z = check(case, want_logits=True, want_mass=True)
    ref = reference.logits(case.q.double(), case.k, case.read(), 1 / 8)
    assert_close(z, ref, LOGITS_QUANTIZED)
    assert_close(mass, reference.mass(z.double(), lse.double()), MASS, floor=1e-3 * queries)
    assert torch.equal(out, case.attend()[0]) and torch.equal(lse, case.attend()[1])


@pytest.mark.parametrize("formats", ALONE, ids=name)
@pytest.mark.parametrize("dim", [48, 64, 80, 256])
@pytest.mark.parametrize("queries", [3, 20])
def test_logits_are_bit_equal_over_levels(
    isa: str, monkeypatch: pytest.MonkeyPatch, formats: tuple[str, ...], dim: int, queries: int
) -> None:
    case = make_case([20, 9], formats=formats, dim=dim, queries=queries, masks="ragged")
    z = case.attend(want_logits=True)[2]
    with at_scalar(monkeypatch):
        assert torch.equal(z, case.attend(want_logits=True)[2])


@pytest.mark.parametrize("queries", [2, 20])
@pytest.mark.parametrize("dim", [48, 80, 128, 256])
@pytest.mark.parametrize("formats", ALONE, ids=name)
def test_matrix_tiles_give_the_bits_of_the_level_below(
    matrix_isa: str, formats: tuple[str, ...], dim: int, queries: int
) -> None:
    """Whole numbers: exact sums in whatever order. Rows that read nothing, and a last page alone, are among them."""
    case = make_case(
        [17, 9], formats=formats, dim=dim, queries=queries, masks="ragged", own=torch.tensor([0, queries]).int()
    )
    tiles = case.attend()
    _C.set_isa("avx512_bf16")
    assert all(torch.equal(a, b) for a, b in zip(tiles, case.attend(), strict=True))


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("formats", [*ALONE, MIXED[0]], ids=name)
def test_bits_depend_on_the_row_alone(isa: str, formats: tuple[str, ...], queries: int) -> None:
    case = make_case([100, 7, 33, 0], formats=formats, queries=queries, masks="ragged")
    size = ops.attend_workspace_bytes(case.q, 100, threads=3)
    dirty = torch.full((size,), 0xFF, dtype=torch.uint8)
    once = case.attend(threads=1)
    for more in ({"threads": 2}, {"threads": 3, "workspace": dirty}):
        assert all(torch.equal(a, b) for a, b in zip(case.attend(**more), once, strict=True))
    for r in range(case.rows):
        alone = case.row(r).attend(threads=2)
        assert torch.equal(alone[0][0], once[0][r]) and torch.equal(alone[1][0], once[1][r])


@pytest.mark.parametrize("formats", [("int4",), MIXED[0]], ids=name)
def test_list_is_merge_of_its_parts(isa: str, formats: tuple[str, ...]) -> None:
    case = make_case([60, 21], formats=formats, queries=2, masks="ragged")
    whole = case.attend()
    parts = [
        case.attend(pages=case.pages[:, i : i + 20], visible=case.visible[:, i : i + 20]) for i in range(0, 60, 20)
    ]
    out, lse = ops.merge([p[0] for p in parts], [p[1] for p in parts])
    assert_close_rows(out, whole[0], out_tolerance(case.formats, torch.float32))
    assert_close(lse, whole[1], LSE)


def test_far_apart_maxima(isa: str) -> None:
    """Each page beats all before it, or none: both accumulators are brought to each new maximum."""
    for order in (1, -1):
        case = make_case([12], formats=("f32", "int8"), masks="full", group=5)
        ramp = torch.arange(12, dtype=torch.float32)[::order] if order == 1 else torch.arange(12.0).flip(0)
        case.extra["bias"] = (30 * ramp).view(1, 12, 1).expand(1, 12, 16).contiguous()
        check(case)


# --- Isolation -------------------------------------------------------------------------------------------------------


def spoil(case: Case, row: int, entry: int, slot: int, half: int) -> None:
    """NaN as every scale of K (0) or V (1) of one slot."""
    place = int(case.pages[row, entry])
    pool = case.pools[place >> 28]
    groups = ops.scale_groups(pool.format, pool.head_dim)
    page = pool.payload(place >> 16 & 0xFFF)[place & 0xFFFF]
    page[-4 * groups * 16 :].view(torch.bfloat16).view(2, groups, 16)[half, :, slot] = float("nan")


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("fmt", ["int8", "int4", "int2"])
def test_nan_scale_shows_in_its_own_row_only(isa: str, fmt: str, half: int) -> None:
    case = make_case([20, 9], formats=(fmt,))
    clean = case.attend()
    spoil(case, 1, 4, 7, half)
    out, lse = case.attend()
    assert torch.equal(out[0], clean[0][0]) and torch.equal(lse[0], clean[1][0])
    assert out[1].isnan().all()
    assert lse[1].isnan().all() if half == 0 else torch.equal(lse[1], clean[1][1])


@pytest.mark.parametrize("queries", [6, 40])
@pytest.mark.parametrize("fmt", ["int8", "int4", "int2"])
def test_nan_of_an_own_token_is_not_seen_by_earlier_queries(isa: str, fmt: str, queries: int) -> None:
    own = torch.tensor([queries], dtype=torch.int32)
    case = make_case([5], formats=(fmt,), queries=queries, group=3, own=own)
    clean = case.attend()
    bad = queries // 2
    entry, slot = divmod(5 * 16 - queries + bad, 16)
    spoil(case, 0, entry, slot, 0)
    spoil(case, 0, entry, slot, 1)
    out, lse = case.attend()
    assert torch.equal(lse[:, :bad], clean[1][:, :bad])
    assert_close_rows(out[:, :bad], clean[0][:, :bad], out_tolerance(case.formats, torch.float32))
    assert out[:, bad:].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_bad_query_shows_in_its_own_head_only(isa: str, bad: float) -> None:
    case = make_case([20, 9], formats=MIXED[0], queries=2)
    clean = case.attend()
    case.q[1, 1, 2, 5] = bad
    out, lse = case.attend()
    assert not out[1, 1, 2].isfinite().any()
    out[1, 1, 2], lse[1, 1, 2] = clean[0][1, 1, 2], clean[1][1, 1, 2]
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])


@pytest.mark.parametrize("fmt", ["int8", "int4", "int2"])
def test_zero_queries_and_zero_values(isa: str, fmt: str) -> None:
    case = make_case([4], formats=(fmt,))
    case.q.zero_()
    _, lse = case.attend()
    assert torch.all(lse == torch.log(torch.tensor(64.0)))
    for pool in case.pools:
        pool.payload()[:] = 0
    out, _ = case.attend(q=torch.ones_like(case.q))
    assert torch.all(out == 0)


def test_quantized_pages_of_another_head_dim_are_refused() -> None:
    pools = [ops.Pool.allocate("bf16", 40, 1), ops.Pool.allocate("int4", 64, 1)]
    pages = torch.full((1, 1), ops.make_page(1, 0, 0), dtype=torch.int32)
    with pytest.raises(ValueError, match="attend: pools\\[1\\] has head_dim 64, expected 40"):
        ops.attend(torch.zeros(1, 1, 40), pages, pools)
    with pytest.raises(ValueError, match="attend: centre is \\[1, 40\\], expected \\[R=1, D=64\\]"):
        ops.attend(torch.zeros(1, 1, 64), pages, pools, centre=torch.zeros(1, 40))


@pytest.mark.parametrize("fmt", ops.QUANTIZED)
@pytest.mark.parametrize("small", [0.1, 0.01, 0.001])
def test_small_values_where_most_of_p_is(isa: str, fmt: str, small: float) -> None:
    """As attention sinks are: a page takes nearly all of p and has small values, next to pages of large ones."""
    g = torch.Generator().manual_seed(2)
    k, v = (torch.randn(8, 16, 128, generator=g) for _ in range(2))
    q = torch.randn(1, 1, 1, 128, generator=g).expand(1, 1, 4, 128).contiguous()
    k[0, 3] = q[0, 0, 0] * 0.6
    v[0] *= small
    pool = ops.Pool.allocate(fmt, 128, 8)
    pages = torch.arange(8, dtype=torch.int32).view(1, 8)
    all_slots, no_centre = torch.full((8,), 0xFFFF), torch.zeros(8, 128)
    held = write_quantized(pool, 0, torch.arange(8), k, v, all_slots, no_centre)
    k64, v64 = (x.view(1, 8, 16, 128) for x in held)
    ref, lse = reference.attend(q.double(), k64, v64, torch.ones(1, 1, 8, 16, dtype=torch.bool))
    mass = (q[0, 0, 0].double() @ k64[0, 0, 3] * 128**-0.5 - lse.flatten()[0]).exp()
    assert 0.3 < mass < 1, "most of p is in the first page"
    assert_close_rows(ops.attend(q, pages, [pool])[0], ref, OUT_QUANTIZED)
