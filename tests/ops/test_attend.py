"""attend against the reference, over levels, formats, sizes and features."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import make_case
from tolerances import LOGITS, LOGITS_PAIRS, LSE, MASS, OUT_PAIRS, assert_close, assert_close_rows, out_tolerance

from kvstrata import _C, ops, reference

EMULATED = 0.5
TILES = r"test_(?!long_list|lengths|lists_around|holes|head_dims\[|softcap)"

FORMATS = [("f32",), ("bf16",), ("f16",)]
LENGTHS = [0, 1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64]
DIMS = [*_C.supported()["tuned_dims"], 1, 2, 8, 17, 40, 333, 512]
INF = float("inf")


def check(case: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = case.attend(**more)
    ref, ref_lse = case.reference()
    assert_close_rows(out, ref, out_tolerance(case.formats, out.dtype))
    assert_close(lse, ref_lse, LSE)
    return out, lse


@pytest.mark.parametrize("masks", ["full", "tail1", "tail15", "ragged"])
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f[0])
def test_lengths(isa: str, formats: tuple[str, ...], masks: str) -> None:
    check(make_case(LENGTHS, formats=formats, masks=masks, slabs=2))


@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f[0])
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(isa: str, dim: int, formats: tuple[str, ...]) -> None:
    case = make_case([9, 4], formats=formats, dim=dim, masks="ragged", group=3, seed=dim)
    if dim < 8:  # outputs of few elements may cancel to almost nothing
        out, lse = case.attend()
        ref, ref_lse = case.reference()
        assert_close(out, ref, 1e-5)
        return assert_close(lse, ref_lse, LSE)
    check(case)


@pytest.mark.parametrize(("group", "queries"), [(7, 2), (5, 5)])
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f[0])
@pytest.mark.parametrize("dim", [64, 80, 128, 160, 256, 333, 512])
def test_head_dims_of_many_rows(isa: str, dim: int, formats: tuple[str, ...], group: int, queries: int) -> None:
    """Up to 16 query rows, and more."""
    own = torch.tensor([queries, 1], dtype=torch.int32)
    check(make_case([9, 4], formats=formats, dim=dim, masks="tail15", group=group, queries=queries, own=own, seed=dim))


@pytest.mark.parametrize("group", range(1, 17))
def test_groups(isa: str, group: int) -> None:
    check(make_case([17, 5], group=group, masks="tail1", seed=group))
    check(make_case([17, 5], group=group, queries=3, masks="ragged", seed=group, own=torch.tensor([0, 3]).int()))


@pytest.mark.parametrize("queries", [1, 2, 4, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f[0])
def test_queries(isa: str, formats: tuple[str, ...], queries: int) -> None:
    """From one row per page visit to several tiles of 64, on both sides of every way of cutting the work."""
    check(make_case([20, 8, 3], formats=formats, queries=queries, group=4, masks="tail15", seed=queries))


@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f[0])
def test_long_list(isa: str, formats: tuple[str, ...]) -> None:
    check(make_case([2048, 100], formats=formats, group=2, masks="ragged", holes=0.01))


def test_lists_around_each_chunk_size(isa: str) -> None:
    for length in (63, 65, 127, 128, 1023, 1024):
        check(make_case([length], dim=16, group=1, seed=length))


def test_holes_and_hostile_entries(isa: str) -> None:
    """Entries of -1 with full masks, and entries without a visible slot whose id points nowhere, are not looked at."""
    case = make_case([33, 33, 20, 6], holes=0.4, masks="ragged", formats=("bf16", "f32"))
    case.pages[:, -3:] = -1
    hidden = case.visible.to(torch.int32) == 0
    hostile = torch.tensor([0x7FFFFFFF, 0x6FFFFFFF, 65535, -2, -(2**31)], dtype=torch.int64).to(torch.int32)
    case.pages[hidden] = hostile.repeat(int(hidden.sum()) // 5 + 1)[: int(hidden.sum())]
    out, lse = case.attend()
    ref, ref_lse = case.reference()
    assert hidden.sum() > 5
    assert_close_rows(out, ref, out_tolerance(case.formats, out.dtype))
    assert_close(lse, ref_lse, LSE)


def test_formats_mixed_in_a_row(isa: str) -> None:
    check(make_case([40, 17], formats=("f32", "bf16", "f16", "bf16"), slabs=3, masks="ragged"))
    check(make_case([9, 17], formats=("f32", "bf16", "f16"), slabs=2, queries=20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_query_and_output_types(isa: str, dtype: torch.dtype) -> None:
    case = make_case([10, 5], dim=40)
    case.q = case.q.to(dtype)
    check(case, out=torch.full(case.q.shape, float("nan"), dtype=dtype))
    assert ops.attend(case.q, case.pages, case.pools)[0].dtype == dtype


def test_shapes_of_one_query(isa: str) -> None:
    case = make_case([5, 9])
    out, lse = case.attend()
    out3, lse3 = ops.attend(case.q[:, 0], case.pages, case.pools, visible=case.visible)
    assert torch.equal(out3, out[:, 0]) and torch.equal(lse3, lse[:, 0])


def test_strided_inputs(isa: str) -> None:
    case = make_case([6, 9], queries=5)
    q = case.q.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    out = torch.empty(5, 4, 2, 64).permute(2, 0, 1, 3)
    wide = torch.full((2, 20), -1, dtype=torch.int32)
    wide[:, :9] = case.pages
    assert not q.is_contiguous() and not wide[:, :9].is_contiguous()
    got = case.attend(q=q, out=out, pages=wide[:, :9])
    assert torch.equal(got[0], case.attend()[0]) and torch.equal(got[1], case.attend()[1])


@pytest.mark.parametrize("empty", ["rows", "queries", "entries", "all holes"])
def test_empty(isa: str, empty: str) -> None:
    case = make_case([4, 4], queries=0 if empty == "queries" else 3)
    if empty == "rows":
        case.q, case.pages, case.visible = case.q[:0], case.pages[:0], case.visible[:0]
    if empty == "entries":
        case.pages, case.visible = case.pages[:, :0], case.visible[:, :0]
    if empty == "all holes":
        case.pages.fill_(-1)
    out, lse, mass, z = case.attend(want_mass=True, want_logits=True)
    assert torch.all(out == 0) and torch.all(lse == -INF) and torch.all(mass == 0) and torch.all(z == -INF)
    assert out.shape == case.q.shape and mass.shape == (*case.pages.shape, 16)


# --- Features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 5, 16, 40])
@pytest.mark.parametrize("masks", ["full", "ragged"])
def test_own(isa: str, queries: int, masks: str) -> None:
    case = make_case([6, 9, 4, 12], queries=queries, masks=masks, holes=0.1, group=3, seed=queries)
    seen = reference.visible_slots(case.pages, case.visible).flatten(1).sum(1)
    wanted = torch.tensor([queries, queries, queries // 2, 0])
    case.extra["own"] = torch.minimum(seen, wanted).to(torch.int32)
    check(case)


@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f[0])
def test_first_queries_read_nothing_of_a_block(isa: str, formats: tuple[str, ...]) -> None:
    """The last block of eight pages holds later own tokens alone."""
    check(make_case([11], formats=formats, queries=75, group=1, own=torch.tensor([75], dtype=torch.int32)))


@pytest.mark.parametrize("queries", [1, 7, 33, 64])
def test_tree(isa: str, queries: int) -> None:
    g = torch.Generator().manual_seed(queries)
    tree = torch.randint(-(2**63), 2**63 - 1, (3, queries), generator=g)
    own = torch.tensor([64, 20, 0], dtype=torch.int32)
    case = make_case([8, 30, 5], queries=queries, masks="tail15", group=2, own=own, tree=tree)
    check(case)
    unsigned = case.attend(tree=tree.view(torch.uint64))[0]
    assert torch.equal(unsigned, case.attend()[0])


@pytest.mark.parametrize("window", [1, 5, 16, 40, 10_000])
def test_window(isa: str, window: int) -> None:
    q_pos = torch.tensor([[90, 91, 95], [40, 41, 42], [1000, 1000, 1]], dtype=torch.int32)
    check(make_case([6, 3, 9], queries=3, masks="ragged", window=window, q_pos=q_pos, formats=("f32", "f16"), slabs=2))


def test_window_reads_only_positions_of_visible_pages(isa: str) -> None:
    q_pos = torch.tensor([[2**31 - 1], [-(2**31)]], dtype=torch.int32)
    check(make_case([6, 3], window=2**31 - 1, q_pos=q_pos))


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(isa: str, softcap: float) -> None:
    check(make_case([6, 20], softcap=softcap, scale=1.0, masks="tail1"))


@pytest.mark.parametrize("queries", [1, 20])
def test_sinks(isa: str, queries: int) -> None:
    sinks = torch.tensor([[0.5, -3.0, 30.0, -INF], [1.0, 2.0, 3.0, 4.0], [-1.0, 0.0, 1.0, -INF]])
    case = make_case([6, 20, 0], queries=queries, sinks=sinks)
    _, lse = check(case)
    assert torch.equal(lse[2], sinks[2].expand(queries, 4)), "nothing visible: lse is the sink"


def test_bias(isa: str) -> None:
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(2, 20, 16, generator=g)
    case = make_case([20, 7], masks="ragged", bias=bias, queries=2)
    hidden = ~reference.visible_slots(case.pages, case.visible)
    case.extra["bias"] = bias.masked_fill(hidden, float("nan"))
    case.extra["bias"][1, 2, 3] = -INF
    check(case)


def test_bias_log_n_is_n_copies(isa: str) -> None:
    case = make_case([4], dim=32)
    bias = torch.zeros(1, 4, 16)
    bias[0, 1] = math.log(3)
    weighted = case.attend(bias=bias)
    copies = case.attend(pages=case.pages[:, [0, 1, 1, 1, 2, 3]], visible=case.visible[:, [0, 1, 1, 1, 2, 3]])
    assert_close_rows(weighted[0], copies[0], OUT_PAIRS if pairs(isa) else 1e-6)
    assert_close(weighted[1], copies[1], LSE)


def pairs(isa: str) -> bool:
    """Whether bf16 pages are read by products of bf16."""
    return isa in ("avx512_bf16", "amx", "amx_soft", "emulated", "cuda")


@pytest.mark.parametrize("dim", [17, 64])
@pytest.mark.parametrize("queries", [1, 30])
def test_logits_of_f32_queries(isa: str, queries: int, dim: int) -> None:
    """Over bf16 pages: exact products, or 16 bits of each query."""
    case = make_case([9, 20], queries=queries, dim=dim, masks="tail15")
    _, _, z = case.attend(want_logits=torch.empty(2, 4, queries, 20, 16))
    ref = reference.logits(case.q.double(), case.k, case.read(), case.q.shape[-1] ** -0.5)
    assert_close(z, ref, LOGITS_PAIRS if pairs(isa) else LOGITS)


@pytest.mark.parametrize("queries", [1, 30])
def test_logits_and_mass(isa: str, queries: int) -> None:
    own = torch.tensor([queries, 0], dtype=torch.int32)
    case = make_case([9, 20], queries=queries, masks="tail15", holes=0.1, own=own, softcap=20.0)
    case.q = case.q.bfloat16()
    case.pages[:, -2:] = -1
    buffer = torch.full((2, 4, queries, 20, 16), float("nan"))
    out, lse, mass, z = case.attend(want_logits=buffer, want_mass=True)
    ref = reference.logits(case.q.double(), case.k, case.read(), 1 / 8, 20.0)
    assert z is buffer
    assert_close(z, ref, LOGITS)
    assert_close(mass, reference.mass(ref, case.reference()[1]), MASS, floor=1e-3 * queries)
    assert torch.equal(out, case.attend()[0]) and torch.equal(lse, case.attend()[1])
    assert torch.equal(mass, case.attend(want_mass=True)[2])


@pytest.mark.parametrize("group", [4, 9])
def test_a_bad_query_head_stays_alone(isa: str, group: int) -> None:
    """NaN in one head, and an infinite key that the others read: they are as without it."""
    case = make_case([5], group=group)
    case.q = case.q.bfloat16()
    case.pools[0].payload(0).view(torch.bfloat16)[int(case.pages[0, 2]) & 0xFFFF, 7] = -INF
    alone = case.attend()[0]
    case.q[..., 3, 5] = float("nan")
    others = [g for g in range(group) if g != 3]
    assert torch.equal(case.attend()[0][:, :, others].nan_to_num(7.0), alone[:, :, others].nan_to_num(7.0))
    assert case.attend()[0][:, :, 3].isnan().all()
