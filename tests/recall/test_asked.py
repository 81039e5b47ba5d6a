"""What a budget asks of a cache that selects: tokens to read, the Far tier, and what it cannot ask."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from accounts import judged, mild
from archived import SHAPE, fed, small

from kvstrata import Budget, Cache, Unsupported
from kvstrata.budget import Schedule
from kvstrata.policy import strata
from kvstrata.recall import Far, SplitMeans

FALLING = Schedule("rex", interval=64, horizon=640, end=100)


def test_the_report_says_what_is_read() -> None:
    cache = Cache(SHAPE, "256tok", "icecache")
    assert cache.budget == Budget.tokens(256)
    assert cache.report().budget == "256tok read per row and step" and cache.report().limit_bytes is None
    cache.set_selector(SplitMeans(512))
    assert cache.report().budget == "512tok read per row and step"
    assert Cache(SHAPE, "4MiB", "icecache").report().budget == "4194304B"
    assert Cache(SHAPE, policy="icecache").report().budget is None
    assert Cache(SHAPE, "256tok", "streaming").report().budget == "256tok"


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget.tokens(256, count=True),
            "budget: count: policy 'icecache' stores every token, the budget is what a step",
        ),
        (Budget.tokens(256, schedule=FALLING), "budget: schedule: policy 'icecache' stores every token"),
        (Budget.bytes("4MiB", schedule=FALLING), "budget: schedule: what policy 'icecache' holds cannot fall"),
    ],
)
def test_what_cannot_be_asked(budget: Budget, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        Cache(SHAPE, budget, "icecache")


def test_a_schedule_that_does_not_fall() -> None:
    assert Cache(SHAPE, Budget.tokens(256, schedule=Schedule()), "icecache").policy.selector == SplitMeans(256)


FAR: list[tuple[Any, Any, tuple[bool, int | None]]] = [
    ("auto", "auto", (True, None)),
    ("auto", None, (False, None)),
    ("auto", "1MiB", (True, 1 << 20)),
    ("auto", 1 << 20, (True, 1 << 20)),
    ("auto", inf, (True, None)),
    (None, "auto", (False, None)),
    (None, None, (False, None)),
    (Far(1 << 20, "."), "1MiB", (True, 1 << 20)),
    ("1MiB", 1 << 20, (True, 1 << 20)),
    (Far(), inf, (True, None)),
]


@pytest.mark.parametrize(("far", "asked", "found"), FAR)
def test_the_far_tier_of_a_budget(far: Any, asked: Any, found: tuple[bool, int | None]) -> None:
    cache = Cache(SHAPE, Budget.bytes("4MiB", far=asked), "icecache", far=far)
    tier = cache._slabs._far
    assert (tier is not None, None if tier is None else tier.bytes) == found
    assert cache._slabs.has_far == found[0]
    if isinstance(far, Far):
        assert tier is far


def test_a_budget_without_a_far_tier_keeps_all_near() -> None:
    pair = fed(small(), budget=Budget.bytes("8MiB", far=None))
    (seq,) = pair.new()
    for n in (600, 1, 1):
        pair.feed([seq], [n])
    report = pair.cache.report()
    assert report.far_bytes == report.far_tokens == 0 and report.recall is not None
    pair.check_contents()


def test_a_far_limit_of_a_budget_binds() -> None:
    pair = fed(small(), budget=Budget.bytes("8MiB", far="256KiB"))
    (seq,) = pair.new()
    with pytest.raises(ValueError, match="far limit is 262144 bytes"):
        pair.feed([seq], [600])
    assert pair.cache.logical_length(seq) == 0


@pytest.mark.parametrize(
    ("far", "asked"), [(None, "1MiB"), ("1MiB", None), ("1MiB", "2MiB"), (Far(), "1MiB"), ("1MiB", inf)]
)
def test_two_tiers_that_differ(far: Any, asked: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Cache: far is .*, that of the budget is .*, expected one of them, or both eq"
    ):
        Cache(SHAPE, Budget.bytes("4MiB", far=asked), "icecache", far=far)


def test_a_tier_for_a_policy_that_archives_nothing() -> None:
    with pytest.raises(Unsupported, match="far is '1MiB', policy 'streaming' archives nothing"):
        Cache(SHAPE, Budget.bytes("4MiB", far="1MiB"), "streaming")
    assert not Cache(SHAPE, Budget.bytes("4MiB", far=None), "streaming")._slabs.has_far


def test_as_many_pages_are_read_as_the_window_leaves() -> None:
    """Under a limit that more sequences share the window is smaller, and pages of the step's budget take its place."""
    policy = strata(32 + 64 + 15 + 16, state="full", window=64, segment=256, segment_min=256, interval=16, chunk=256)
    pair = mild(policy, budget="1700KiB")
    assert pair.cache.policy.window == 64
    seqs = pair.new(3)
    pair.feed(seqs, [500, 400, 300])
    assert pair.cache.policy.window == 16 and pair.cache.report().far_tokens > 2000
    for _ in range(3):
        assert {len(a.chosen) for a in judged(pair, seqs)} == {4}
