"""score_max against the reference, and what must not change it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import devices
import pytest
import torch
from cases import SLOTS
from tolerances import SHARE, SHARE_QUANTIZED, assert_close
from torch import Tensor
from windows import FULL, Window, make_window

from kvstrata import _C, ops, reference

SIZES = [1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64]
FORMATS = [(f,) for f in (*FULL, "int8", "int4", "int2")] + [("f32", "f16", "int8", "int4", "int2")]
INF, NAN = float("inf"), float("nan")
EMULATED = 0.6


def offsets(*sizes: int) -> Tensor:
    """Of spans of these sizes, from 0 on."""
    return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def shares(case: Window, spans: Tensor, lse: Tensor, **more: Any) -> Tensor:
    out = torch.full((len(spans) - 1, *case.pages.shape, 16), NAN)
    arguments = {"visible": case.visible, "centre": case.centre, "out": out} | more
    return ops.score_max(case.q.transpose(1, 2), lse, spans, case.pages, case.pools, **arguments)


def lse_of(case: Window, own: float = 0.5) -> Tensor:
    """As if the queries' own span held e^own times what is stored; own alone where nothing is."""
    stored = case.shares(q_pos=False)[1]
    return torch.where(stored == -INF, own, stored + own).float()


def check(case: Window, spans: Tensor, **more: Any) -> Tensor:
    lse = lse_of(case)
    got = shares(case, spans, lse, **more)
    plain = {n: v for n, v in more.items() if n in ("scale", "softcap")}
    q = case.q.transpose(1, 2).double()
    ref = reference.score_max(q, lse.double(), spans.tolist(), case.k, case.slots, **plain)
    tolerance = SHARE if case.centre is None else SHARE_QUANTIZED
    assert_close(got, ref, tolerance, floor=max(1e-2 * ref.amax().item(), 1e-30))
    assert torch.all(got[~case.slots.expand_as(got)] == 0), "hidden slots score 0"
    return got


@pytest.mark.parametrize("formats", FORMATS, ids="+".join)
def test_formats(isa: str, formats: tuple[str, ...]) -> None:
    """Ragged rows of every length, hidden and empty ones, poison in unused slots."""
    check(make_window([0, *SIZES], formats=formats, masks="ragged", width=9), offsets(3, 0, 5, 1))


def test_numbers_of_queries(isa: str) -> None:
    """On both sides of a block of queries and of a tile of its rows; heads and spans end within blocks."""
    for width in (*SIZES, 65, 130):
        case = make_window([5, 2], formats=("bf16", "int4"), width=width, group=3, masks="ragged", seed=width)
        check(case, offsets(width))
        check(case, offsets(width // 3, width // 2 - width // 3, width - width // 2))


def test_head_dims(isa: str) -> None:
    for dim in (1, 2, 17, 32, 48, 80, 112, 160, 192, 256, 333, 512):
        formats = FULL if dim % 16 else FORMATS[-1]
        check(make_window([9, 4], formats=formats, dim=dim, masks="ragged", seed=dim), offsets(4, 4))


def test_groups(isa: str) -> None:
    for group in (1, 2, 3, 5, 7, 8, 16):
        check(make_window([17, 5], group=group, width=13, masks="tail1", seed=group), offsets(6, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_query_types(isa: str, dtype: torch.dtype) -> None:
    for formats in (("bf16",), FORMATS[-1]):
        case = make_window([9, 4, 33], formats=formats, width=21, masks="ragged")
        check(replace(case, q=case.q.to(dtype)), offsets(9, 12))


def test_a_real_row(isa: str) -> None:
    """2,400 tokens in bf16, four spans of 24 queries of two heads, D = 128."""
    case = make_window([150, 40], width=96, dim=128, masks="ragged", holes=0.02)
    check(replace(case, q=case.q.bfloat16()), offsets(24, 24, 24, 24))


def test_features_of_attention(isa: str) -> None:
    check(make_window([20, 7], masks="ragged"), offsets(5, 3), softcap=3.0, scale=0.5)


def test_shares_below_the_smallest_are_zero(isa: str) -> None:
    case, spans = make_window([20], spread=30.0), offsets(5, 3)
    lse = lse_of(case)
    got = shares(case, spans, lse)
    q = case.q.transpose(1, 2).double()
    size = reference.score_max(q, lse.double(), spans.tolist(), case.k, case.slots).log()
    assert torch.all(got[size < -87.1] == 0) and torch.all(got[size > -86.9] > 0) and (got == 0).any()


def test_spans(isa: str) -> None:
    """One or eight, empty ones, queries of none: those are not read."""
    case = make_window([20, 7], width=40, masks="ragged", formats=("f32", "int8"))
    check(case, offsets(40))
    got = check(case, offsets(0, 9, 0, 0, 1, 20, 10, 0))
    assert torch.all(got[[0, 2, 3, 7]] == 0)
    lse = lse_of(case)
    part = shares(case, torch.tensor([9, 10, 30], dtype=torch.int32), lse)
    case.q[:, :9], case.q[:, 30:] = NAN, NAN
    lse[:, :, :9], lse[:, :, 30:] = NAN, NAN
    assert torch.equal(shares(case, torch.tensor([9, 10, 30], dtype=torch.int32), lse), part)
    assert torch.equal(part, got[[4, 5]])


def test_permuted_spans_permute_bitwise(isa: str) -> None:
    """And the order within a span does not matter, nor that of the heads."""
    case = make_window([20, 7], width=90, group=3, masks="ragged", formats=("bf16", "f32", "int8", "int2"))
    lse, sizes = lse_of(case), [13, 40, 1, 0, 36]
    got = shares(case, offsets(*sizes), lse)
    parts = [torch.arange(a, b) for a, b in pairwise(offsets(*sizes).tolist())]
    order = [4, 2, 0, 3, 1]
    turned = torch.cat([parts[e].flip(0) for e in order])
    heads = torch.tensor([2, 0, 1])
    moved = replace(case, q=case.q[:, turned][:, :, heads].contiguous())
    again = shares(moved, offsets(*(sizes[e] for e in order)), lse[:, :, turned][:, heads].contiguous())
    assert torch.equal(again, got[order])


def test_what_lies_elsewhere_does_not_matter(isa: str) -> None:
    """Bits are the same alone or in a batch, with or without trailing -1, on any number of threads, span by span."""
    case = make_window([40, 70, 3], width=70, formats=(*FULL, "int8", "int2"), masks="ragged")
    lse, spans = lse_of(case), offsets(30, 5, 35)
    got = shares(case, spans, lse)
    for threads in (1, 2, 3, 8):
        assert torch.equal(shares(case, spans, lse, threads=threads), got)
    for r, length in enumerate((40, 70, 3)):
        alone = shares(case.row(r, length), spans, lse[r : r + 1])
        assert torch.equal(alone[:, 0], got[:, r, :length])
    for e in range(3):
        assert torch.equal(shares(case, spans[e : e + 2], lse)[0], got[e])


def test_strides(isa: str) -> None:
    case = make_window([9, 4])
    lse, spans = lse_of(case), offsets(5, 3)
    got = shares(case, spans, lse)
    q = case.q.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    wide = torch.full((2, 3, 9, 16), NAN)
    far = lse.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    assert torch.equal(shares(replace(case, q=q), spans, far, out=wide[:, :2]), got)
    assert wide[:, 2].isnan().all()


def test_holes_and_hostile_entries(isa: str) -> None:
    case = make_window([33, 33, 20, 6], holes=0.4, masks="ragged", formats=("bf16", "f32"))
    case.pages[:, -3:] = -1
    hidden = case.visible.to(torch.int32) == 0
    case.pages[hidden] = 0x6FFFFFFF
    assert hidden.sum() > 5
    check(case, offsets(4, 4))


@pytest.mark.parametrize("formats", [("f32",), ("bf16",), ("int8",), ("int4",), ("int2",)], ids="+".join)
def test_stored_and_own_shares_add_up_to_one(isa: str, formats: tuple[str, ...]) -> None:
    """Spans of one query each: shares themselves, by the log-sum-exp that attention over stored and own tokens gives."""
    case = make_window([33, 17], formats=formats, group=1, width=7, masks="tail15")
    case.q = case.q.to(torch.bfloat16 if formats == ("bf16",) else torch.float32)
    out = torch.empty(case.q.shape, dtype=torch.float32)
    more = {"visible": case.visible, "centre": case.centre, "out": out}
    stored = ops.attend(case.q, case.pages, case.pools, **more)[1].double()  # [R, W, G]
    own = torch.randn(2, 7, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lse = torch.logsumexp(torch.cat([stored.unsqueeze(-1), own], -1), -1)
    got = shares(case, offsets(*[1] * 7), lse.transpose(1, 2).float().contiguous()).double()
    total = got.sum((2, 3)).T + (own - lse.unsqueeze(-1)).exp().sum((2, 3))
    assert_close(total, torch.ones(2, 7), 1e-5)


def test_a_prompt_that_sees_itself_spreads_little(isa: str) -> None:
    """Its own tokens take all but e^-12 of the mass: over the past alone its shares would add up to one."""
    case = make_window([33], width=16)
    assert (
        shares(case, offsets(16), lse_of(case, own=12.0)).max() < 1e-3 < shares(case, offsets(16), lse_of(case)).max()
    )


def test_a_query_that_saw_nothing_takes_no_part(isa: str) -> None:
    case = make_window([9, 4], width=8, formats=("f32", "int4"))
    lse = lse_of(case)
    lse[:, :, 5:] = -INF
    got = shares(case, offsets(3, 3, 2), lse)
    case.q[:, 5:] = NAN
    assert torch.equal(shares(case, offsets(3, 3, 2), lse), got)
    assert torch.equal(got[:2], shares(case, torch.tensor([0, 3, 5], dtype=torch.int32), lse))
    assert torch.all(got[2] == 0)


@pytest.mark.parametrize("formats", [("f32",), ("int8",)], ids="+".join)
def test_a_bad_query_shows_in_its_span_and_row(isa: str, formats: tuple[str, ...]) -> None:
    case = make_window([9, 9], width=70, masks="tail15", formats=formats)
    lse, spans = lse_of(case), offsets(30, 40)
    got = shares(case, spans, lse)
    for of in ("q", "lse"):
        bad, broken = replace(case, q=case.q.clone()), lse.clone()
        if of == "q":
            bad.q[0, 2, 1, 5] = NAN
        else:
            broken[0, 1, 2] = NAN
        hurt = shares(bad, spans, broken)
        assert torch.equal(hurt[0, 0].isnan(), case.slots[0]) and torch.all(hurt[0, 0][~case.slots[0]] == 0)
        assert torch.equal(hurt[1], got[1]) and torch.equal(hurt[0, 1], got[0, 1])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_key_shows_in_its_slot(isa: str, bad: float) -> None:
    case = make_window([9, 9], formats=("f32",))
    case.q[:, 0, 0, 5] = 1.0  # so that each span has a query whose logit is inf
    case.q[:, 4, 0, 5] = 1.0
    lse, spans = lse_of(case), offsets(3, 5)
    got = shares(case, spans, lse)
    page = case.pages[0, 4]
    k, v = ops.unpack(page.view(1), case.pools)
    k[0, 3, 5] = bad
    ops.pack(k, v, page.view(1), case.pools)
    hurt = shares(case, spans, lse)
    assert torch.all(hurt[:, 0, 4, 3].isnan() if bad != INF else hurt[:, 0, 4, 3] == INF)
    hurt[:, 0, 4, 3] = got[:, 0, 4, 3]
    assert torch.equal(hurt, got)
    hidden = case.visible.clone().to(torch.int32)
    hidden[0, 4] &= ~(1 << 3)
    case.visible = hidden.to(torch.uint16)
    assert shares(case, spans, lse)[0, 0, 4, 3] == 0, "a hidden slot does not enter"


def test_empty(isa: str) -> None:
    case = make_window([4, 4], width=3)
    for empty, spans in [
        (case.row(2), offsets(3)),
        (make_window([0, 0], width=3), offsets(1, 2)),
        (replace(case, pages=torch.full_like(case.pages, -1)), offsets(3)),
        (make_window([4, 4], width=0), offsets(0, 0)),
        (case, offsets(0)),
    ]:
        got = shares(empty, spans, torch.zeros(*empty.q.transpose(1, 2).shape[:3]))
        assert torch.all(got == 0) and got.shape == (len(spans) - 1, *empty.pages.shape, 16)


def test_bad_input() -> None:
    case, spans = make_window([4, 4]), offsets(5, 3)
    lse = lse_of(case)
    for message, more in [
        (r"q is \[2, 2, 8\], expected \[R, G, W, D\]", {"q": torch.zeros(2, 2, 8)}),
        (r"q is \[3, 2, 8, 64\], expected \[R=2, G=2, W=8, D=64\]", {"q": torch.zeros(3, 2, 8, 64)}),
        (
            "q has dtype torch.float64, expected one of torch.float32",
            {"q": torch.zeros(2, 2, 8, 64, dtype=torch.float64)},
        ),
        (r"lse is \[2, 2, 7\], expected \[R=2, G=2, W=8\]", {"lse": lse[:, :, :7]}),
        (r"pages is \[8\], expected \[R, K\]", {"pages": case.pages.view(-1)}),
        (r"spans is \[1\], expected \[E \+ 1\]", {"spans": spans[:1]}),
        ("spans has dtype i64, expected i32", {"spans": spans.long()}),
        (r"spans\[0\] is -1, expected 0 to 8 \(W\)", {"spans": spans - 1}),
        (r"spans\[1\] is 2, expected 3 to 8 \(W\)", {"spans": torch.tensor([3, 2, 8], dtype=torch.int32)}),
        (r"spans\[2\] is 9, expected 5 to 8 \(W\)", {"spans": offsets(5, 4)}),
        (r"centre is \[2, 63\], expected \[R=2, D=64\]", {"centre": torch.zeros(2, 63)}),
        (r"visible is \[2, 3\], expected \[R=2, K=4\]", {"visible": case.visible[:, :3]}),
        (r"out is \[1, 2, 4, 16\], expected \[E=2, R=2, K=4, 16\]", {"out": torch.zeros(1, 2, 4, 16)}),
        ("out has stride 32 in dimension 2, expected 16", {"out": torch.zeros(2, 2, 4, 32)[..., :16]}),
        ("scale is inf, expected a finite number", {"scale": INF}),
        ("softcap is -1, expected 0", {"softcap": -1.0}),
        (
            r"pages\[1, 2\] names pool 6",
            {"pages": torch.where(torch.arange(8).view(2, 4) == 6, 0x6FFFFFFF, case.pages)},
        ),
        ("threads is 0", {"threads": 0}),
    ]:
        arguments = {"q": case.q.transpose(1, 2), "lse": lse, "spans": spans, "pages": case.pages} | more
        with pytest.raises(ValueError, match=f"score_max: {message}"):
            ops.score_max(*(arguments.pop(n) for n in ("q", "lse", "spans", "pages")), case.pools, **arguments)


def test_workspace_does_not_grow_with_the_work() -> None:
    """Half a megabyte is room for any number of queries and tokens on four threads."""
    size = _C.score_max_workspace_bytes(128, 4)
    assert _C.score_max_workspace_bytes(128, 1) * 4 == size < 1 << 19
    assert _C.score_max_workspace_bytes(127, 4) <= size <= _C.score_max_workspace_bytes(129, 4)


@pytest.mark.parametrize("dim", [32, 80, 128, 144, 512])
@pytest.mark.parametrize("fmt", ["int8", "int4", "int2"])
def test_logits_over_quantized_pages_have_the_same_bits_everywhere(
    isa: str, monkeypatch: pytest.MonkeyPatch, fmt: str, dim: int
) -> None:
    """Those of the scalar level as log-sum-exps: a share is one where the bits are the same, a last bit of 2 or more shows."""
    case = make_window([9, 4], formats=(fmt,), dim=dim, group=1, width=13, spread=8.0, seed=dim)
    z = torch.empty(2, 1, 13, 9, SLOTS)
    monkeypatch.undo()
    _C.set_isa("scalar")
    out = torch.empty(case.q.shape)
    ops.attend(case.q, case.pages, case.pools, visible=case.visible, centre=case.centre, out=out, want_logits=z)
    _C.set_isa("" if isa in devices.NAMES else isa)
    if isa in devices.NAMES:
        devices.use(isa, monkeypatch)
    for entry, slot in [(0, 0), (1, 5), (2, 10), (3, 15), (3, 1), (2, 6), (0, 11)]:
        got = shares(case, offsets(*[1] * 13), z[..., entry, slot].contiguous())
        assert torch.all(got[..., entry, slot] == 1)
    assert (z[:, :, :, :4].abs() > 2).float().mean() > 0.5
