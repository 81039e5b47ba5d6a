"""score_window against the reference, and what must not change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import LSE, LSE_QUANTIZED, SHARE, SHARE_QUANTIZED, assert_close
from torch import Tensor
from windows import FULL, Window, make_window

from kvstrata import ops, reference

LENGTHS = [0, 1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64]
SPREADS = [("none", 0.0), ("variance", 263.81), ("std", 1.0)]
MIXED = [("int8",), ("int4",), ("int2",), ("bf16", "int4"), ("f32", "f16", "int8", "int4", "int2")]
INF, NAN = float("inf"), float("nan")
EMULATED = 0.3


def check(case: Window, spread: str = "none", weight: float = 0.0, **more: Any) -> tuple[Tensor, Tensor]:
    score, lse = case.score(spread=spread, weight=weight, **more)
    share, ref_lse = case.shares(
        **{n: v for n, v in more.items() if n not in ("q_pos", "centre")}, q_pos=more.get("q_pos", 1) is not None
    )
    queries, whole = case.queries, case.centre is not None
    ref = reference.score_window(share.nan_to_num(0.0), queries, spread, weight)
    for r, count in enumerate(queries.tolist()):
        assert_close(lse[r, :, :count], ref_lse[r, :, :count], LSE_QUANTIZED if whole else LSE)
        assert torch.all(lse[r, :, count:] == -INF)
        near = score[r].double().amax().clamp_min(1e-30).item() if score.numel() else 1.0
        assert_close(score[r], ref[r], SHARE_QUANTIZED if whole else SHARE, floor=1e-2 * near)
    return score, lse


@pytest.mark.parametrize("spread", SPREADS, ids=lambda s: s[0])
@pytest.mark.parametrize("masks", ["full", "tail1", "ragged"])
@pytest.mark.parametrize("formats", [("f32",), ("bf16",), ("f16",)], ids=lambda f: f[0])
def test_lengths(isa: str, formats: tuple[str, ...], masks: str, spread: tuple[str, float]) -> None:
    case = make_window(LENGTHS, formats=formats, masks=masks)
    score, _ = check(case, *spread)
    assert torch.all(score[~case.slots.unsqueeze(1).expand_as(score)] == 0), "hidden slots score 0"


@pytest.mark.parametrize("spread", SPREADS, ids=lambda s: s[0])
@pytest.mark.parametrize("masks", ["full", "ragged"])
@pytest.mark.parametrize("formats", MIXED, ids="+".join)
def test_quantized_and_mixed_formats(isa: str, formats: tuple[str, ...], masks: str, spread: tuple[str, float]) -> None:
    check(make_window(LENGTHS, formats=formats, masks=masks, width=9), *spread)


@pytest.mark.parametrize("width", [1, 17, 64, 130])
@pytest.mark.parametrize("dim", [32, 48, 80, 96, 112, 128, 160, 192, 256, 512])
def test_head_dims_of_quantized_pages(isa: str, dim: int, width: int) -> None:
    case = make_window([9, 4], formats=MIXED[-1], dim=dim, width=width, masks="ragged", late=20, seed=dim)
    check(case, "std", 1.0)
    case.k -= torch.where((case.pages >> 28 > 1)[..., None, None], case.centre.double()[:, None, None], 0.0)  # type: ignore[union-attr]
    check(case, "std", 1.0, centre=None)


@pytest.mark.parametrize("width", [1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 130, 256])
def test_queries(isa: str, width: int) -> None:
    """On both sides of a block of heads and of a tile of query rows."""
    case = make_window([5, 9, 2], width=width, group=3, late=20, masks="ragged", seed=width)
    check(case, "std", 1.0)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 16])
def test_groups(isa: str, group: int) -> None:
    check(make_window([17, 5], group=group, width=9, late=5, seed=group), "variance", 10.0)


@pytest.mark.parametrize("dim", [1, 2, 17, 40, 64, 80, 96, 112, 128, 160, 192, 256, 333, 512])
def test_head_dims(isa: str, dim: int) -> None:
    check(make_window([9, 4], formats=FULL, dim=dim, masks="ragged", seed=dim), "std", 1.0)


@pytest.mark.parametrize("queries", [[0, 4, 8], [8, 0, 0], [1, 2, 7], [0, 0, 0]])
def test_rows_with_fewer_queries(isa: str, queries: list[int]) -> None:
    case = make_window([6, 9, 33], queries=queries, masks="tail15")
    score, lse = check(case, "variance", 5.0)
    for r, count in enumerate(queries):
        if count == 0:
            assert torch.all(score[r] == 0) and torch.all(lse[r] == -INF)


def test_a_real_row(isa: str) -> None:
    """4,096 tokens in bf16, 32 queries of 4 heads, D = 128."""
    check(make_window([256, 100], width=32, group=4, dim=128, masks="ragged", holes=0.02, late=60), "std", 1.0)


@pytest.mark.parametrize("late", [0, 1, 16, 1000])
def test_later_slots_are_not_read(isa: str, late: int) -> None:
    case = make_window([12, 3], width=20, late=late, shuffle=True, masks="ragged")
    score, _ = check(case, "std", 1.0)
    unseen = case.positions > case.q_pos.amax(1)[:, None, None]
    assert torch.all(score[unseen.unsqueeze(1).expand_as(score)] == 0)


def test_without_positions_every_slot_is_earlier(isa: str) -> None:
    case = make_window([12, 3], late=30)
    check(case, q_pos=None)
    everything = case.score(q_pos=torch.full_like(case.q_pos, 2**31 - 1))
    assert all(torch.equal(a, b) for a, b in zip(everything, case.score(q_pos=None), strict=True))


def test_features_of_attention(isa: str) -> None:
    case = make_window([20, 7], masks="ragged", late=30)
    check(case, "std", 1.0, softcap=3.0, scale=0.5)
    check(case, "std", 1.0, sinks=torch.tensor([[0.5, -3.0], [30.0, -INF]]))
    near = make_window([20, 7], late=30, shuffle=True)
    for window in (1, 7, 100, 2**31 - 1):
        age = near.q_pos[:, :, None, None] - near.positions[:, None]
        assert window > 100 or ((age == window).any() and (age == window - 1).any()), (
            "slots on both sides of the border"
        )
        check(near, window=window)
        check(case, window=window)


def test_query_types_and_strides(isa: str) -> None:
    case = make_window([9, 4])
    for dtype in (torch.bfloat16, torch.float16):
        typed = make_window([9, 4])
        typed.q = case.q.to(dtype)
        check(typed)
    q = case.q.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    wide = torch.full((2, 3, 9, 16), NAN)
    got, lse = ops.score_window(q, case.pages, case.pools, out=wide[:, :2], **case.arguments(q_pos=case.q_pos))
    assert torch.equal(got, case.score()[0]) and torch.equal(lse, case.score()[1])
    assert wide[:, 2].isnan().all()


def test_holes_and_hostile_entries(isa: str) -> None:
    case = make_window([33, 33, 20, 6], holes=0.4, masks="ragged", formats=("bf16", "f32"))
    case.pages[:, -3:] = -1
    hidden = case.visible.to(torch.int32) == 0
    case.pages[hidden] = 0x6FFFFFFF
    assert hidden.sum() > 5
    check(case, "std", 1.0)


def test_what_lies_elsewhere_does_not_matter(isa: str) -> None:
    """Bits are the same alone or in a batch, with or without trailing -1, on any number of threads."""
    case = make_window([40, 70, 3], width=16, formats=(*FULL, "int8", "int2"), masks="ragged")
    score, lse = case.score(spread="std", weight=1.0)
    for threads in (1, 2, 3, 8):
        again = case.score(spread="std", weight=1.0, threads=threads)
        assert torch.equal(again[0], score) and torch.equal(again[1], lse)
    for r, length in enumerate((40, 70, 3)):
        alone, alone_lse = case.row(r, length).score(spread="std", weight=1.0)
        assert torch.equal(alone[0], score[r, :, :length]) and torch.equal(alone_lse[0], lse[r])


def test_heads_are_independent(isa: str) -> None:
    case = make_window([20, 5], group=5, width=33)
    score, lse = case.score(spread="variance", weight=9.0)
    order = torch.tensor([3, 1, 4, 0, 2])
    case.q = case.q[:, :, order].contiguous()
    turned, turned_lse = case.score(spread="variance", weight=9.0)
    assert torch.equal(turned, score[:, order]) and torch.equal(turned_lse, lse[:, order])


def test_equal_queries_do_not_vary(isa: str) -> None:
    case = make_window([20], width=32)
    case.q[:] = case.q[:, :1]
    plain = case.score(q_pos=None)[0]
    for spread in ("variance", "std"):
        assert torch.equal(case.score(q_pos=None, spread=spread, weight=1e6)[0], plain)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_key_shows_in_its_own_row(isa: str, bad: float) -> None:
    case = make_window([9, 9], formats=("f32",))
    score, lse = case.score()
    page = case.pages[0, 4]
    k, v = ops.unpack(page.view(1), case.pools)
    k[0, 3, 5] = bad
    ops.pack(k, v, page.view(1), case.pools)
    hurt, hurt_lse = case.score()
    assert not torch.all(hurt[0].isfinite()) or bad != NAN
    assert torch.equal(hurt[1], score[1]) and torch.equal(hurt_lse[1], lse[1])
    hidden = case.visible.clone().to(torch.int32)
    hidden[0, 4] &= ~(1 << 3)
    case.visible = hidden.to(torch.uint16)
    assert case.score()[0].isfinite().all(), "a hidden slot does not enter"


@pytest.mark.parametrize("empty", ["rows", "queries", "entries", "holes"])
def test_empty(isa: str, empty: str) -> None:
    case = make_window([4, 4], width=0 if empty == "queries" else 3)
    if empty == "rows":
        case = case.row(2)
    if empty == "entries":
        case = make_window([0, 0], width=3)
    if empty == "holes":
        case.pages.fill_(-1)
    score, lse = case.score(spread="std", weight=1.0)
    assert torch.all(score == 0) and torch.all(lse == -INF)
    assert score.shape[2:] == (case.pages.shape[1], 16)


def test_bad_input() -> None:
    case = make_window([4, 4])
    for message, more in [
        ("spread is 'mad', expected one of none, variance, std", {"spread": "mad"}),
        ("weight is -1, expected 0 or more", {"spread": "std", "weight": -1.0}),
        ("window is -1, expected 0", {"window": -1}),
        ("q_pos is missing", {"q_pos": None, "window": 5}),
        (r"queries\[1\] is 9, expected 0 to 8", {"queries": torch.tensor([1, 9]).int()}),
        (r"q_pos is \[2, 7\], expected \[R=2, W=8\]", {"q_pos": case.q_pos[:, :7]}),
        (r"centre is \[2, 63\], expected \[R=2, D=64\]", {"centre": torch.zeros(2, 63)}),
        ("workspace has 64 bytes, expected at least", {"workspace": torch.zeros(64, dtype=torch.uint8)}),
        ("scale is inf, expected a finite number", {"scale": INF}),
    ]:
        with pytest.raises(ValueError, match=f"score_window: {message}"):
            case.score(**more)
    with pytest.raises(ValueError, match="score_window: group is 0 query heads per KV head, expected 1 to 16"):
        ops.score_window(case.q[:, :, :0], case.pages, case.pools)
    with pytest.raises(ValueError, match=r"q is \[2, 8, 64\], expected"):
        ops.score_window(case.q[:, :, 0], case.pages, case.pools)
    with pytest.raises(ValueError, match="row 0 has 257 queries, expected 0 to 256"):
        make_window([4], width=257).score()


def test_workspace_grows_with_capacity_only() -> None:
    q = torch.zeros(2, 32, 4, 64)
    least = ops.score_window_workspace_bytes(q, 1000)
    assert least <= ops.score_window_workspace_bytes(q, 1001) <= ops.score_window_workspace_bytes(q, 4000)
    for width in range(1, 80):
        small, large = (ops.score_window_workspace_bytes(torch.zeros(2, w, 4, 64), 1000) for w in (width, width + 1))
        assert small <= large
    assert ops.score_window_workspace_bytes(torch.zeros(1, 64, 1, 128), 1 << 20, threads=1) < 16 << 20


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [1, 5, 33, 70])
def test_nothing_is_written_past_the_workspace(isa: str, width: int, threads: int) -> None:
    case = make_window([70, 3, 0], width=width, group=3, dim=96, formats=MIXED[-1], masks="ragged")
    size = ops.score_window_workspace_bytes(case.q, 70, threads=threads)
    space = torch.full((size + 4096,), 0xA5, dtype=torch.uint8)
    got = case.score(workspace=space[:size], threads=threads)
    assert torch.all(space[size:] == 0xA5) and torch.equal(got[0], case.score()[0])
