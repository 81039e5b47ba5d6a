"""score_pages and select against the reference on random summaries, and how much int8 means lose."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from indices import Index, check_selection, make_index
from rotary import rotary_pages, summaries_of
from tolerances import LSE, PAGE_SCORE, QUERY_TIE, assert_close
from torch import Tensor

from kvstrata import ops, reference

NAN, INF = float("nan"), float("inf")
EMULATED = 0.6
SIZES = [0, 1, 15, 16, 17, 31, 33, 2304]
GROUPS = [1, 3, 4, 8]


def slack(index: Index, scale: float) -> Tensor:
    """[R, G, M]: how far x may be off because a channel of the query lies in the middle between two codes."""
    exact, delta = reference.query_codes(index.q)
    near = (exact - exact.floor() - 0.5).abs() < QUERY_TIE
    mean = reference.summary_parts(index.blocks, index.q.shape[-1])[0].nan_to_num()[:, : index.visible.shape[1]]
    return scale * delta.unsqueeze(-1) * (near.float() @ mean.abs().mT)


def check_x(index: Index, scale: float | None = None, spread_weight: float = 1.0, **more: Any) -> Tensor:
    got = index.x(scale=scale, spread_weight=spread_weight, **more)
    want = reference.score_pages(index.q, index.blocks, index.visible, scale, spread_weight)
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert torch.equal(got == -INF, want == -INF) and not got.isnan().any()
    seen = want != -INF
    off = (got.double() - want).masked_fill(~seen, 0.0).abs()
    may = PAGE_SCORE * want.masked_fill(~seen, 0.0).abs().clamp_min(1.0)
    assert torch.all(off <= may + slack(index, index.q.shape[-1] ** -0.5 if scale is None else abs(scale)))
    return got


# --- score_pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("entries", SIZES)
def test_x(isa: str, entries: int, group: int) -> None:
    check_x(make_index(entries, group=group))


@pytest.mark.parametrize("dim", [32, 48, 80, 96, 112, 128, 160, 192, 256, 496, 512])
def test_x_by_head_dim(isa: str, dim: int) -> None:
    check_x(make_index(33, dim=dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [48, 128])
def test_x_by_query_type(isa: str, dim: int, dtype: torch.dtype) -> None:
    index = make_index(33, dim=dim)
    index.q = index.q.to(dtype)
    check_x(index)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 12, 16])
def test_groups_of_any_size(isa: str, group: int) -> None:
    index = make_index(50, group=group, rows=1)
    x = check_x(index)
    for g in range(group):
        assert torch.equal(replace(index, q=index.q[:, g : g + 1]).x(), x[:, g : g + 1])
    check_selection(index, 7)


@pytest.mark.parametrize(("scale", "weight"), [(None, 0.0), (None, 0.5), (0.3, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_scale_and_weight(isa: str, scale: float | None, weight: float) -> None:
    check_x(make_index(33), scale, weight)


def test_queries_of_one_sign_and_extreme_codes(isa: str) -> None:
    """Products of the largest codes: sums of pairs in 16 bits would saturate."""
    dim = 128
    index = make_index(16, dim=dim, holes=0.0, more=0)
    index.blocks[..., : 16 * dim] = torch.tensor([255, 1], dtype=torch.uint8).repeat(8 * dim)
    sign = torch.tensor([1.0, -1.0]).repeat(dim // 2)
    index.q = reference.rotate((sign * torch.tensor([[3.0], [-3.0], [1.0], [2.0]])).expand(2, 4, dim), inverse=True)
    check_x(index)
    index.blocks[..., : 16 * dim] = 255
    check_x(index)


def test_zero_queries(isa: str) -> None:
    index = make_index(20, holes=0.0)
    index.q[:, 1] = 0
    x = check_x(index)
    n = (index.visible.to(torch.int64).unsqueeze(-1) >> torch.arange(16)) & 1
    assert_close(x[:, 1], torch.log(n.sum(-1).double()), PAGE_SCORE)


def test_strided_queries(isa: str) -> None:
    index = make_index(33)
    wide = torch.full((2, 9, 80), NAN)
    wide[:, 1::2, :64] = index.q
    assert torch.equal(replace(index, q=wide[:, 1::2, :64]).x(), index.x())


# --- select -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "aggregate"), [(1, "sum"), (3, "max"), (4, "sum"), (8, "max")])
@pytest.mark.parametrize("entries", SIZES)
def test_selection(isa: str, entries: int, group: int, aggregate: str) -> None:
    index = make_index(entries, group=group)
    base = torch.logsumexp(index.x(), -1) + torch.randn(2, group, generator=torch.Generator().manual_seed(1))
    for k in (0, 1, 12, entries):
        check_selection(index, k, aggregate=aggregate)
        if entries:
            check_selection(index, k, base, aggregate=aggregate)


def test_each_row_has_its_own_k(isa: str) -> None:
    index = make_index(33, rows=4)
    k = torch.tensor([3, 0, 40, 33], dtype=torch.int32)
    check_selection(index, k)
    entries, count, _ = index.select(k)
    assert entries.shape == (4, 40) and count[:2].tolist() == [3, 0]


def test_none_and_all(isa: str) -> None:
    index = make_index(33)
    x = index.x()
    entries, count, rest = index.select(0)
    assert entries.shape == (2, 0) and count.tolist() == [0, 0]
    assert_close(rest, torch.logsumexp(x.double(), -1), LSE)
    for k in (33, 100):
        entries, count, rest = index.select(k)
        for r in range(2):
            live = (index.visible[r].to(torch.int64) > 0).nonzero().flatten()
            assert entries[r, : count[r]].tolist() == live.tolist()
        assert torch.all(rest == -INF)


def test_ties_go_to_the_lower_entry(isa: str) -> None:
    index = make_index(64, holes=0.0, rows=1, more=0)
    index.blocks[:] = index.blocks[:, :1]
    lanes = index.blocks[..., : 16 * 64].view(1, 4, 16, 16, 4)
    lanes.copy_(lanes[..., :1, :].clone().expand_as(lanes))
    facts = index.blocks[..., 16 * 64 :].view(1, 4, 3, 16, 4)
    facts.copy_(facts[..., :1, :].clone().expand_as(facts))
    index.visible = torch.full((1, 64), 0xFFFF).to(torch.uint16)
    for k in (1, 5, 17, 63):
        entries, _, _ = index.select(k)
        assert entries[0].tolist() == list(range(k))


def test_a_head_that_is_content_does_not_vote(isa: str) -> None:
    index = make_index(64, group=2)
    base = torch.tensor([[100.0, -INF]]).expand(2, 2).contiguous()
    alone = replace(index, q=index.q[:, 1:])
    assert torch.equal(index.select(6, lse_base=base)[0], alone.select(6)[0])


def test_a_base_of_nothing_is_none(isa: str) -> None:
    index = make_index(64)
    for a, b in zip(index.select(6), index.select(6, lse_base=torch.full((2, 4), -INF)), strict=True):
        assert torch.equal(a, b)


def test_a_row_whose_every_page_is_hidden(isa: str) -> None:
    index = make_index(33)
    visible = index.visible.to(torch.int32)
    visible[1] = 0
    index.visible = visible.to(torch.uint16)
    check_selection(index, 5)
    entries, count, rest = index.select(5)
    assert count[1] == 0 and torch.all(entries[1] == -1) and torch.all(rest[1] == -INF)


def test_a_row_is_the_same_alone(isa: str) -> None:
    index = make_index(700, rows=5)
    x, chosen = index.x(), index.select(12)
    for threads in (2, 3, 8):
        assert torch.equal(index.x(threads=threads), x)
        for a, b in zip(index.select(12, threads=threads), chosen, strict=True):
            assert torch.equal(a, b)
    for r in range(5):
        assert torch.equal(index.row(r).x()[0], x[r])
        for a, b in zip(index.row(r).select(12), chosen, strict=True):
            assert torch.equal(a[0], b[r])


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("op", ["score_pages", "select"])
def test_a_page_that_cannot_be_ranked_is_refused(isa: str, op: str, bad: float) -> None:
    index = make_index(33, rows=3, holes=0.0)
    scales = index.blocks[1, 1, 16 * 64 : 16 * 64 + 64].view(torch.float32)
    scales[5] = bad
    with pytest.raises(ValueError, match=rf"{op}: .*(row 1.*entry 21|\[1, (\d, )?21\])"):
        index.x() if op == "score_pages" else index.select(4)
    visible = index.visible.to(torch.int32)
    visible[1, 21] = 0
    index.visible = visible.to(torch.uint16)
    check_selection(index, 4)


def test_a_query_that_is_no_number_is_refused(isa: str) -> None:
    index = make_index(33, holes=0.0)
    index.q[1, 2, 3] = NAN
    with pytest.raises(ValueError, match=r"select: .*(row 1|\[1, )"):
        index.select(4)


U8, I32 = torch.uint8, torch.int32
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 64)}, r"select: q is \[2, 64\], expected \[R, G, D\]"),
    ({"q": torch.zeros(2, 4, 64, dtype=torch.float64)}, r"select: q has dtype .*64, expected"),
    ({"q": torch.zeros(2, 17, 64)}, r"select: group is 17 .*expected 1 to 16"),
    ({"q": torch.zeros(2, 4, 40)}, r"select: .*40, expected a multiple of 16"),
    ({"blocks": torch.zeros(2, 2, 1216, dtype=U8)}, r"select: blocks is \[2, 2, 1216\], expected \[R=2, B=3"),
    ({"blocks": torch.zeros(2, 3, 1200, dtype=U8)}, r"select: blocks is \[2, 3, 1200\], expected .*1216"),
    ({"blocks": torch.zeros(2, 3, 1216)}, r"select: blocks has dtype f32, expected u8"),
    ({"visible": torch.zeros(3, 33).to(torch.uint16)}, r"select: visible is \[3, 33\], expected \[R=2, M=33\]"),
    ({"visible": torch.zeros(2, 33, dtype=I32)}, r"select: visible has dtype i32, expected u16"),
    ({"k": -1}, r"select: k.* is -1, expected"),
    ({"k": torch.zeros(3, dtype=I32)}, r"select: k is \[3\], expected \[R=2\]"),
    ({"k": torch.zeros(2, dtype=torch.int64)}, r"select: k has dtype i64, expected i32"),
    ({"lse_base": torch.zeros(2, 3)}, r"select: lse_base is \[2, 3\], expected \[R=2, G=4\]"),
    ({"lse_base": torch.zeros(2, 4, dtype=torch.float64)}, r"select: lse_base has dtype .*64, expected .*f"),
    ({"scale": NAN}, r"select: scale is nan, expected a finite number"),
    ({"spread_weight": -0.5}, r"select: spread_weight is -0.5, expected 0 or more"),
    ({"aggregate": "mean"}, r"select: aggregate is 'mean', expected one of sum, max"),
    ({"threads": -1}, r"select: threads is -1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_bad_input(change: dict[str, Any], message: str) -> None:
    index = make_index(33, more=0)
    arguments = {"q": index.q, "blocks": index.blocks, "visible": index.visible, "k": 4} | change
    with pytest.raises(ValueError, match=message):
        ops.select(**arguments)
    named = {name: value for name, value in arguments.items() if name not in ("k", "lse_base", "aggregate")}
    if not set(change) & {"k", "lse_base", "aggregate"}:
        with pytest.raises(ValueError, match=message.replace("select:", "score_pages:")):
            ops.score_pages(**named)


# --- What int8 means lose: the acceptance of specs/recall.md --------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_int8_means_choose_as_exact_ones(isa: str, weight: float) -> None:
    """5: of 12 pages at least 0.95 are those that means and queries in full precision choose."""
    k, q = rotary_pages()
    dim = q.shape[1]
    entries, _, _ = ops.select(q.unsqueeze(1), *summaries_of(k, len(q)), 12, spread_weight=weight)
    mean = k.mean(1)
    spread = ((k - mean.unsqueeze(1)) ** 2).mean((1, 2))
    exact = dim**-0.5 * q @ mean.T + 0.5 * weight / dim * (q**2).sum(1, keepdim=True) * spread + math.log(16)
    best = exact.topk(12).indices
    assert (entries.long().unsqueeze(2) == best.unsqueeze(1)).any(2).float().mean() >= 0.95
