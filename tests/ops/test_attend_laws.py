"""What must hold of attend whatever the numbers: laws, exact arithmetic, isolation, bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, make_case, write_page
from tolerances import LSE, OUT_F32, assert_close, assert_close_rows

from conftest import at_scalar
from kvstrata import ops

EMULATED = 0.5
TILES = "test_"

INF = float("inf")
SHAPES: list[dict[str, Any]] = [
    {"lengths": [100, 7, 33, 0], "masks": "ragged"},
    {"lengths": [70, 20, 40], "queries": 9, "own": torch.tensor([9, 3, 0]).int(), "formats": ("bf16", "f32")},
    {"lengths": [30, 70], "queries": 50, "own": torch.tensor([50, 50]).int(), "group": 3, "formats": ("f16",)},
]


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x.nan_to_num(9e9), y.nan_to_num(9e9)) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=range(len(SHAPES)))
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(**SHAPES[request.param])


def test_bits_do_not_depend_on_threads(isa: str, case: Case) -> None:
    once = case.attend(threads=1, want_mass=True)
    for threads in (1, 2, 3, 8):
        assert same(case.attend(threads=threads, want_mass=True), once), threads


def test_bits_do_not_depend_on_neighbours(isa: str, case: Case) -> None:
    out, lse = case.attend(threads=2)
    for r in range(case.rows):
        assert same(case.row(r).attend(threads=2), (out[r : r + 1], lse[r : r + 1])), r


def test_trailing_holes_change_nothing(isa: str, case: Case) -> None:
    more = torch.full((case.rows, 500), -1, dtype=torch.int32)
    pages = torch.cat([case.pages, more], 1)
    visible = torch.cat([case.visible.to(torch.int32), more & 0xFFFF], 1).to(torch.uint16)
    assert same(case.attend(pages=pages, visible=visible), case.attend())


def test_workspace_holds_nothing_that_matters(isa: str, case: Case) -> None:
    size = ops.attend_workspace_bytes(case.q, case.pages.shape[1], threads=2)
    dirty = torch.full((size,), 0xFF, dtype=torch.uint8)
    assert same(case.attend(workspace=dirty, threads=2), case.attend())
    assert same(case.attend(workspace=dirty, threads=2), case.attend())
    with pytest.raises(ValueError, match=rf"attend: workspace has {size - 64} bytes, expected at least {size}"):
        case.attend(workspace=dirty[:-64], threads=2)


def test_workspace_bytes_grow_with_every_size() -> None:
    def size(queries: int, entries: int, threads: int) -> int:
        return ops.attend_workspace_bytes(torch.empty(3, queries, 2, 64), entries, threads=threads)

    for entries in range(0, 5000, 37):
        assert size(1, entries, 2) <= size(1, entries + 1, 2) <= size(2, entries + 1, 2) <= size(2, entries + 1, 3)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_list_is_merge_of_its_parts(isa: str, parts: int) -> None:
    case = make_case([64, 21], queries=2, masks="ragged", formats=("f32",), sinks=torch.randn(2, 4))
    sinks = case.extra.pop("sinks")
    whole = case.attend(sinks=sinks)
    cuts = torch.linspace(0, 64, parts + 1).int().tolist()
    pieces = []
    for i in range(parts):
        piece = slice(cuts[i], cuts[i + 1])
        own_sinks = sinks if i == parts // 2 else None  # passed in exactly one part, so it counts once
        pieces.append(case.attend(pages=case.pages[:, piece], visible=case.visible[:, piece], sinks=own_sinks))
    out, lse = ops.merge([p[0] for p in pieces], [p[1] for p in pieces])
    assert_close_rows(out, whole[0], OUT_F32)
    assert_close(lse, whole[1], LSE)


def test_order_of_pages_changes_only_rounding(isa: str) -> None:
    case = make_case([40], formats=("f32",), masks="ragged", holes=0.1, seed=3)
    shuffled = torch.randperm(40)
    a, b = case.attend(), case.attend(pages=case.pages[:, shuffled], visible=case.visible[:, shuffled])
    assert_close_rows(a[0], b[0], 1e-6)
    assert_close(a[1], b[1], LSE)


def test_n_calls_of_one_query_are_one_call_of_n(isa: str) -> None:
    own = torch.tensor([20, 20], dtype=torch.int32)
    case = make_case([9, 30], queries=20, own=own)
    out, lse = case.attend()
    counts = torch.arange(case.pages.shape[1] * 16).view(1, -1, 16)
    for t in range(20):
        bits = []
        for _r, length in enumerate((9, 30)):
            seen = (counts[0, : case.pages.shape[1]] < length * 16 - 19 + t).long()
            bits.append((seen << torch.arange(16)).sum(1))
        visible = torch.stack(bits).to(torch.uint16)
        one = case.attend(q=case.q[:, t : t + 1], visible=visible, own=None)
        assert_close_rows(one[0][:, 0], out[:, t], OUT_F32)
        assert_close(one[1][:, 0], lse[:, t], LSE)


# --- Exact mode ------------------------------------------------------------------------------------------------------


def exact_case(formats: tuple[str, ...], queries: int) -> Case:
    """Small integers everywhere: every product and sum is exact, in any order."""
    case = make_case([20, 9], formats=formats, dim=48, queries=queries, scale=0.25)
    g = torch.Generator().manual_seed(5)
    case.q = torch.randint(-3, 4, case.q.shape, generator=g).float()
    for pool in case.pools:
        for index in range(pool.pages[0]):
            k, v = (torch.randint(-4, 5, (16, 48), generator=g).float() for _ in range(2))
            write_page(pool, 0, index, k, v)
    return case


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("formats", [("f32",), ("bf16",), ("f16",)], ids=lambda f: f[0])
def test_exact_arithmetic_is_bit_equal_over_levels(
    isa: str, monkeypatch: pytest.MonkeyPatch, formats: tuple[str, ...], queries: int
) -> None:
    case = exact_case(formats, queries)
    flat = torch.zeros_like(case.q)  # equal logits: p = 1 everywhere, so the products with V are exact too
    z, (out, lse) = case.attend(want_logits=True)[2], case.attend(q=flat)
    for r, length in enumerate((20, 9)):
        logits = z[r, :, :, :length]
        assert torch.equal(logits * 4, (logits * 4).round()), "a logit is not the exact sum"
        assert_close(lse[r], torch.log(torch.tensor(float(length * 16))).expand(lse[r].shape), 2.0**-23)
    with at_scalar(monkeypatch):
        exact_lse = lse if isa == "cuda" else case.attend(q=flat)[1]  # a device has a logarithm of its own
        assert same((z, out, lse), (case.attend(want_logits=True)[2], case.attend(q=flat)[0], exact_lse))


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """f32, rounded once but for a tie in 2^29: the product of two bf16 is exact in f64."""
    return (a.double() * b.double() + c.double()).float()


@pytest.mark.parametrize("dim", [64, 80, 17])
def test_matrix_tiles_add_in_the_order_of_their_instruction(matrix_isa: str, dim: int) -> None:
    """TDPBF16PS: sixteen pairs at a time, first elements and second ones apart, then their sums, then the tile's."""
    case = make_case([3], dim=dim, group=7, queries=3, scale=1.0, seed=dim)
    case.q = case.q.bfloat16()
    z = case.attend(want_logits=True)[2][0]  # [G, T, K, 16]
    whole = -(-dim // 32) * 32
    q, k = (torch.nn.functional.pad(x.float(), (0, whole - dim)) for x in (case.q[0].transpose(0, 1), case.k[0]))
    expected = torch.zeros(z.shape)
    for tile in range(0, whole, 32):
        sums = [torch.zeros(z.shape), torch.zeros(z.shape)]
        for d in range(tile, tile + 32):
            sums[d % 2] = fma(q[:, :, None, None, d], k[:, :, d], sums[d % 2])
        expected = expected + (sums[0] + sums[1])
    assert torch.equal(z, expected)


# --- Isolation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
@pytest.mark.parametrize("queries", [1, 20])
def test_bad_query_shows_in_its_own_head_only(isa: str, bad: float, queries: int) -> None:
    case = make_case([20, 9], queries=queries)
    clean = case.attend()
    case.q[1, queries // 2, 2, 5] = bad
    out, lse = case.attend()
    assert not out[1, queries // 2, 2].isfinite().any()
    out[1, queries // 2, 2], lse[1, queries // 2, 2] = clean[0][1, queries // 2, 2], clean[1][1, queries // 2, 2]
    assert same((out, lse), clean)


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("half", ["k", "v"])
def test_bad_slot_shows_in_its_own_row_only(isa: str, bad: float, half: str) -> None:
    case = make_case([20, 9], formats=("f32",))
    clean = case.attend()
    k, v = case.k[1, 4].float(), case.v[1, 4].float()
    (k if half == "k" else v)[7, 3] = bad
    place = int(case.pages[1, 4])
    write_page(case.pools[0], place >> 16 & 0xFFF, place & 0xFFFF, k, v)
    out, lse = case.attend()
    assert torch.equal(out[0], clean[0][0]) and torch.equal(lse[0], clean[1][0])
    if half == "v":
        assert not out[1, ..., 3].isfinite().any()
    else:  # an infinite key makes a logit of inf, or of -inf, which hides the slot
        hides = torch.tensor(bad).isinf() & (case.q[1, :, :, 3] < 0)
        assert torch.equal(out[1].isfinite().any(-1), hides) and torch.equal(lse[1].isfinite(), hides)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("queries", [6, 40])
def test_bad_own_token_is_not_seen_by_earlier_queries(isa: str, queries: int, group: int) -> None:
    """0 * NaN: a value hidden from one query of a tile and read by another must not leak."""
    own = torch.tensor([queries], dtype=torch.int32)
    case = make_case([5], queries=queries, group=group, formats=("bf16",), own=own)
    clean = case.attend()
    bad_token = queries // 2
    slot = 5 * 16 - queries + bad_token
    entry, lane = divmod(slot, 16)
    k, v = case.k[0, entry].float(), case.v[0, entry].float()
    k[lane], v[lane] = float("nan"), float("nan")
    write_page(case.pools[0], 0, int(case.pages[0, entry]) & 0xFFFF, k, v)
    out, lse = case.attend()
    assert torch.equal(out[:, :bad_token], clean[0][:, :bad_token])
    assert torch.equal(lse[:, :bad_token], clean[1][:, :bad_token])
    assert out[:, bad_token:].isnan().all()


@pytest.mark.parametrize("slot", [6, 7])
@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_bad_value_in_matrix_tiles(matrix_isa: str, bad: float, slot: int) -> None:
    """It shows in its own channel of the queries that read it, and infinity stays what it is; all else is bit for bit."""
    own = torch.tensor([20], dtype=torch.int32)
    case = make_case([5], queries=20, group=3, own=own)
    clean = case.attend()
    entry, reads = 4, slot - (5 * 16 - 20 - 4 * 16)  # the first query that reads the slot of the last page
    k, v = case.k[0, entry].float(), case.v[0, entry].float()
    v[slot, 9] = bad
    write_page(case.pools[0], 0, int(case.pages[0, entry]) & 0xFFFF, k, v)
    out, lse = case.attend()
    assert torch.equal(
        out[:, reads:, :, 9].nan_to_num(7.0, 8.0, 9.0), torch.full((1, 20 - reads, 3), bad).nan_to_num(7.0, 8.0, 9.0)
    )
    out[:, reads:, :, 9] = clean[0][:, reads:, :, 9]
    assert same((out, lse), clean)


def test_outputs_are_written_and_nothing_else(isa: str) -> None:
    case = make_case([6, 9], queries=2, dim=40)
    frame = torch.full((2, 4, 6, 48), 7.0)
    before = [slab.clone() for pool in case.pools for slab in pool.slabs]
    out = frame[:, 1:3, 1:5, 4:44]
    case.attend(out=out)
    assert torch.equal(out, case.attend()[0])
    frame[:, 1:3, 1:5, 4:44] = 7.0
    assert torch.all(frame == 7.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (s for p in case.pools for s in p.slabs), strict=True))
