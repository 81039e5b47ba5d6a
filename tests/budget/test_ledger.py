"""The ledger: nothing above a limit, ever; nothing lost, whatever fails."""

from __future__ import annotations

import pytest

from kvstrata import BudgetExceeded, Unsupported
from kvstrata.budget import Ledger, Regime, Scope


def state(ledger: Ledger) -> list[tuple]:  # type: ignore[type-arg]
    return [(n.scope.id, r, c.limit, c.used, c.reserved) for n in ledger._nodes.values() for r, c in n.counters.items()]


def family(ledger: Ledger) -> tuple[Scope, Scope, Scope]:
    cache = ledger.open(name="cache", near_bytes=800)
    sequence = ledger.open(cache, "sequence", near_bytes=500)
    return cache, sequence, ledger.open(sequence, "branch")


def test_a_tree_of_levels() -> None:
    ledger = Ledger(near="1KiB")
    cache, sequence, branch = family(ledger)
    twig = ledger.open(branch)
    assert [s.level for s in (ledger.root, cache, sequence, branch, twig)] == [
        "global",
        "cache",
        "sequence",
        "branch",
        "branch",
    ]
    assert ledger.report().near_bytes.limit == 1024


def test_commit_counts_in_every_ancestor() -> None:
    ledger = Ledger(near=1000)
    cache, sequence, branch = family(ledger)
    hold = ledger.reserve(branch, near_bytes=300, decode_tokens=4)
    assert ledger.report(cache).near_bytes.reserved == 300
    hold.draw(near_bytes=100, disk_bytes=0)
    assert (hold.left("near_bytes"), ledger.report(branch).near_bytes.used) == (200, 100)
    hold.commit(near_bytes=50)
    for scope in (ledger.root, cache, sequence, branch):
        report = ledger.report(scope)
        assert (report.near_bytes.used, report.near_bytes.reserved, report.near_bytes.high_water) == (150, 0, 150)
        assert report.near_bytes.own == (150 if scope == branch else 0)
        assert (report.decode_tokens.used, report.decode_tokens.remaining) == (4, None)
    ledger.free(branch, near_bytes=150)
    assert ledger.report().near_bytes.used == 0 and ledger.report().near_bytes.high_water == 150
    assert ledger.report(sequence).near_bytes.remaining == 500


@pytest.mark.parametrize(
    ("owner", "asked", "message"),
    [
        ("branch", 501, "sequence 'sequence', near_bytes: limit is 500, used 0, reserved 0, asked 501"),
        ("cache", 801, "cache 'cache', near_bytes: limit is 800"),
        ("global", 1001, "global 'global', near_bytes: limit is 1000"),
    ],
)
def test_the_tightest_ancestor_decides_and_nothing_changes(owner: str, asked: int, message: str) -> None:
    ledger = Ledger(near=1000)
    cache, _, branch = family(ledger)
    scope = {"branch": branch, "cache": cache, "global": ledger.root}[owner]
    before = state(ledger)
    with pytest.raises(BudgetExceeded, match=message):
        ledger.reserve(scope, far_bytes=7, near_bytes=asked)
    assert state(ledger) == before
    ledger.reserve(scope, near_bytes=asked - 1).rollback()
    assert state(ledger) == before


def test_children_may_add_up_to_more_than_the_parent() -> None:
    ledger = Ledger(near=100)
    first, second = ledger.open(near_bytes=80), ledger.open(near_bytes=80)
    ledger.reserve(first, near_bytes=80)
    with pytest.raises(
        BudgetExceeded, match="global 'global', near_bytes: limit is 100, used 0, reserved 80, asked 21"
    ):
        ledger.reserve(second, near_bytes=21)
    with pytest.raises(ValueError, match="near_bytes is 21, expected at most the 20 that global 'global' has left"):
        ledger.open(near_bytes=21)


def test_a_hold_ends_once() -> None:
    ledger = Ledger(near=100)
    for end in ("commit", "rollback"):
        hold = ledger.reserve(ledger.root, near_bytes=10)
        getattr(hold, end)()
        for verb in (hold.commit, hold.draw, hold.rollback):
            with pytest.raises(ValueError, match="it has ended"):
                verb()
    assert ledger.report().near_bytes.used == 10
    hold = ledger.reserve(ledger.root, near_bytes=10)
    before = state(ledger)
    for verb in (hold.commit, hold.draw):
        with pytest.raises(ValueError, match="10 of near_bytes are left, asked 11"):
            verb(near_bytes=11)
        with pytest.raises(ValueError, match="0 of far_bytes are left"):
            verb(far_bytes=1)
    assert state(ledger) == before


def test_with_rolls_back() -> None:
    ledger = Ledger(near=100)
    with pytest.raises(ZeroDivisionError), ledger.reserve(ledger.root, near_bytes=60) as hold:
        hold.draw(near_bytes=20)
        raise ZeroDivisionError
    assert (ledger.report().near_bytes.used, ledger.report().near_bytes.reserved) == (20, 0), "what was drawn stays"
    with ledger.reserve(ledger.root, near_bytes=60):
        pass
    with ledger.reserve(ledger.root, near_bytes=60) as hold:
        hold.commit(near_bytes=5)
    assert (ledger.report().near_bytes.used, ledger.report().near_bytes.reserved) == (25, 0)


def test_consumed_is_limited_and_never_returns() -> None:
    ledger = Ledger(prefill_tokens=100)
    scope = ledger.open()
    ledger.reserve(scope, prefill_tokens=70).commit()
    with pytest.raises(BudgetExceeded, match="prefill_tokens: limit is 100, used 70, reserved 0, asked 31"):
        ledger.reserve(scope, prefill_tokens=31)
    with pytest.raises(ValueError, match="prefill_tokens is consumed and never returns"):
        ledger.free(scope, prefill_tokens=1)
    ledger.close(scope)
    assert ledger.report().prefill_tokens.used == 70


def test_only_the_owner_frees() -> None:
    ledger = Ledger()
    cache, _, branch = family(ledger)
    ledger.reserve(branch, near_bytes=10).commit()
    before = state(ledger)
    with pytest.raises(ValueError, match="cache 'cache' holds 0 of near_bytes, asked to free 10"):
        ledger.free(cache, near_bytes=10)
    with pytest.raises(ValueError, match="holds 10 of near_bytes, asked to free 11"):
        ledger.free(branch, near_bytes=11)
    assert state(ledger) == before


def test_no_limit_admits_everything_and_counts() -> None:
    ledger = Ledger(near=10)
    with pytest.raises(BudgetExceeded):
        ledger.reserve(ledger.root, near_bytes=1 << 50)
    ledger.set_limit(ledger.root, near_bytes=None)
    ledger.reserve(ledger.root, near_bytes=1 << 50).commit()
    report = ledger.report()
    assert (report.near_bytes.used, report.near_bytes.remaining, report.regime) == (1 << 50, None, Regime.HIGH)
    with pytest.raises(ValueError, match="near_bytes is 10, expected at least used 1125899906842624"):
        ledger.set_limit(ledger.root, near_bytes=10)


def test_a_limit_is_set_under_what_is_held_only_by_shrinking() -> None:
    ledger = Ledger(near=100)
    scope = ledger.open(near_bytes=80)
    ledger.reserve(scope, near_bytes=60).commit()
    with pytest.raises(ValueError, match="near_bytes is 50, expected at least used 60"):
        ledger.set_limit(scope, near_bytes=50)
    with pytest.raises(Unsupported, match="has no on_shrink"):
        ledger.set_limit(scope, near_bytes=50, shrink=True)
    freed = []

    def free(owner: Scope, resource: str, limit: int) -> None:
        freed.append((resource, limit))
        ledger.free(owner, near_bytes=5)

    ledger.on_shrink(scope, free)
    with pytest.raises(ValueError, match="used 55"):
        ledger.set_limit(scope, near_bytes=50, shrink=True)
    ledger.set_limit(scope, near_bytes=50, shrink=True)
    ledger.set_limit(scope, near_bytes=70, shrink=True)
    assert freed == [("near_bytes", 50)] * 2
    with pytest.raises(ValueError, match="expected at most the 100"):
        ledger.set_limit(scope, near_bytes=101)


def test_a_grant_holds_its_limit_in_the_parent() -> None:
    ledger = Ledger(near=100, plans=10)
    cache = ledger.open(near_bytes=90)
    child = ledger.open(cache, grant=True, near_bytes=60, plans=4)

    def counts(scope: Scope) -> tuple[int, int]:
        account = ledger.report(scope).near_bytes
        return account.used, account.reserved

    assert counts(cache) == counts(ledger.root) == (0, 60) and counts(child) == (0, 0)
    hold = ledger.reserve(child, near_bytes=50, plans=3)
    assert counts(cache) == (0, 60) and counts(child) == (0, 50)
    hold.draw(near_bytes=30)
    assert counts(cache) == counts(ledger.root) == (30, 30) and counts(child) == (30, 20)
    hold.commit(near_bytes=0)
    assert counts(cache) == (30, 30) and counts(child) == (30, 0)
    with pytest.raises(BudgetExceeded, match="limit is 90"):
        ledger.reserve(cache, near_bytes=31)
    ledger.set_limit(child, near_bytes=80)
    assert counts(ledger.root) == (30, 50)
    with pytest.raises(ValueError, match="expected at most the 90"):
        ledger.set_limit(child, near_bytes=91)
    with pytest.raises(ValueError, match="was granted, expected a number"):
        ledger.set_limit(child, near_bytes=None)
    ledger.free(child, near_bytes=30)
    assert counts(cache) == (0, 80) and counts(child) == (0, 0)
    ledger.close(child)
    assert counts(cache) == counts(ledger.root) == (0, 0)
    assert (ledger.report().plans.used, ledger.report().plans.reserved) == (3, 0)


def test_closing() -> None:
    ledger = Ledger()
    cache, sequence, branch = family(ledger)
    hold = ledger.reserve(branch, near_bytes=1)
    for scope, message in [(cache, "has 1 scopes"), (branch, "1 reservations"), (ledger.root, "cannot end")]:
        with pytest.raises(ValueError, match=message):
            ledger.close(scope)
    hold.commit()
    with pytest.raises(ValueError, match="'near_bytes': 1"):
        ledger.close(branch)
    ledger.free(branch, near_bytes=1)
    for scope in (branch, sequence, cache):
        ledger.close(scope)
        with pytest.raises(ValueError, match="is unknown here, or has ended"):
            ledger.report(scope)
    with pytest.raises(ValueError, match="is unknown here"):
        ledger.report(Ledger().root)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.reserve(x.root, near=1), "resource is 'near', expected one of near_bytes"),
        (lambda x: x.reserve(x.root, near_bytes=-1), "near_bytes is -1"),
        (lambda x: x.reserve(x.root, near_bytes=1.5), r"near_bytes is 1\.5"),
        (lambda x: x.reserve(x.root, near_bytes=True), "near_bytes is True"),
        (lambda x: x.open(plans="3"), "plans is '3'"),
        (lambda x: x.open(near_bytes="3 gigs"), "'3 gigs' is not understood"),
        (lambda x: x.set_limit(x.root, tokens=3), "resource is 'tokens'"),
        (lambda x: Ledger(near=-1), "near_bytes is -1"),
    ],
)
def test_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Ledger())  # type: ignore[operator]
