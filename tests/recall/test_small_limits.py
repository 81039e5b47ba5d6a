"""Small limits in bytes of caches that select: whatever rows, heads and tokens, no call leaves a byte more behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from archived import Fed, fed, small

from kvstrata import Budget, Cache, LayerSpec, Policy, Sequence, Shape
from kvstrata.budget.books import books
from kvstrata.config import BudgetExceeded
from kvstrata.policy.base import Policy as Composed
from kvstrata.recall.selectors import Bounds, MassThreshold, PageMeans, SplitMeans, TopPages


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def within(cache: Cache) -> None:
    report = cache.report()
    assert report.limit_bytes is not None
    assert report.nbytes <= report.limit_bytes and report.peak_bytes <= report.limit_bytes


def fed_within(pair: Fed, seqs: list[Sequence], lengths: list[int]) -> bool:
    """A step, after each layer of which the limit holds; False where it was refused with nothing changed."""
    cache, tokens = pair.cache, [pair.drawn(i, sum(lengths)) for i in range(len(pair.cache.shape.layers))]
    before = [cache.logical_length(s) for s in seqs]
    try:
        with cache.step(seqs, lengths) as step:
            for layer, (q, k, v) in enumerate(tokens):
                step.attend(layer, q, k, v)
                assert cache.nbytes() <= cache._slabs.limit
    except ValueError as error:  # BudgetExceeded, or too little for sinks and windows of so many
        assert str(error).startswith("budget: ")
        assert [cache.logical_length(s) for s in seqs] == before
        within(cache)
        return False
    pair.note(seqs, lengths, [(k, v) for _, k, v in tokens])
    within(cache)
    return True


STEPS = [[1] * 3, [1] * 3, [70, 1, 0], *[[1] * 3] * 20, [5, 5, 5], [1, 1, 330], *[[1] * 3] * 10, [90, 90, 2], [1] * 3]


SELECTORS = [
    PageMeans(),
    Bounds(aggregate="sum"),
    PageMeans(estimate=1.0),
    SplitMeans(),
    MassThreshold(mass=0.9, reach=4.0, estimate=0.3),
]


def reading(selector: TopPages, pages: int, **settings: Any) -> Policy:
    """As :func:`small`, by another selector."""
    policy = small(pages, **settings)
    return replace(policy, selector=selector.reading(policy.sinks + 16 + 15 + 16 * pages))


@pytest.mark.parametrize(
    ("per", "far", "threads"),
    [("cache", "auto", 1), ("sequence", "auto", 3), ("cache", None, 3), ("sequence", None, 1)],  # each pair of values
    indirect=["threads"],
)
@pytest.mark.parametrize(
    ("heads", "group", "dim", "layers", "pages", "selector"),
    [
        (1, 16, 32, 1, 4, SELECTORS[0]),
        (2, 16, 128, 1, 1, SELECTORS[2]),
        (4, 16, 32, 2, 33, SELECTORS[0]),
        (1, 1, 64, 3, 12, SELECTORS[1]),
        (2, 8, 64, 2, 9, SELECTORS[3]),
        (1, 12, 128, 2, 4, SELECTORS[0]),
    ],
)
def test_no_call_passes_the_limit(
    heads: int, group: int, dim: int, layers: int, pages: int, selector: TopPages, far: Any, per: str, threads: int
) -> None:
    """Prompts, turns and decoding of three ragged sequences, and forks, until nothing goes any more; from limits on that have
    no place for the first token."""
    shape = Shape([LayerSpec(heads, heads * group, dim)] * layers, torch.bfloat16)
    ring = 64 * 2 * 16 * dim * 2
    fed_ones = refused = 0
    for times in (1.1, 1.4, 2.0, 3.1):
        limit = int(ring * times) + 30_000 * heads
        try:
            pair = fed(reading(selector, pages, chunk=64), shape, budget=Budget.bytes(limit, per=per), far=far)
            seqs = pair.new(3)
        except ValueError:  # not even the ring, or sinks and window
            refused += 1
            continue
        if fed_within(pair, seqs, [300, 40, 130]):
            fed_ones += 1
        for lengths in STEPS:
            refused += not fed_within(pair, seqs, lengths)
        for _ in range(3):
            try:
                seqs.append(pair.fork(seqs[0])[0])
            except BudgetExceeded:
                refused += 1
            within(pair.cache)
            refused += not fed_within(pair, seqs[1:], [1] * (len(seqs) - 1))
    assert fed_ones > 0 or per == "cache"


@pytest.mark.parametrize("selector", SELECTORS)
def test_what_calls_work_in_is_known(threads: int, selector: TopPages) -> None:
    """The books of a cache that selects are above what it has, whatever it reads, and not far above."""
    shape = Shape([LayerSpec(2, 16, 64)] * 2, torch.bfloat16)
    for pages, batch in ((1, 1), (12, 4), (33, 2)):
        pair = fed(reading(selector, pages), shape)
        seqs, store = pair.new(batch), pair.cache._store
        for n in (1, 1, 600, *[1] * 17, 2, 1):
            pair.feed(seqs, [n] * batch)
            known = books(pair.cache.policy, shape, 1 << 24, batch)
            held = sum(store.pool(p)["total"] for p in range(store.n_pools))
            asked = 8 * 600 if pair.cache.logical_length(seqs[0]) > 2 else 0
            assert store.workspace_bytes <= known.work + held * known.work_page + asked
            slabs = len(pair.cache._slabs._tensors)
            assert store.metadata_bytes <= known.fixed + held * known.page + slabs * known.slab
        assert known.of(held, slabs) <= 4 * (store.workspace_bytes + store.metadata_bytes)


def test_what_stands_in_is_known(threads: int) -> None:
    """Of many rows, each has its list of pages that stand in by their means: together they are long."""
    shape = Shape([LayerSpec(8, 8, 32)], torch.bfloat16)
    pair = fed(reading(PageMeans(estimate=1.0), 4), shape)
    seqs, store = pair.new(), pair.cache._store
    for n in (1, *[700] * 12, *[1] * 40):
        pair.feed(seqs, [n])
    known = books(pair.cache.policy, shape, 1 << 24, 1)
    held = sum(store.pool(p)["total"] for p in range(store.n_pools))
    assert store.workspace_bytes <= known.work + held * known.work_page + 8 * 700


def test_a_policy_that_selects_and_archives_nothing() -> None:
    """Its books have their place, too."""
    policy: Policy = Composed("reads", selector=PageMeans(79 + 48), sinks=32, window=16)
    shape = Shape([LayerSpec(1, 16, 64)] * 2, torch.bfloat16)
    pair = fed(policy, shape, budget="256KiB")
    seqs, done = pair.new(2), 0
    assert fed_within(pair, seqs, [60, 40])
    while fed_within(pair, seqs, [1, 1]):
        done += 1
    assert done > 50
    pair.check_contents()
