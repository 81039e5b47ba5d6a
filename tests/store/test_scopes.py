"""Scopes of a cache's sequences: what they took is theirs for its life, limits bind on it, and a limit is planned for."""

from __future__ import annotations

import gc
from fractions import Fraction

import pytest
import torch
from feeding import feed

from kvstrata import Budget, Cache, LayerSpec, Shape, Unsupported
from kvstrata.budget import Ledger
from kvstrata.config import BudgetExceeded

SHAPE = Shape([LayerSpec(2, 4, 32)] * 2, torch.float32)
PAGE = 16 * 2 * 32 * 4 + 64
ROWS = 4


def filled(policy: str = "full", budget: Budget | None = None, tokens: int = 100, **limits: int) -> tuple:  # type: ignore[type-arg]
    """A ledger, a cache with one sequence, and a generator."""
    ledger, generator = Ledger(**limits), torch.Generator().manual_seed(0)
    cache = Cache(SHAPE, budget, policy, ledger=ledger)
    (seq,) = cache.new()
    feed(cache, [seq], [tokens], generator)
    return ledger, cache, seq, generator


def test_a_page_is_charged_to_who_took_it() -> None:
    """Seven pages of each row are the prompt's, whoever shares them; a fork's first token copies the open one, its own then."""
    ledger, cache, seq, generator = filled()
    first, second = cache.fork(seq, 2)
    assert ledger.report(cache.scope_of(first)).scope.level == "branch"
    assert cache.scope_of(seq).level == "sequence"
    feed(cache, [first], [1], generator)
    own = {s: ledger.report(cache.scope_of(s)).near_bytes.own for s in (seq, first, second)}
    assert own == {seq: 7 * ROWS * PAGE, first: ROWS * PAGE, second: 0}
    assert ledger.report(cache.scope_of(seq)).near_bytes.used == 8 * ROWS * PAGE, "its forks count in it"
    assert ledger.report(cache.scope).near_bytes.used == cache.nbytes(), "pages count in slabs there"
    third = Fraction(6 * ROWS * PAGE, 3)
    half = Fraction(ROWS * PAGE, 2)
    assert [cache.share(s).fair_bytes for s in (seq, first, second)] == [
        third + half,
        third + ROWS * PAGE,
        third + half,
    ]


def test_a_scope_outlives_its_sequence_while_it_is_charged() -> None:
    ledger, cache, seq, _ = filled()
    scope = cache.scope_of(seq)
    (branch,) = cache.fork(seq)
    cache.free([seq])
    assert ledger.report(scope).near_bytes.own == 7 * ROWS * PAGE
    assert cache.share(branch).fair_bytes == 7 * ROWS * PAGE and cache.share(branch).charged_bytes == 0
    cache.free([branch])
    with pytest.raises(ValueError, match="has ended"):
        ledger.report(scope)


def test_who_continues_a_sequence_keeps_its_scope() -> None:
    """Beams: of two that continue one, the last has its scope, the other a branch of it."""
    _, cache, seq, _ = filled()
    (other,) = cache.new()
    scope = cache.scope_of(seq)
    one, two = cache.select([seq, other], [0, 0])
    assert cache.scope_of(two) is scope and cache.scope_of(one).level == "branch"
    assert cache.share(two).charged_bytes == 7 * ROWS * PAGE and cache.share(one).charged_bytes == 0


def test_a_branch_keeps_to_its_limit() -> None:
    """Two pages of each row may be its own: the step that needs a third is refused, with nothing changed; its sibling goes on,
    and so does it when the limit is gone."""
    ledger, cache, seq, generator = filled()
    one, two = cache.fork(seq, 2)
    scope = cache.scope_of(one)
    ledger.set_limit(scope, near_bytes=2 * ROWS * PAGE)
    for _ in range(28):
        feed(cache, [one, two], [1, 1], generator)
    before = cache.report(), ledger.report(scope).accounts
    assert before[1]["near_bytes"].remaining == 0
    with pytest.raises(BudgetExceeded, match=f"branch .*near_bytes: limit is {2 * ROWS * PAGE}.* asked {ROWS * PAGE}"):
        feed(cache, [one, two], [1, 1], generator)
    assert (cache.report(), ledger.report(scope).accounts) == before
    feed(cache, [two], [1], generator)
    ledger.set_limit(scope, near_bytes=None)
    feed(cache, [one], [1], generator)
    assert ledger.report(scope).near_bytes.own == 3 * ROWS * PAGE


def test_tokens_of_a_sequence_are_limited() -> None:
    ledger, cache, seq, generator = filled()
    scope = cache.scope_of(seq)
    assert ledger.report(scope).prefill_tokens.used == 100
    ledger.set_limit(scope, decode_tokens=3)
    for _ in range(3):
        feed(cache, [seq], [1], generator)
    with pytest.raises(BudgetExceeded, match="decode_tokens: limit is 3, used 3"):
        feed(cache, [seq], [1], generator)
    assert ledger.report(cache.scope).decode_tokens.used == 3
    assert all(a.reserved == 0 for a in ledger.report(scope).accounts.values())


@pytest.mark.parametrize("policy", ["keydiff", "arkv"])
def test_a_limited_sequence_under_a_policy_that_drops(policy: str) -> None:
    """What a plan writes beside what it replaces is within the limit too, at every step; the cut inside a prompt as well."""
    ledger, cache, seq, generator = filled(policy, Budget.bytes("500KiB"), tokens=20)
    (other,) = cache.new()
    limit = 220 << 10
    for one in (seq, other):
        ledger.set_limit(cache.scope_of(one), near_bytes=limit)
    for n in (200, *[1] * 70):
        feed(cache, [seq, other], [n, n], generator)
        for one in (seq, other):
            account = ledger.report(cache.scope_of(one)).near_bytes
            assert account.high_water <= limit and account.reserved == 0
    assert cache.report().counts["evicted"] + cache.report().counts["quantized"] > 0


def test_a_lower_limit_of_the_cache_is_planned_for() -> None:
    """By shrinking alone; then it holds at every step, as if it were the cache's own."""
    ledger, cache, seq, generator = filled("arkv", Budget.bytes("600KiB"), tokens=600)
    held, limit = cache.nbytes(), 400 << 10
    assert held > limit
    with pytest.raises(ValueError, match=f"near_bytes is {limit}, expected at least used {held}"):
        ledger.set_limit(cache.scope, near_bytes=limit)
    assert cache.nbytes() == held
    ledger.set_limit(cache.scope, near_bytes=limit, shrink=True)
    for _ in range(70):
        feed(cache, [seq], [1], generator)
        assert cache.nbytes() <= limit
    assert cache.report().counts["plans put off"] == 0
    with pytest.raises(BudgetExceeded, match="20000 bytes are too few for 1 sequences"):
        ledger.set_limit(cache.scope, near_bytes=20000, shrink=True)
    assert ledger.report(cache.scope).near_bytes.limit == limit


def test_what_drops_nothing_does_not_shrink() -> None:
    ledger, cache, seq, _ = filled()
    with pytest.raises(ValueError, match="expected at least used"):
        ledger.set_limit(cache.scope, near_bytes=1000, shrink=True)
    with pytest.raises(Unsupported, match="has no on_shrink"):
        ledger.set_limit(cache.scope_of(seq), near_bytes=1000, shrink=True)


def test_scopes_go_with_their_cache() -> None:
    ledger, cache, seq, _ = filled()
    cache.fork(seq)
    assert len(ledger._nodes) == 4
    del cache
    gc.collect()
    assert ledger.report().near_bytes.used == 0 and len(ledger._nodes) == 1


def test_a_cache_without_a_ledger_has_fair_shares_alone() -> None:
    cache = Cache(SHAPE)
    seqs = cache.new(2)
    feed(cache, seqs, [16, 33], torch.Generator().manual_seed(0))
    share = cache.share(seqs[1])
    assert (share.charged_bytes, share.fair_bytes, share.stored_tokens) == (None, 3 * ROWS * PAGE, (33, 33.0, 33))
    with pytest.raises(ValueError, match="scope_of: the cache has no ledger"):
        cache.scope_of(seqs[0])
