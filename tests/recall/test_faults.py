"""Faults of steps and plans over a Far tier: what fails leaves tables, bytes and answers as they were."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from archived import ALL, EXACT, fed, ruled, sealed, small, worst
from waiting import LATE, check_planned, go_on, payloads, put_off, tables, waiting

from kvstrata.policy.base import EVICTED, FAR, FULL, GROUPED, INT8, NEAR, PROVISIONAL, PROVISIONAL_GROUP
from kvstrata.testing import fault

# Of a layer: 4 rows with 5 pages each, which are clustered; then the first row reads its own and writes 16 + 9 others.
IN_CLUSTER, IN_ROW, IN_PAGES = [1, 11, 20], [21, 23, 25], [1, 16, 17, 25]


@pytest.mark.parametrize("state", ["full", "int8"])
@pytest.mark.parametrize(
    ("point", "visits"),
    [("plan.after_check", [1]), ("plan.after_write", [1]), ("far.write", IN_PAGES), ("far.read", IN_CLUSTER + IN_ROW)],
)
def test_a_plan_that_fails_changes_nothing(point: str, visits: list[int], state: str) -> None:
    """The first row, whose pages for the time being become pages for good: no table, no page, no byte, no answer; then it goes
    on."""
    (pair, seqs), (twin, others) = waiting(state=state), waiting(state=state)
    before, bytes_before = tables(pair), payloads(pair)
    for nth in visits:
        with pytest.raises(RuntimeError, match=f"fault injected at {point}"), fault(point, nth) as armed:
            pair.cache.compress()
        assert armed.visits == nth
        assert tables(pair) == before and payloads(pair) == bytes_before
        pair.check_contents(state == "full")
        pair.check_pools()
    for planned in (False, True):
        if planned:
            pair.cache.compress()
            twin.cache.compress()
            check_planned(pair, seqs)
        for n in (1, 1, 3):
            for a, b in zip(pair.feed(seqs, [n, 1]), twin.feed(others, [n, 1]), strict=True):
                assert torch.equal(a, b)
    pair.check_contents(state == "full")
    pair.check_empty()


@pytest.mark.parametrize("far", ["auto", None])
@pytest.mark.parametrize("steps", [[640, *[16] * 20], [100, 31, 47, 64, 90, 160]])
def test_pages_for_the_time_being_become_pages_for_good(steps: list[int], far: str | None) -> None:
    """With each token's bytes as they came, whether they waited in one such page or in pages of several plans; the pages that
    held them are free."""
    pair = fed(small(interval=LATE), far=far)
    (seq,) = pair.new()
    waited = set[int]()
    for n in steps:
        pair.feed([seq], [n])
        positions, _, grouped = pair.looked(seq, 0)
        waited |= set(positions[0, grouped[0] == PROVISIONAL].tolist())
    pair.cache.compress()
    for layer, rule in enumerate(ruled(steps, interval=LATE)):
        rule.plan(sum(steps))
        assert rule.good > 0 and rule.provisional > 0
        positions, _, grouped = pair.looked(seq, layer)
        for h in range(2):
            good = set(positions[h, grouped[h] == GROUPED].tolist())
            assert len(good) == rule.good and len(good & waited) >= 80
            assert (grouped[h] == PROVISIONAL).sum() == rule.provisional
        if far is not None:
            pair.check_rule(seq, layer, rule)
    pair.check_contents()
    pair.check_pools()
    pair.check_empty()


def test_what_a_plan_may_do_with_a_far_token() -> None:
    """It goes into another group, or is evicted; neither its tier nor its format changes, with another group or without."""
    pair, (seq, _) = waiting()
    store = pair.cache._store
    _, tier, _ = pair.looked(seq, 0)
    far = (tier == FAR).nonzero()[7].tolist()

    def check(state: int, to: int, group: int) -> None:
        states, tiers, groups = torch.ones(tier.shape, dtype=torch.uint8), tier.clone(), torch.full(tier.shape, -1)
        groups = groups.to(torch.int32)
        states[*far], tiers[*far], groups[*far] = state, to, group
        store.check_plan(0, [seq.id], states.data_ptr(), tiers.data_ptr(), groups.data_ptr(), tier.shape[1], True)

    for allowed in ((FULL, FAR, -1), (FULL, FAR, 3), (FULL, FAR, PROVISIONAL_GROUP), (EVICTED, FAR, -1)):
        check(*allowed)
    for refused in ((FULL, NEAR, -1), (FULL, NEAR, 3)):
        with pytest.raises(
            ValueError, match="is 1, which changes a token of the Far tier: expected it as it is, in anot"
        ):
            check(*refused)
    for refused in ((INT8, FAR, -1), (INT8, FAR, 3), (INT8, NEAR, 3)):
        with pytest.raises(
            ValueError, match="is 2.*, expected 0 .Evicted., 1 .Full. or a quantized format of this cache"
        ):
            check(*refused)


@pytest.mark.parametrize(
    ("point", "nth"),
    [("plan.after_write", 3), ("plan.after_check", 6), ("far.write", 70), ("far.read", 29)],
)
def test_rows_before_the_one_that_fails_stay_as_planned(point: str, nth: int) -> None:
    """And answers are those of a cache that never failed, once both have planned the rest."""
    (pair, seqs), (twin, others) = waiting(), waiting()
    before = tables(pair)[0]
    with pytest.raises(RuntimeError, match=point), fault(point, nth):
        pair.cache.compress()
    changed = [now != then for now, then in zip(tables(pair)[0], before, strict=True)]
    assert any(changed) and not all(changed)
    pair.check_contents()
    pair.check_pools()
    pair.cache.compress()
    twin.cache.compress()
    for _ in range(10):
        for a, b in zip(pair.feed(seqs, [1, 1]), twin.feed(others, [1, 1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "point", ["plan.after_check", "plan.after_write", "far.write", "append.after_take", "slab.lend"]
)
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_prompt_that_fails_is_withdrawn(point: str, nth: int) -> None:
    """Older tokens stay, and are read as before."""
    pair = fed(small(ALL))
    seqs = pair.new(2)
    pair.feed(seqs, [600, 300])
    drawn = pair.generator.get_state()
    with fault(point, nth) as armed, pytest.raises(RuntimeError, match=point):
        pair.feed(seqs, [1100, 1])
    assert armed.visits == nth
    pair.generator.set_state(drawn)
    pair.check_contents()
    pair.check_pools()
    for n in (1, 600, 1, 20, 1):
        assert worst(pair, seqs, [n, 1]) < EXACT
    pair.check_contents()
    pair.check_empty()


@pytest.mark.parametrize("tokens", [1, 5, 100])
@pytest.mark.parametrize("nth", [1, 3, 9])
def test_a_page_that_cannot_be_read(tokens: int, nth: int) -> None:
    """The step's tokens are withdrawn; then answers are those of a cache that never failed."""
    (pair, seqs), (twin, others) = waiting(), waiting()
    before, drawn = tables(pair), pair.generator.get_state()
    with pytest.raises(RuntimeError, match=r"fault injected at far\.read"), fault("far.read", nth):
        pair.feed(seqs, [tokens, 1])
    pair.generator.set_state(drawn)
    assert tables(pair)[0] == before[0]
    pair.check_contents()
    pair.check_pools()
    for n in (1, 1, tokens, 1):
        for a, b in zip(pair.feed(seqs, [n, 1]), twin.feed(others, [n, 1]), strict=True):
            assert torch.equal(a, b)
    pair.check_contents()


@pytest.mark.parametrize("nth", [1, 3])
def test_decoded_tokens_stand_when_the_plan_after_them_fails(nth: int, caplog: pytest.LogCaptureFixture) -> None:
    """Each plan (the first page that it writes), or those of which more than a page of a row is written: put off and counted,
    and said once."""
    pair = fed()
    (seq,) = pair.new()
    pair.feed([seq], [300])
    failed = []
    with caplog.at_level(logging.WARNING, "kvstrata"):
        for _ in range(200):
            with fault("far.write", nth):
                if go_on(pair, seq):
                    failed.append(pair.cache.logical_length(seq))
    assert put_off(pair) == (len(failed), len(failed))
    (said,) = caplog.records
    assert re.search(
        r"the plan of layer \d failed after a step, it is put off: fault injected at far.write", said.message
    )
    assert failed == [n for n in range(301, 501) if n % 8 == 0] if nth == 1 else len(failed) > 2
    pair.check_contents()
    for _ in range(32):
        pair.feed([seq], [1])
    for layer, n in enumerate((528, 520)):
        (rule, _) = ruled([300])
        rule.plan(n)
        assert rule.archived == sealed(n)
        pair.check_rule(seq, layer, rule)
    pair.check_contents()
    pair.check_pools()


def test_a_key_that_is_no_number() -> None:
    """Steps of one token cannot rank its page: they are refused and withdrawn, and name it. Sequences without it go on."""
    pair = fed()
    seq, other = pair.new(2)
    pair.feed([other], [600])
    with pair.cache.step([seq], [600]) as step:
        for layer in range(2):
            q, k, v = pair.drawn(layer, 600)
            k[100, 0, 3] = torch.nan
            step.attend(layer, q, k, v)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="attend: layer 0, head 0 of the 0. sequence of the step: .* page of position .* are not finite",
        ):
            pair.feed([seq], [1])
        assert pair.cache.logical_length(seq) == 600
    pair.cache.free([seq])
    del pair.pieces[seq]
    pair.feed([other], [1])
    pair.check_contents()
    pair.check_pools()
