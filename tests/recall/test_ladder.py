"""Ladder: which pages stay Full and Near and which go down, on rows made by hand, beside a plain account of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from archived import seen
from torch import Tensor

from kvstrata.policy.base import (
    FAR,
    FULL,
    GROUPED,
    INT4,
    INT8,
    NEAR,
    PROVISIONAL,
    PROVISIONAL_GROUP,
    UNGROUPED,
    Allowance,
    Plan,
    Policy,
    Seen,
)
from kvstrata.policy.strata import strata
from kvstrata.recall import Archive, Ladder, PageMass, Position
from kvstrata.recall.ladder import MOVED

PAGE = 1000
"""Bytes of a Full page in these tests."""
PLENTY = 1 << 20


def allowed(rows: int, pages: int | list[int], spare: int = PLENTY, more: int = 0) -> Allowance:
    """So many Full pages for each row, and ``more`` bytes, and so many new ones beside those that they replace."""
    each = torch.tensor([pages] * rows if isinstance(pages, int) else pages) * PAGE + more
    return Allowance(each, {FULL: PAGE, INT8: 300, INT4: 200}, spare=spare * PAGE + more)


def planned(ladder: Ladder, before: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """State, tier and group of the plan."""
    plan = ladder.plan(before)
    assert plan.state is not None and plan.tier is not None and plan.group is not None
    assert (plan.state.dtype, plan.tier.dtype, plan.group.dtype) == (torch.uint8, torch.uint8, torch.int32)
    assert plan.state.shape == plan.tier.shape == plan.group.shape == before.positions.shape
    return plan.state, plan.tier, plan.group


def near(before: Seen) -> Seen:
    """All of it Full and Near, put together or not."""
    stored = before.stored.to(torch.uint8)
    return replace(before, state=stored * FULL, tier=torch.zeros_like(stored))


def scored(before: Seen, allowance: Allowance | None, score: Tensor) -> Seen:
    return replace(before, allowance=allowance, score=score.to(torch.float32))


# --- an account of one row ------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """Columns of a row's page, of which a plan decides."""

    number: int
    new: bool
    columns: list[int]
    mass: float
    whole: bool
    """Full and Near, all of it."""


def pages_of(before: Seen, group: Tensor, row: int) -> Iterator[Page]:
    """Those that ``group`` makes anew, and those that are together already and Near, sinks and tail excepted."""
    assert before.tier is not None and before.grouped is not None and before.entry is not None
    found: dict[tuple[int, bool], list[int]] = {}
    for c in range(before.positions.shape[1]):
        if before.positions[row, c] < before.sinks or before.open[row, c]:
            continue
        if group[row, c] >= 0:
            found.setdefault((int(group[row, c]), True), []).append(c)
        elif before.grouped[row, c] != UNGROUPED and before.tier[row, c] == NEAR:
            first = MOVED if before.grouped[row, c] == GROUPED else PROVISIONAL_GROUP + MOVED
            found.setdefault((first + int(before.entry[row, c]), False), []).append(c)
    for (number, new), columns in sorted(found.items()):
        mass = 0.0 if before.score is None else float(before.score[row, columns].double().sum())
        whole = all(before.state[row, c] == FULL and before.tier[row, c] == NEAR for c in columns)
        yield Page(number, new, columns, mass, whole)


def held(before: Seen, row: int) -> set[int]:
    """Entries of the row's Near pages that plans have made."""
    assert before.tier is not None and before.grouped is not None and before.entry is not None
    near = before.stored[row] & (before.tier[row] == NEAR) & (before.grouped[row] != UNGROUPED)
    return set(before.entry[row][near].tolist())


def account(ladder: Ladder, before: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """State, tier and group as they should be planned; pages of new tokens are Archive's."""
    group = Archive(ladder.packer, ladder.state, ladder.segment, ladder.segment_min).plan(before).group
    assert group is not None and before.tier is not None
    state, tier, out = before.state.clone(), before.tier.clone(), torch.full_like(group, -1)
    for r in range(len(group)):
        pages, most, most_new = list(pages_of(before, group, r)), 0, 0
        if before.allowance is not None:
            most, most_new = max(0, int(before.allowance.bytes[r])) // PAGE, before.allowance.spare // PAGE
        most_new += max(0, most - len(held(before, r)))
        for page in sorted(pages, key=lambda p: (-p.mass, p.number)):
            stays = page.whole and most > 0 and (most_new > 0 or not page.new)
            if stays:
                most, most_new = most - 1, most_new - page.new
            else:
                state[r, page.columns], tier[r, page.columns] = ladder.native_state, FAR
            if page.new or not stays:
                out[r, page.columns] = page.number
    return state, tier, out


def drawn(seed: int, state: int) -> Seen:
    """Ragged rows of sinks, pages in table order as plans leave them, and tail: Near and Full, or Far; some without sinks."""
    dice = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(0, most, (1,), generator=dice))

    rows = [2 + number(60) for _ in range(1 + number(4))]
    columns = 16 * max(rows)
    shape = (len(rows), columns)
    positions, entry = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int32)
    states, tier, grouped = (torch.zeros(shape, dtype=torch.uint8) for _ in range(3))
    tail = torch.zeros(shape, dtype=torch.bool)
    for r, pages in enumerate(rows):
        at, sinks, length = 0, 2 * number(2), 0
        for e in range(pages):
            is_sink, is_tail = e < sinks, e >= pages - 1 - number(2)
            n = 16 if is_sink or number(3) else 1 + number(16)
            here = slice(at, at + n)
            length += number(20) * (not is_sink)
            length = max(length, 32) if not is_sink else length
            positions[r, here], entry[r, here] = torch.arange(length, length + n), e
            states[r, here], tail[r, here] = FULL, is_tail
            at, length = at + n, length + n
            if not is_sink and not is_tail:
                grouped[r, here] = (GROUPED, PROVISIONAL, UNGROUPED)[number(3)]
                if grouped[r, at - 1] != UNGROUPED and number(2):
                    tier[r, here], states[r, here] = FAR, state
    score = torch.rand(shape, generator=dice) * (positions >= 0)
    score[torch.rand(shape, generator=dice) < 0.1] = (torch.nan, -torch.inf, 0.0)[number(3)] if number(2) else 0.5
    lengths = torch.tensor(rows) * 16
    each = torch.tensor([number(50) * PAGE + number(PAGE) - 3 * PAGE for _ in rows])
    allowance = Allowance(each, {FULL: PAGE, state: 300} | {FULL: PAGE}, spare=number(2 * 30 * PAGE) // (1 + number(3)))
    return Seen(0, positions.int(), lengths, tail, states, 32, score, allowance, None, tier, grouped, entry)


# --- what must hold ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "native"), [("full", FULL), ("int8", INT8), ("int4", INT4)])
@pytest.mark.parametrize("least", [256, 768])
def test_any_rows(least: int, state: str, native: int) -> None:
    """What the account says; no token without a state, no more bits than before, nothing comes back, no page too many stays
    and none has more than 16 tokens."""
    ladder, kept, gone = Ladder(Position(), state, 768, least), 0, 0
    for seed in range(7):
        before = drawn(seed, native)
        clean = replace(before, score=before.score.nan_to_num(0.0, 0.0, 0.0))  # type: ignore[union-attr]
        got, want = planned(ladder, before), account(ladder, clean)
        for name, a, b in zip(("state", "tier", "group"), got, want, strict=True):
            assert torch.equal(a, b), (seed, name)
        now, tier, group = got
        assert before.tier is not None and before.allowance is not None and before.grouped is not None
        assert ((now > 0) == before.stored).all() and (now >= before.state).all()
        assert (tier >= before.tier).all() and (now[tier == FAR] == native).all()
        assert (group[before.protected | ~before.stored] == -1).all()
        for r in range(len(now)):
            numbers, sizes = group[r][group[r] >= 0].unique(return_counts=True)
            assert len(numbers) == 0 or int(sizes.max()) <= 16
            stays = before.stored[r] & ~before.protected[r] & (tier[r] == NEAR)
            stays &= (group[r] >= 0) | (before.grouped[r] != UNGROUPED)
            new = group[r][stays & (group[r] >= 0)].unique()
            old = before.entry[r][stays & (group[r] < 0)].unique()  # type: ignore[index]
            most = max(0, int(before.allowance.bytes[r])) // PAGE
            assert len(new) + len(old) <= most
            assert len(new) <= max(0, most - len(held(before, r))) + before.allowance.spare // PAGE
            kept, gone = kept + len(new) + len(old), gone + int((tier[r] > before.tier[r]).sum())
    assert kept > 50 and gone > 500


def test_the_pages_of_highest_mass_stay() -> None:
    """As many as the row's bytes pay, by the sum over their tokens; what they fall short of a page buys nothing."""
    before = near(seen(torch.arange(32 + 20 * 16 + 16).repeat(3, 1), 16))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    score = torch.zeros(before.positions.shape)
    for place, page in enumerate(order.tolist()):  # one token has it all, or all have some
        at = 32 + 16 * page
        score[:, at : at + 16] = (20 - place) / 16 if place % 2 else 0.0
        score[:, at + 5] += 0.0 if place % 2 else 20 - place
    score[:, :32], score[:, -16:] = 1e6, 1e6
    allowance = allowed(3, [0, 7, 19], more=PAGE - 1)
    state, tier, group = planned(Ladder(Position()), scored(before, allowance, score))
    assert torch.equal(group[0, 32:-16], PROVISIONAL_GROUP + torch.arange(320, dtype=torch.int32) // 16), "all are new"
    for r, most in enumerate((0, 7, 19)):
        stays = sorted((order[:most] * 16 + 32).tolist())
        down = torch.ones(368, dtype=torch.bool)
        down[:32] = down[-16:] = False
        for at in stays:
            down[at : at + 16] = False
        assert torch.equal(tier[r] == FAR, down) and torch.equal(state[r] == INT8, down)
        assert torch.equal(state[r] == FULL, ~down)
    more = planned(Ladder(Position()), scored(before, allowed(3, 20), score))
    assert (more[1] == NEAR).all() and (more[0] == FULL).all()


def test_ties_go_to_the_lower_page() -> None:
    before = near(seen(torch.arange(32 + 20 * 16 + 16)[None], 16))
    score = torch.full(before.positions.shape, 0.25)
    _, tier, _ = planned(Ladder(Position()), scored(before, allowed(1, 6), score))
    assert (tier[0, 32:128] == NEAR).all() and (tier[0, 128:352] == FAR).all()
    grouped = torch.zeros(before.positions.shape, dtype=torch.uint8)
    grouped[0, 32:352] = GROUPED
    again = near(replace(before, grouped=grouped))
    _, tier, group = planned(Ladder(Position()), scored(again, allowed(1, 6), score))
    assert (tier[0, 32:128] == NEAR).all() and (tier[0, 128:352] == FAR).all()
    assert (group[0, :128] == -1).all(), "what stays is not touched"


@pytest.mark.parametrize("grouping", [GROUPED, PROVISIONAL])
def test_pages_that_are_together_go_down_as_they_are(grouping: int) -> None:
    """Whole, for good or for the time being as they were."""
    grouped = torch.zeros(1, 32 + 12 * 16 + 16, dtype=torch.uint8)
    grouped[0, 32:-16] = grouping
    before = near(seen(torch.arange(grouped.shape[1])[None], 16, grouped))
    score = torch.arange(grouped.shape[1])[None] * 1.0
    state, tier, group = planned(Ladder(Position(), segment_min=4096), scored(before, allowed(1, 5, 0), score))
    down = torch.arange(32, 32 + 7 * 16)
    assert (tier[0] == FAR).nonzero().flatten().tolist() == (state[0] == INT8).nonzero().flatten().tolist()
    assert (
        (tier[0] == FAR).nonzero().flatten().tolist() == (group[0] >= 0).nonzero().flatten().tolist() == down.tolist()
    )
    assert group[0, down].unique_consecutive(return_counts=True)[1].tolist() == [16] * 7
    assert ((group[0, down] >= PROVISIONAL_GROUP) == (grouping == PROVISIONAL)).all()


def test_what_is_quantized_and_near_stays() -> None:
    """It is where there is no Far tier: it would be written anew at every plan, and nothing gained."""
    grouped = torch.zeros(1, 32 + 12 * 16 + 16, dtype=torch.uint8)
    grouped[0, 32:-48] = GROUPED
    before = near(seen(torch.arange(grouped.shape[1])[None], 16, grouped))
    before.state[0, 32:128] = INT8
    score = torch.zeros(before.positions.shape)
    for allowance in (None, allowed(1, 1)):
        state, tier, group = planned(Ladder(Position()), scored(before, allowance, score))
        assert (group[0, 32:128] == -1).all() and (tier[0, 32:128] == NEAR).all() and (state[0, 32:128] == INT8).all()
        assert (group[0, 144:224] >= 0).all()


@pytest.mark.parametrize("spare", [0, 1, 4, 30])
@pytest.mark.parametrize("most", [18, 20, 23])
def test_new_pages_that_there_is_room_for(most: int, spare: int) -> None:
    """They stand beside what they replace: as many of the best stay as the row has bytes for beside the 20 pages that are
    together already, and the spare ones; of those, as many as there are bytes."""
    grouped = torch.zeros(1, 32 + 30 * 16 + 16, dtype=torch.uint8)
    grouped[0, 32 : 32 + 20 * 16] = GROUPED
    before = near(seen(torch.arange(grouped.shape[1])[None], 16, grouped))
    score = torch.arange(grouped.shape[1])[None] * 1.0  # the new ones are the best
    _, tier, group = planned(Ladder(Position()), scored(before, allowed(1, most, spare), score))
    new, stays = min(spare + max(0, most - 20), 10), (tier[0, 32:-16] == NEAR).view(30, 16)
    old = min(20, most - new)
    assert stays.all(1).tolist() == stays.any(1).tolist()
    assert stays[:, 0].tolist() == [False] * (20 - old) + [True] * old + [False] * (10 - new) + [True] * new
    assert (group[0, 352:512] >= 0).all(), "each of them is made"


def test_pages_that_are_put_together_anew_are_held_meanwhile() -> None:
    """They are paid for until the plan is done, so that there is no room beside them but the spare bytes."""
    grouped = torch.zeros(1, 32 + 16 * 16 + 16, dtype=torch.uint8)
    grouped[0, 32:-32] = PROVISIONAL
    before = near(seen(torch.arange(grouped.shape[1])[None], 16, grouped))
    score = torch.arange(grouped.shape[1])[None] * 1.0
    for most, spare in ((15, 0), (15, 5), (18, 0), (18, 20)):
        sight = scored(before, allowed(1, most, spare), score)
        _, tier, group = planned(Ladder(Position(), segment=256, segment_min=256), sight)
        stays = (tier[0, 32:-16] == NEAR).view(16, 16)[:, 0].tolist()
        new = min(most - 15 + spare, most, 16)
        assert (group[0, 32:-16] >= 0).all()
        assert stays == [False] * (16 - new) + [True] * new


@pytest.mark.parametrize("what", ["far", "quantized"])
def test_a_new_page_of_which_a_part_is_down_goes_down(what: str) -> None:
    """However high its mass: nothing comes back, and a token's bits only fall."""
    grouped = torch.zeros(1, 32 + 256 + 16, dtype=torch.uint8)
    grouped[0, 32:80] = PROVISIONAL
    before = near(seen(torch.arange(grouped.shape[1])[None], 16, grouped))
    assert before.tier is not None
    (before.tier if what == "far" else before.state)[0, 40:44] = FAR if what == "far" else INT8
    score = torch.zeros(grouped.shape)
    score[0, 32:48] = 100.0
    state, tier, _ = planned(Ladder(Position(), segment=256, segment_min=256), scored(before, allowed(1, 100), score))
    assert (tier[0, 32:48] == FAR).all() and (state[0, 32:48] == INT8).all()
    assert (tier[0, 48:] == NEAR).all() and (state[0, 48:] == FULL).all()


def test_without_an_allowance_or_a_score_all_goes_far() -> None:
    """As Archive plans it; what is together and Near yet goes too."""
    grouped = torch.zeros(2, 700, dtype=torch.uint8)
    grouped[1, 32:112] = PROVISIONAL
    before = seen(torch.arange(700).repeat(2, 1), 28, grouped, INT8)
    plan: Plan = Archive(Position(), "int8", 1024, 256).plan(before)
    for sight in (before, replace(before, score=torch.ones(2, 700)), replace(before, allowance=allowed(2, 9))):
        for a, b in zip(
            planned(Ladder(Position(), "int8", 1024, 256), sight), (plan.state, plan.tier, plan.group), strict=True
        ):
            assert b is not None and torch.equal(a, b)
    grouped[0, 32:352] = GROUPED
    _, tier, group = planned(Ladder(Position(), segment_min=1024), near(replace(before, grouped=grouped)))
    sealed = (before.positions >= 32) & ~before.open
    assert torch.equal(tier == FAR, sealed) and torch.equal(group >= 0, sealed)


def test_scores_that_are_no_numbers_count_nothing() -> None:
    before = near(seen(torch.arange(32 + 64 + 16)[None], 16))
    score = torch.full(before.positions.shape, 0.1)
    score[0, 32], score[0, 50], score[0, 70] = torch.nan, torch.inf, -torch.inf
    score[0, 80:96] = 0.099
    _, tier, _ = planned(Ladder(Position()), scored(before, allowed(1, 1), score))
    assert (tier[0] == NEAR).nonzero().flatten().tolist() == [*range(32), *range(80, 112)]


def test_a_row_with_nothing_to_plan() -> None:
    """Sinks and tail alone, or no token."""
    before = near(seen(torch.cat([torch.arange(48)[None], torch.full((1, 48), -1)]), 16))
    state, tier, group = planned(Ladder(Position()), scored(before, allowed(2, 3), torch.rand(2, 48)))
    assert torch.equal(state, before.state) and (tier == NEAR).all() and (group == -1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0}, "PageMass: queries is 0, expected >= 1"),
        ({"queries": 17}, "policy strata: scores 17 window queries, expected at most 16"),
        ({"state": "int3"}, "state is 'int3', expected 'full' or one of int8, int4, int2"),
        ({"budget": 78}, "budget is 78 tokens, expected at least 79"),
        ({"near_pages": 3}, "near_pages is 3, expected 0, or at least the 12 pages"),
        ({"segment_min": 100}, "segment_min is 100, expected a positive multiple of 256"),
        ({"sinks": 8}, "sinks is 8, window 16, expected multiples of 16"),
    ],
)
def test_parameters_that_are_refused(settings: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        strata(**settings)


def test_page_mass_needs_summaries() -> None:
    with pytest.raises(ValueError, match="policy mine: PageMass reads summaries, expected a selector"):
        Policy("mine", Ladder(), PageMass(), formats=("int8",), sinks=32, window=16)
