"""What may leave the Near tier goes before a step is refused: in prompts too, by plans of its own, though some may fail."""

from __future__ import annotations

import pytest
from archived import Fed, fed
from test_strata import check_stored, quick
from waiting import put_off, tables

from kvstrata import MachineError, Sequence
from kvstrata.budget import Ledger
from kvstrata.config import BudgetExceeded
from kvstrata.recall import Far


def filled(monkeypatch: pytest.MonkeyPatch) -> tuple[Fed, list[Sequence]]:
    """A cache whose Near tier is full, as for a while the disk has had no room and plans were put off."""

    def no_room(far: Far, size: int) -> int:
        raise MachineError("no room on this disk")

    pair = fed(quick(), budget="1500KiB")
    seqs = pair.new(2)
    pair.feed(seqs, [300, 300])
    monkeypatch.setattr(Far, "open", no_room)
    with pytest.raises(ValueError) as refused:
        for _ in range(400):
            pair.feed(seqs, [1, 1])
    assert isinstance(refused.value, BudgetExceeded) and "limit is 1536000 bytes" in str(refused.value)
    assert isinstance(refused.value.__cause__, MachineError)
    return pair, seqs


def test_a_tier_that_fails_is_the_reason_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what is raised. Nothing has changed, and once there is room the step goes."""
    pair, seqs = filled(monkeypatch)
    before, length = tables(pair), pair.cache.logical_length(seqs[0])
    assert length > 400 and put_off(pair)[1] > 0
    for lengths in ([1, 1], [1, 0]):
        with pytest.raises(BudgetExceeded, match="limit is 1536000 bytes, .* more are needed"):
            pair.feed(seqs, lengths)
        assert tables(pair) == before and pair.cache.logical_length(seqs[0]) == length
    check_stored(pair)
    monkeypatch.undo()
    archived = pair.cache.report().far_tokens
    for _ in range(20):
        pair.feed(seqs, [1, 1])
    assert pair.cache.report().far_tokens > archived + 1000
    check_stored(pair)


def test_what_a_role_raises_on_the_way_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, seqs = filled(monkeypatch)
    before, planner = tables(pair), pair.cache.policy.planner

    def mistaken(*_: object) -> None:
        raise KeyError("mine")

    monkeypatch.setattr(type(planner), "plan", mistaken)
    with pytest.raises(KeyError, match="mine"):
        pair.feed(seqs, [1, 1])
    assert tables(pair) == before
    check_stored(pair)


@pytest.mark.parametrize(("taken", "n"), [(700, 100), (700, 300), (780, 100), (1000, 16)])
def test_where_a_ledger_leaves_less(taken: int, n: int) -> None:
    """Another scope has taken KiB that a cache counted on: turns and decoded tokens go on with less of it Near."""
    ledger = Ledger(near="3MiB")
    pair = fed(quick(chunk=64), budget="2500KiB", ledger=ledger)
    (seq,) = pair.new()
    pair.feed([seq], [900])
    far = pair.cache.report().far_tokens
    ledger.reserve(ledger.open(name="other"), near_bytes=taken << 10).commit()
    for i in range(8):
        pair.feed([seq], [n])
        assert pair.cache.logical_length(seq) == 900 + (i + 1) * n
        assert ledger.report().near_bytes.used <= 3 << 20
    assert pair.cache.report().far_tokens > far + 1000
    check_stored(pair)


def test_plans_that_a_step_reserved_are_left_to_it() -> None:
    ledger = Ledger()
    pair = fed(quick(), budget="1500KiB", ledger=ledger)
    (seq,) = pair.new()
    pair.feed([seq], [600])
    cache, scope = pair.cache, pair.cache.scope
    assert scope is not None
    ledger.set_limit(scope, plans=ledger.report(scope).plans.used + 3)
    cache._charges.begin(0, 0, {seq.id: 1}, 2)
    with pytest.raises(BudgetExceeded, match="plans: limit is"):
        cache._plans.give_way({})
    assert cache._charges._hold is not None and cache._charges._hold.left("plans") == 2
    cache._charges.plan()
    cache._charges.plan()
    cache._charges.finish()
