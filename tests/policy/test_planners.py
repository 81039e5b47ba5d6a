"""Planners: from bytes to pages to states. A page costs: Full 400 bytes, int8 200, int4 100, int2 60."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sight import C_FULL, C_INT2, C_INT4, C_INT8, PAGE_BYTES, allowed, row, seen_of
from torch import Tensor

from kvstrata.policy import KeepTop, QuantizeAll, ThreeStates
from kvstrata.policy.base import EVICTED, FULL, INT2, INT4, INT8, Allowance, Seen


def counts(state: Tensor | None) -> tuple[int, int, int]:
    """Full, int4 and evicted tokens."""
    assert state is not None
    return int((state == FULL).sum()), int((state == INT4).sum()), int((state == EVICTED).sum())


def planned(planner: KeepTop | ThreeStates | QuantizeAll, seen: Seen, allowance: Allowance | None) -> Tensor:
    state = planner.plan(replace(seen, allowance=allowance)).state
    assert state is not None
    return state


def falling(n: int, state: int = FULL) -> Seen:
    return row([state] * n, [float(-i) for i in range(n)])


# --- ThreeStates by hand ----------------------------------------------------------------------------------------------


def test_by_hand_all_fits_or_one_byte_less() -> None:
    """40 tokens are 3 pages. 1,200 bytes: all Full. 1,199: p_F = (1199 - 300) // 300 = 2, one int4 page, nothing evicted."""
    seen = falling(40)
    assert counts(planned(ThreeStates(), seen, allowed(1200))) == (40, 0, 0)
    state = planned(ThreeStates(), seen, allowed(1199))
    assert counts(state) == (32, 8, 0)
    assert state[0].tolist() == [FULL] * 32 + [INT4] * 8
    assert counts(planned(ThreeStates(), seen, allowed(300))) == (0, 40, 0)


def test_by_hand_the_share_buys_coverage() -> None:
    """160 tokens are 10 pages, 900 bytes do not cover them. r = 1: 2 Full pages, 100 bytes for one int4 page.
    r = .5: p_F = 450 / 250 = 1.8, one; 500 bytes for five int4 pages. r = 0: nine int4 pages."""
    seen = falling(160)
    assert counts(planned(ThreeStates(), seen, allowed(900))) == (32, 16, 112)
    assert counts(planned(ThreeStates(), seen, allowed(900, share=[0.5]))) == (16, 80, 64)
    assert counts(planned(ThreeStates(), seen, allowed(900, share=[0.0]))) == (0, 144, 16)
    assert counts(planned(ThreeStates(full_share=0.5), seen, allowed(900))) == (16, 80, 64), "the planner's own"
    assert counts(planned(ThreeStates(full_share=0.5), seen, allowed(900, share=[1.0]))) == (32, 16, 112)


def test_by_hand_unused_full_pages_become_quantized_ones() -> None:
    """128 tokens, the worst 16 still Full, the others int4 already, r = 1. 700 bytes: p_F = 1, 300 bytes for 3 int4 pages.
    820 bytes: p_F = 2, but the Full tokens fill one page only: 420 bytes, 4 int4 pages."""
    seen = row([INT4] * 112 + [FULL] * 16, [float(-i) for i in range(128)])
    assert counts(planned(ThreeStates(cover=False), seen, allowed(700))) == (16, 48, 64)
    assert counts(planned(ThreeStates(cover=False), seen, allowed(820))) == (16, 64, 48)


def test_cover_off_drops_what_could_be_quantized() -> None:
    seen = falling(160)
    assert counts(planned(ThreeStates(), seen, allowed(2000))) == (48, 112, 0)
    assert counts(planned(ThreeStates(cover=False), seen, allowed(2000))) == (80, 0, 80)


def test_a_part_filled_full_page_never_costs_a_quantized_token_its_place() -> None:
    """17 Full and 15 int4 are 32 tokens, 800 bytes hold two Full pages: both would take all. One Full token is quantized."""
    seen = row([FULL] * 17 + [INT4] * 15, [float(-i) for i in range(32)])
    assert counts(planned(ThreeStates(), seen, allowed(800))) == (16, 16, 0)
    assert counts(planned(ThreeStates(), seen, allowed(900))) == (17, 15, 0)


# --- properties ---------------------------------------------------------------------------------------------------------


def bytes_of(state: Tensor, protect: Tensor) -> Tensor:
    """Bytes of the unprotected survivors of each row, packed by format."""
    held = [((state == s) & ~protect).sum(1) for s in PAGE_BYTES]
    return sum((n + 15) // 16 * c for n, c in zip(held, PAGE_BYTES.values(), strict=True))  # type: ignore[return-value]


def random_seen(generator: torch.Generator, rows: int, tokens: int, states: tuple[int, ...]) -> Seen:
    held = torch.randint(0, tokens + 1, (rows, 1), generator=generator)
    columns = torch.arange(tokens, dtype=torch.int32).expand(rows, -1)
    positions = torch.where(columns < held, columns, -1)
    drawn = torch.tensor(states)[torch.randint(0, len(states), (rows, tokens), generator=generator)]
    drawn = torch.where(torch.rand(rows, 1, generator=generator) < 0.3, FULL, drawn)
    tail = (columns >= held - 24) & (positions >= 0)
    state = torch.where(positions < 0, EVICTED, torch.where(tail | (positions < 16), FULL, drawn)).to(torch.uint8)
    score = torch.rand(rows, tokens, generator=generator)
    return Seen(0, positions, held.flatten(), tail, state, 16, score=score)


@pytest.mark.parametrize("quantized", ["int8", "int4", "int2"])
@pytest.mark.parametrize("cover", [True, False])
def test_bytes_hold_and_cover_evicts_nothing_that_fits(quantized: str, cover: bool) -> None:
    """3,000 random rows: within their bytes always; with cover nothing goes while all fits quantized."""
    generator = torch.Generator().manual_seed(3)
    target = {"int8": INT8, "int4": INT4, "int2": INT2}[quantized]
    seen = random_seen(generator, 3000, 150, (FULL, target))
    b = torch.randint(0, 10 * C_FULL, (3000,), generator=generator)
    allowance = Allowance(b, PAGE_BYTES, torch.rand(3000, generator=generator))
    state = planned(ThreeStates(quantized, cover), seen, allowance)
    assert (bytes_of(state, seen.protected) <= b).all()
    movable = seen.stored & ~seen.protected
    pages = (movable.sum(1) + 15) // 16
    gone = (movable & (state == EVICTED)).any(1)
    fits = pages * PAGE_BYTES[target] <= b if cover else pages * C_FULL <= b
    assert fits.any() and not gone[fits].any()
    same = (pages * C_FULL <= b) & (((seen.state == FULL) | ~movable).all(1))
    assert same.any() and torch.equal(state[same], seen.state[same]), "all Full, and all fits: as it is"


def test_bytes_hold_with_every_format_in_a_row() -> None:
    generator = torch.Generator().manual_seed(4)
    seen = random_seen(generator, 3000, 150, (FULL, INT8, INT4, INT2))
    b = torch.randint(0, 10 * C_FULL, (3000,), generator=generator)
    for planner in (ThreeStates("int4"), ThreeStates("int8"), ThreeStates("int2"), QuantizeAll("int4"), KeepTop()):
        state = planned(planner, seen, Allowance(b, PAGE_BYTES))
        assert (bytes_of(state, seen.protected) <= b).all()


def test_shares_on_the_edge_of_a_page() -> None:
    """p_F where r * b / (r * c_F + (1 - r) * c_Q) is whole: no page is lost to rounding."""
    for pages in (1, 3, 7, 1000):
        for r in (0.25, 0.5, 0.75, 1.0):
            b = round(pages * (r * C_FULL + (1 - r) * C_INT4) / r)
            if b * r / (r * C_FULL + (1 - r) * C_INT4) == pages:
                full = torch.tensor([10**6])
                got, _ = ThreeStates(cover=False).pages(allowed(b, share=[r]), full, full, INT4)
                assert int(got) == pages


def test_a_row_takes_the_first_format_that_holds_enough() -> None:
    """Of 160 tokens a third is 53.3: four int4 pages hold enough of them, three do not; each row by itself."""
    seen = falling(160)
    planner = ThreeStates(("int8", "int4", "int2"), held=1 / 3, full_share=0.0)
    for b, state, pages in ((800, INT8, 4), (799, INT4, 7), (400, INT4, 4), (399, INT2, 6), (60, INT2, 1)):
        found = planned(planner, seen, allowed(b))
        assert torch.equal(found[0] == state, torch.arange(160) < 16 * pages), b
        assert int((found == EVICTED).sum()) == 160 - 16 * pages
    both = replace(seen, **{n: getattr(seen, n).repeat(3, 1) for n in ("positions", "open", "state", "score")})
    both = replace(both, lengths=torch.tensor([160, 160, 30]))
    found = planned(planner, both, allowed(400, 399, 399, share=[0.0, 0.0, 0.0]))
    assert [int(row.max()) for row in found] == [INT4, INT2, INT8], "a short sequence needs less to hold a third"
    assert torch.equal(found[:1], planned(planner, seen, allowed(400))), "as it is alone"


def test_one_byte_more_never_keeps_fewer_tokens() -> None:
    """Rows that hold int2 tokens stay int2, however much there is: tokens of fewer bits would be counted as int4 pages."""
    seen = falling(1600, INT2)
    planner, kept = ThreeStates(("int4", "int2"), held=1 / 5), 0
    for b in range(0, 12000, 37):
        state = planned(planner, seen, allowed(b))
        assert int((state != EVICTED).sum()) >= kept
        kept = int((state != EVICTED).sum())
        assert kept == min(1600, b // C_INT2 * 16)


def test_nothing_to_decide_is_the_identity() -> None:
    """Sinks and tail only; no allowance; an allowance below nothing."""
    seen = replace(seen_of(torch.Generator().manual_seed(5), tokens=20, sinks=4), score=torch.zeros(3, 20))
    for planner in (KeepTop(), ThreeStates(), QuantizeAll()):
        assert torch.equal(planned(planner, seen, allowed(0, 0, 0)), seen.state)
        assert torch.equal(planned(planner, seen, allowed(-500, 0, 0)), seen.state)
    assert KeepTop().plan(seen).state is None and ThreeStates().plan(seen).state is None


def test_formats_of_the_allocator_are_followed() -> None:
    """Where the knapsack has decided, bits still only fall, and protected tokens stay."""
    seen = row([FULL, FULL, INT8, INT4, FULL, FULL], [0.0] * 6)
    seen = replace(seen, sinks=1)
    formats = torch.tensor([[EVICTED, INT4, INT4, FULL, FULL, EVICTED]], dtype=torch.uint8)
    state = planned(ThreeStates(), seen, allowed(0, formats=formats))
    assert state.tolist() == [[FULL, INT4, INT4, INT4, FULL, EVICTED]]
    with pytest.raises(ValueError, match=r"KeepTop: the allocator names a quantized format"):
        planned(KeepTop(), seen, allowed(0, formats=formats))
    whole = torch.where(formats > FULL, FULL, formats).to(torch.uint8)
    assert planned(KeepTop(), falling(6), allowed(0, formats=whole)).tolist() == whole.tolist()


# --- KeepTop, QuantizeAll -----------------------------------------------------------------------------------------------


def test_keep_top_keeps_whole_pages() -> None:
    seen = falling(100)
    assert counts(planned(KeepTop(), seen, allowed(3 * C_FULL + 399))) == (48, 0, 52)
    assert planned(KeepTop(), seen, allowed(C_FULL))[0].tolist() == [FULL] * 16 + [EVICTED] * 84


def test_quantize_all_keeps_the_newest_under_a_limit() -> None:
    seen = row([FULL] * 50 + [INT2] * 10)
    assert planned(QuantizeAll("int4"), seen, None)[0].tolist() == [INT4] * 50 + [INT2] * 10
    state = planned(QuantizeAll("int4"), falling(50), allowed(2 * C_INT4 + 99))
    assert state[0].tolist() == [EVICTED] * 18 + [INT4] * 32
    assert planned(QuantizeAll("int2"), seen, allowed(4 * C_INT2))[0].tolist() == [INT2] * 60
    assert planned(QuantizeAll("int8"), falling(20), allowed(C_INT8))[0].tolist() == [0] * 4 + [INT8] * 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThreeStates("int5"), r"ThreeStates: quantized is 'int5', expected one of int8, int4, int2"),
        (lambda: ThreeStates(("int2", "int4")), r"quantized is \('int2', 'int4'\), .* or some of them in this order"),
        (lambda: ThreeStates(()), r"ThreeStates: quantized is \(\), expected"),
        (lambda: ThreeStates(held=-0.1), r"ThreeStates: held is -0.1, expected 0 to 1"),
        (lambda: ThreeStates(full_share=1.5), r"ThreeStates: full_share is 1.5, expected 0 to 1"),
        (lambda: QuantizeAll("full"), r"QuantizeAll: format is 'full', expected one of int8, int4, int2"),
        (lambda: KeepTop().plan(replace(row([FULL]), allowance=allowed(0))), r"KeepTop: there are no scores"),
        (lambda: ThreeStates().plan(replace(row([FULL]), allowance=allowed(0))), r"ThreeStates: there are no scores"),
    ],
)
def test_bad_parameters_are_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
