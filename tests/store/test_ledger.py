"""Caches that charge a ledger: recounts to the byte, limits over several caches, and what is consumed."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from feeding import feed

from kvstrata import Cache, LayerSpec, Shape
from kvstrata.budget import Ledger, Regime, Scope
from kvstrata.cache import Sequence
from kvstrata.config import BudgetExceeded

SHAPE = Shape([LayerSpec(2, 4, 32), LayerSpec(2, 2, 32)], torch.float32)


def recount(cache: Cache) -> int:
    """Bytes of the slabs by their tensors and by the native pools, which agree, with tables and workspace."""
    store, slabs = cache._store, cache._slabs
    held = sum(t.untyped_storage().nbytes() for t in slabs._tensors.values())
    pools = [(store.pool(p)["page_bytes"] + 64, store.slabs(p)) for p in range(store.n_pools)]
    assert held == slabs.held == sum(size * pages for size, found in pools for _, pages, _ in found)
    return held + store.metadata_bytes + store.workspace_bytes


VERBS = {"append": 60, "prompt": 4, "plan": 3, "fork": 6, "free": 6, "crop": 8, "new": 6, "trim": 3, "clear": 1}


class Driver:
    """Random verbs on one cache. Counts tokens that were not refused, and refusals."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self.cache = cache
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.live = cache.new()
        self.decoded = self.prompt = self.refused = 0

    def step(self) -> None:
        before = self.cache.report().logical_tokens
        try:
            self._step(self.rng.choices(list(VERBS), list(VERBS.values()))[0])
        except BudgetExceeded as refused:
            assert "ledger" in str(refused) or "near_bytes" in str(refused)
            assert self.cache.report().logical_tokens == before, "no token came, no sequence"
            self.refused += 1

    def _step(self, verb: str) -> None:
        cache, rng = self.cache, self.rng
        one = rng.choice(self.live)
        if verb == "append":
            self.append(rng.sample(self.live, rng.randint(1, len(self.live))))
        elif verb == "prompt":
            n = rng.choice([17, 65, 200])
            feed(cache, [one], [n], self.generator)
            self.prompt += n
        elif verb == "plan":
            cache.compress()
        elif verb == "fork" and len(self.live) < 4:
            self.live += cache.fork(one)
        elif verb == "new" and len(self.live) < 4:
            self.live += cache.new()
        elif verb == "free" and len(self.live) > 1:
            self.live.remove(one)
            cache.free([one])
        elif verb == "crop":
            cache.crop([one], [rng.randint(cache.crop_floor(one), cache.logical_length(one))])
        elif verb == "trim":
            cache.trim()
        elif verb == "clear":
            cache.clear([one])

    def append(self, seqs: list) -> None:  # type: ignore[type-arg]
        lengths = [self.rng.choice([1, 1, 1, 2, 16]) for _ in seqs]
        feed(self.cache, seqs, lengths, self.generator)
        self.decoded += sum(lengths)


def checked(ledger: Ledger, drivers: list[Driver]) -> None:
    """The ledger against a recount of every cache."""
    for driver in drivers:
        cache = driver.cache
        report = ledger.report(cache.scope)
        assert report.near_bytes.used == report.near_bytes.own == recount(cache) == cache.nbytes()
        assert report.decode_tokens.used == driver.decoded
        assert report.prefill_tokens.used == driver.prompt
        assert report.plans.used == cache.report().counts["plans"]
        assert all(account.reserved == 0 for account in report.accounts.values())
        check_shares(ledger, cache)
    assert ledger.report().near_bytes.used == sum(d.cache.nbytes() for d in drivers)


def check_shares(ledger: Ledger, cache: Cache) -> None:
    """What is charged to scopes of sequences, living or not, and what the living hold in fair shares, are pages in use."""
    store, below = cache._store, [n for n in ledger._nodes.values() if n.scope.level in ("sequence", "branch")]
    mine = [n for n in below if n.chain()[-2].scope is cache.scope]
    pools = [store.pool(p) for p in range(store.n_pools)]
    physical = sum(pool["used"] * (pool["page_bytes"] + 64) for pool in pools)
    assert sum(n.counters["near_bytes"].own for n in mine) == physical
    shares = [cache.share(Sequence(i)) for i in cache._live]
    assert sum(s.fair_bytes for s in shares) == physical
    for i, share in zip(cache._live, shares, strict=True):
        own = ledger.report(cache.scope_of(Sequence(i))).near_bytes.own
        assert share.charged_bytes == own and share.logical_tokens == store.length(i)


@pytest.mark.parametrize(
    ("policy", "budget"), [("full", None), ("keydiff", "900KiB"), ("arkv", "900KiB"), ("h2o", "256tok")]
)
def test_the_ledger_is_a_recount(policy: str, budget: str | None) -> None:
    """Two thousand random verbs over two caches."""
    ledger = Ledger()
    drivers = [Driver(Cache(SHAPE, budget, policy, ledger=ledger), seed) for seed in range(2)]
    for i in range(2000):
        drivers[i % 2].step()
        checked(ledger, drivers)
    for driver in drivers:
        driver.cache.free(driver.live)
        driver.cache.trim()
        assert driver.cache._slabs.held == 0
    checked(ledger, drivers)
    assert not any(driver.refused for driver in drivers)


@pytest.mark.parametrize(("policy", "budget"), [("full", None), ("keydiff", "600KiB")])
def test_a_limit_over_several_caches(policy: str, budget: str | None) -> None:
    """What does not fit beside the others is refused with nothing changed; no byte above the limit at any time, reserved ones
    included."""
    ledger = Ledger(near="900KiB")
    drivers = [Driver(Cache(SHAPE, budget, policy, ledger=ledger), seed) for seed in range(3)]
    for i in range(1500):
        drivers[i % 3].step()
        checked(ledger, drivers)
        assert ledger.report().near_bytes.remaining >= 0
    assert ledger.report().near_bytes.high_water <= 900 << 10
    assert all(driver.refused for driver in drivers)
    drivers[0].cache.free(drivers[0].live)
    drivers[0].cache.trim()
    drivers[1].append(drivers[1].live)


def test_a_refusal_names_who_has_too_little() -> None:
    ledger = Ledger(near="300KiB")
    first, second = (Cache(SHAPE, ledger=ledger) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    feed(first, first.new(), [200], generator)
    seqs = second.new()
    before = second.nbytes()
    with pytest.raises(BudgetExceeded, match="near_bytes: limit is 307200, used .* asked|the ledger leaves a limit of"):
        feed(second, seqs, [200], generator)
    assert second.nbytes() == before and second._slabs.held == 0
    first.reset()
    first.trim()
    feed(second, seqs, [200], generator)


def test_tables_and_workspace_have_their_place_before_a_step() -> None:
    """With nothing left in the ledger, and free pages in the cache: a step or a fork that would grow them is refused."""
    ledger = Ledger(near="4MiB")
    cache = Cache(SHAPE, ledger=ledger)
    (seq,), generator = cache.new(), torch.Generator().manual_seed(0)
    feed(cache, [seq], [100], generator)
    cache.crop([seq], [50])
    left = ledger.left(ledger.root, "near_bytes")
    assert left is not None and cache.report().bytes_by_kind["free pages"] > 0
    with ledger.reserve(ledger.root, near_bytes=left):
        for verb in (lambda: feed(cache, [seq], [1], generator), lambda: cache.fork(seq), lambda: cache.new()):
            before, nbytes = cache.report(), cache.nbytes()
            with pytest.raises(BudgetExceeded, match="near_bytes"):
                verb()
            assert cache.report().logical_tokens == before.logical_tokens and cache.nbytes() == nbytes
    cache.fork(seq)
    feed(cache, [seq], [1], generator)


def test_consumed_resources_are_limited_before_the_step() -> None:
    ledger = Ledger(decode_tokens=3, prefill_tokens=100)
    cache = Cache(SHAPE, "900KiB", "keydiff", ledger=ledger)
    (seq,), generator = cache.new(), torch.Generator().manual_seed(0)
    feed(cache, [seq], [90], generator)
    for n, message in (
        (20, "prefill_tokens: limit is 100, used 90, reserved 0, asked 20"),
        (4, "decode_tokens: limit is 3"),
    ):
        with pytest.raises(BudgetExceeded, match=message):
            feed(cache, [seq], [n], generator)
        assert cache.logical_length(seq) == 90
    with pytest.raises(RuntimeError, match="mine"), cache.step([seq], [3]):
        raise RuntimeError("mine")
    assert ledger.report().decode_tokens.used == 0, "a step that is rolled back has consumed nothing"
    feed(cache, [seq], [3], generator)
    ledger.set_limit(ledger.root, plans=ledger.report().plans.used + 1)
    with pytest.raises(BudgetExceeded, match="plans"):
        feed(cache, [seq], [10], generator), feed(cache, [seq], [90], generator)
    assert ledger.report().prefill_tokens.used == 90


@pytest.mark.parametrize("policy", ["keydiff", "arkv", "snapkv"])
def test_plans_before_a_step_are_reserved_beside_its_own(policy: str) -> None:
    """A prompt that finds tokens unplanned: a ledger that lacks a plan for them, for its pieces or for the interval that it
    ends refuses it before a layer is planned; one with just as many takes it, and puts none off."""
    ledger = Ledger()
    cache = Cache(SHAPE, "900KiB", policy, ledger=ledger)
    (seq,), generator = cache.new(), torch.Generator().manual_seed(0)
    feed(cache, [seq], [400], generator)
    feed(cache, [seq], [5], generator)
    used, needed = ledger.report().plans.used, len(SHAPE.layers) * (1 + -(-300 // cache.policy.chunk) + 1)
    ledger.set_limit(ledger.root, plans=used + needed - 1)
    with pytest.raises(BudgetExceeded, match=f"plans: limit is {used + needed - 1}, used {used}, reserved 0"):
        feed(cache, [seq], [300], generator)
    assert cache.report().counts["plans"] == used and cache.logical_length(seq) == 405
    ledger.set_limit(ledger.root, plans=used + needed)
    feed(cache, [seq], [300], generator)
    report = ledger.report().plans
    assert (report.used, report.reserved, cache.report().counts["plans put off"]) == (used + needed, 0, 0)


def test_regimes_of_a_live_cache() -> None:
    """Decoding fills a limit; each cut is told once, and again as the memory returns."""
    ledger = Ledger(near="400KiB")
    cache = Cache(SHAPE, ledger=ledger)
    seen: list[tuple[Scope, Regime]] = []
    ledger.on_regime(ledger.root, lambda scope, old, new: seen.append((scope, new)))
    seqs, generator = cache.new(), torch.Generator().manual_seed(0)
    with pytest.raises(BudgetExceeded):
        while True:
            feed(cache, seqs, [4], generator)
    assert [new for _, new in seen[:3]] == [Regime.MEDIUM, Regime.LOW, Regime.CRITICAL]
    assert ledger.report(cache.scope).regime == Regime.HIGH, "it has no limit of its own"
    cache.reset()
    cache.trim()
    assert seen[-1] == (ledger.root, Regime.HIGH)


def test_a_cache_that_is_gone_holds_nothing() -> None:
    ledger = Ledger(near="1MiB")
    cache = Cache(SHAPE, ledger=ledger)
    feed(cache, cache.new(), [100], torch.Generator().manual_seed(0))
    scope = cache.scope
    assert ledger.report().near_bytes.used == cache.nbytes() > 0
    del cache
    gc.collect()
    assert ledger.report().near_bytes.used == 0
    assert ledger.report().prefill_tokens.used == 100, "what was consumed stays counted"
    with pytest.raises(ValueError, match="is unknown here, or has ended"):
        ledger.report(scope)


def test_without_a_ledger() -> None:
    assert Cache(SHAPE).scope is None
    with pytest.raises(ValueError, match="ledger is str, expected None or a Ledger"):
        Cache(SHAPE, ledger="6GiB")  # type: ignore[arg-type]
