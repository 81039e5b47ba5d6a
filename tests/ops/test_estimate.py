"""estimate against the reference on random summaries, poisoned wherever nothing may be read, and beside attention itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from indices import Index, make_index
from tolerances import ESTIMATE, OUT_F32, PAGE_SCORE, assert_close, assert_close_rows
from torch import Tensor

from kvstrata import ops, reference

NAN, INF = float("nan"), float("inf")
EMULATED = 0.6


def some_zone(index: Index, share: float, seed: int = 0) -> Tensor:
    """i32 [R, E] of about this share of the visible entries; the first row's is empty where there are several."""
    g = torch.Generator().manual_seed(seed)
    rows, entries = index.visible.shape
    zone = torch.full((rows, entries), -1, dtype=torch.int32)
    for r in range(min(1, rows - 1), rows):
        chosen = ((torch.rand(entries, generator=g) < share) & (index.visible[r].long() > 0)).nonzero().flatten()
        zone[r, : len(chosen)] = chosen.to(torch.int32)
    return zone


def estimate(index: Index, zone: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    return ops.estimate(index.q, index.blocks, index.visible, zone, **more)


def check(index: Index, zone: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    out, lse = estimate(index, zone, **more)
    want, want_lse = reference.estimate(index.q, index.blocks, index.visible, zone, **more)
    assert out.dtype == lse.dtype == torch.float32
    assert_close(lse, want_lse, PAGE_SCORE)
    assert_close_rows(out, want, ESTIMATE)
    return out, lse


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("entries", [1, 7, 15, 16, 17, 33, 300])
def test_sizes(isa: str, entries: int, group: int) -> None:
    index = make_index(entries, group=group, rows=3, kind="mean_value")
    for share in (0.1, 1.0):
        zone = some_zone(index, share)
        out, lse = check(index, zone)
        for threads in (2, 8):
            for a, b in zip(estimate(index, zone, threads=threads), (out, lse), strict=True):
                assert torch.equal(a, b)
        for r in range(3):
            for a, b in zip(estimate(index.row(r), zone[r : r + 1]), (out, lse), strict=True):
                assert torch.equal(a[0], b[r])


@pytest.mark.parametrize("dim", [32, 48, 96, 128, 160, 496, 512])
def test_head_dims(isa: str, dim: int) -> None:
    index = make_index(50, dim=dim, rows=1, kind="mean_value")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(replace(index, q=index.q.to(dtype)), some_zone(index, 0.6))


@pytest.mark.parametrize("more", [{"spread_weight": 0.0}, {"scale": 0.3}, {"scale": -0.1}, {"softcap": 2.0}], ids=str)
def test_what_select_has(isa: str, more: dict[str, float]) -> None:
    check(make_index(50, rows=1, kind="mean_value"), some_zone(make_index(50, rows=1, kind="mean_value"), 0.7), **more)


def test_no_entries_and_no_rows(isa: str) -> None:
    index = make_index(20, kind="mean_value")
    for width in (0, 5):
        out, lse = estimate(index, torch.full((2, width), -1, dtype=torch.int32))
        assert torch.all(out == 0) and torch.all(lse == -INF)
    none = estimate(
        replace(index, q=index.q[:0], blocks=index.blocks[:0], visible=index.visible[:0]), some_zone(index, 1)[:0]
    )
    assert none[0].shape == (0, 4, 64) and none[1].shape == (0, 4)


def test_pages_that_changed_take_no_part(isa: str) -> None:
    """A slot hidden since the summary was made, and a page hidden whole: as if they were not in the zone."""
    index = make_index(60, rows=1, holes=0.0, kind="mean_value")
    zone = torch.arange(60, dtype=torch.int32).view(1, 60)
    masks = index.visible.to(torch.int32)
    masks[0, ::7] &= masks[0, ::7] - 1
    masks[0, 3] = 0
    changed = replace(index, visible=masks.to(torch.uint16))
    stay = (masks == index.visible.to(torch.int32))[0].nonzero().flatten().to(torch.int32).view(1, -1)
    for a, b in zip(check(changed, zone), estimate(index, stay), strict=True):
        assert torch.equal(a, b)


def test_as_attention_where_a_page_is_its_mean(isa: str) -> None:
    """Pages of one key and one value each, read by attend or estimated, and either half merged with the other."""
    count, dim = 40, 64
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(count, 1, dim, generator=g).expand(-1, 16, -1).contiguous() for _ in range(2))
    pool = ops.Pool.allocate("f32", dim, count)
    pages = torch.arange(count, dtype=torch.int32).view(1, -1)
    ops.pack(k, v, pages[0], [pool])
    visible = torch.randint(1, 1 << 16, (1, count), generator=g).to(torch.uint16)
    q = torch.randn(1, 4, dim, generator=g)
    want, want_lse = ops.attend(q, pages, [pool], visible=visible)
    blocks = ops.summarize(pages, [pool], visible=visible, kind="mean_value")
    out, lse = ops.estimate(q, blocks, visible, pages)
    off = (out - want).norm(dim=-1) / want.norm(dim=-1)
    assert torch.all(off < 0.02) and torch.all((lse - want_lse).abs() < 0.02), "8-bit means"
    half = pages.masked_fill(pages >= 20, -1)
    read, read_lse = ops.attend(q, half, [pool], visible=visible)
    guess, guess_lse = ops.estimate(q, blocks, visible, pages[:, 20:].contiguous())
    merged, merged_lse = ops.merge([read, guess], [read_lse, guess_lse])
    assert torch.all((merged - want).norm(dim=-1) / want.norm(dim=-1) < 0.03)
    assert torch.all((merged_lse - want_lse).abs() < 0.02)


def test_values_that_are_no_numbers_show(isa: str) -> None:
    index = make_index(20, rows=2, holes=0.0, kind="mean_value")
    scales = index.blocks[0, 0, 32 * 64 + 192 : 32 * 64 + 256].view(torch.float32)
    scales[5] = NAN
    zone = torch.arange(20, dtype=torch.int32).expand(2, -1).contiguous()
    out, lse = estimate(index, zone)
    assert out[0].isnan().all() and out[1].isfinite().all() and lse.isfinite().all()
    assert estimate(index, zone[:, 6:].contiguous())[0].isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_keys_that_are_no_numbers_are_refused(isa: str, bad: float) -> None:
    index = make_index(33, rows=3, holes=0.0, kind="mean_value")
    index.blocks[1, 1, 16 * 64 : 16 * 64 + 64].view(torch.float32)[5] = bad
    zone = torch.arange(33, dtype=torch.int32).expand(3, -1).contiguous()
    with pytest.raises(ValueError, match="estimate: the logits of row 1, entry 21 are not finite"):
        estimate(index, zone)
    assert estimate(index, zone[:, 22:].contiguous())[0].isfinite().all()


def test_the_zone_of_select(isa: str) -> None:
    """Read pages and the zone hold all of the mass: lse_rest is the zone's, where it holds all the rest."""
    index = make_index(100, kind="mean_value")
    zone = torch.full((2, 100), -1, dtype=torch.int32)
    _, _, rest = index.select(12, zone=zone)
    out, lse = check(index, zone)
    assert_close(lse, rest.double(), 10 * OUT_F32)
    assert out.isfinite().all()


I32 = torch.int32
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 64)}, r"estimate: q is \[2, 64\], expected \[R, G, D\]"),
    ({"blocks": torch.zeros(2, 3, 1216, dtype=torch.uint8)}, r"estimate: blocks is .*1216.*bytes=2368"),
    ({"zone": torch.zeros(2, dtype=I32)}, r"estimate: zone is \[2\], expected \[R, E\]"),
    ({"zone": torch.zeros(2, 3, dtype=torch.int64)}, r"estimate: zone has dtype i64, expected i32"),
    ({"zone": torch.tensor([[0], [33]], dtype=I32)}, r"estimate: zone\[1, 0\] is 33, expected 0 to 32"),
    ({"zone": torch.tensor([[0, 1], [5, 5]], dtype=I32)}, r"estimate: zone\[1, 1\] is 5, expected 6 to 32"),
    ({"zone": torch.tensor([[-2], [0]], dtype=I32)}, r"estimate: zone\[0, 0\] is -2, expected 0 to 32"),
    ({"scale": NAN}, r"estimate: scale is nan, expected a finite number"),
    ({"spread_weight": -1.0}, r"estimate: spread_weight is -1, expected 0 or more"),
    ({"softcap": INF}, r"estimate: softcap is inf, expected 0 \(none\) or more"),
    ({"threads": -1}, r"estimate: threads is -1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_bad_input(change: dict[str, Any], message: str) -> None:
    index = make_index(33, more=0, kind="mean_value")
    arguments = {"q": index.q, "blocks": index.blocks, "visible": index.visible, "zone": some_zone(index, 0.5)} | change
    with pytest.raises(ValueError, match=message):
        ops.estimate(**arguments)
