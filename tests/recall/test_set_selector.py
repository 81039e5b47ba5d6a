"""Another selector for a live cache, with summaries of another kind; what cannot be ranked; and pages packed greedily."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from accounts import BUDGET, estimated, mild, narrowed, policy
from archived import SHAPE, Fed, Rule, fed, small
from torch import Tensor

from kvstrata import Cache, LayerSpec, Shape, ops, reference
from kvstrata.policy.base import FAR
from kvstrata.recall import Archive, Bounds, Greedy, MassThreshold, PageMeans, Position, SplitMeans, TopPages
from kvstrata.testing import fault

SELECTORS = {
    "mean": PageMeans(BUDGET),
    "bounds": Bounds(BUDGET),
    "mean_value": PageMeans(BUDGET, estimate=0.5),
    "halves": SplitMeans(BUDGET),
    "quarters": SplitMeans(BUDGET, parts=4),
}
"""One of each kind of summaries."""


def begun(selector: Any, **more: Any) -> tuple[Fed, list[Any]]:
    """A cache with two sequences and a fork, all of which have decoded."""
    pair = fed(policy(selector, **more))
    seqs = pair.new(2)
    pair.feed(seqs, [700, 450])
    seqs += pair.fork(seqs[0])
    for _ in range(20):
        pair.feed(seqs, [1, 1, 1])
    return pair, seqs


def decoded(pair: Fed, seqs: list[Any], steps: int = 24) -> list[Tensor]:
    return [x for _ in range(steps) for x in pair.feed(seqs, [1] * len(seqs))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("before", "after"), [("mean", "bounds"), ("bounds", "mean_value"), ("mean_value", "mean")])
def test_another_kind_asks_to_be_allowed(before: str, after: str) -> None:
    """Nothing changed when it was not: steps are as if it had not been asked for."""
    (pair, seqs), (twin, others) = begun(SELECTORS[before]), begun(SELECTORS[before])
    with pytest.raises(
        ValueError, match=f"ranks by {after}, pages have summaries of kind {before}; expected summarize"
    ):
        pair.cache.set_selector(SELECTORS[after])
    assert pair.cache.policy.selector == SELECTORS[before]
    assert same(decoded(pair, seqs, 5), decoded(twin, others, 5))


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        ("mean", "bounds", "full"),
        ("bounds", "mean", "full"),
        ("mean", "mean_value", "full"),
        ("mean_value", "bounds", "int8"),
        ("bounds", "mean_value", "int8"),
        ("mean_value", "quarters", "full"),
        ("quarters", "halves", "int8"),
        ("halves", "mean", "full"),
    ],
)
def test_as_if_it_had_been_there_from_the_beginning(before: str, after: str, state: str) -> None:
    """All pages are whole: summaries made anew have the same bits, those of forks and of pages that come later too."""
    (pair, seqs), (twin, others) = begun(SELECTORS[before], state=state), begun(SELECTORS[after], state=state)
    held = pair.cache.report().bytes_by_kind["tables"]
    pair.cache.set_selector(SELECTORS[after], summarize=True)
    grew = pair.cache.report().bytes_by_kind["tables"] - held
    sizes = [ops.summary_bytes(64, kind) for kind in (before, after)]  # type: ignore[arg-type]
    assert sizes[0] == sizes[1] or (grew > 0) == (sizes[1] > sizes[0])
    got, want = decoded(pair, seqs), decoded(twin, others)
    assert same(got, want)
    assert pair.cache.report().counts["archived"] == twin.cache.report().counts["archived"]
    (third, rest) = begun(SELECTORS[before], state=state)
    assert not same(got[:2], decoded(third, rest, 1)), "the other selector answers otherwise"
    pair.check_contents(state == "full")
    pair.check_pools()


def test_there_and_back() -> None:
    """A selector that was gone for a while answers as if it had stayed."""
    (pair, seqs), (twin, others) = begun(SELECTORS["mean"]), begun(SELECTORS["mean"])
    for kind in ("bounds", "mean_value", "mean"):
        pair.cache.set_selector(SELECTORS[kind], summarize=True)
    pair.cache.set_selector(MassThreshold(BUDGET, mass=0.5))
    pair.cache.set_selector(SELECTORS["mean"])
    assert same(decoded(pair, seqs), decoded(twin, others))


def test_pages_with_holes_are_summarized_as_they_are_now() -> None:
    """Not as they were sealed, as in a cache that had the selector from the beginning: they take part in the estimate again."""
    pair = mild(policy(SELECTORS["mean"]))
    seqs, _ = narrowed(pair)
    pair.cache.set_selector(PageMeans(BUDGET, estimate=1.0), summarize=True)
    part = 0
    for _ in range(4):
        for a, zone in estimated(pair, seqs):
            assert len(zone) == len(a.made.indexed) - 4
            part += sum(not a.made.row.slots[a.made.indexed[i]].all() for i in zone)
    assert part > 50


@pytest.mark.parametrize(
    ("before", "after", "nth"),
    [("mean", "bounds", 1), ("mean", "mean_value", 300), ("bounds", "mean_value", 40), ("mean_value", "mean", 7)],
)
def test_a_page_that_cannot_be_read_leaves_all_as_it_was(before: str, after: str, nth: int) -> None:
    (pair, seqs), (twin, others) = begun(SELECTORS[before]), begun(SELECTORS[before])
    held = pair.cache.report().bytes_by_kind
    with pytest.raises(RuntimeError, match=r"fault injected at far\.read"), fault("far.read", nth) as armed:
        pair.cache.set_selector(SELECTORS[after], summarize=True)
    assert armed.visits == nth
    assert pair.cache.policy.selector == SELECTORS[before] and pair.cache.report().bytes_by_kind == held
    assert same(decoded(pair, seqs), decoded(twin, others)), "later pages too are summarized as before"
    pair.cache.set_selector(SELECTORS[after], summarize=True)
    twin.cache.set_selector(SELECTORS[after], summarize=True)
    assert same(decoded(pair, seqs, 5), decoded(twin, others, 5))


def test_what_set_selector_refuses() -> None:
    pair, seqs = begun(SELECTORS["mean"])
    with pytest.raises(ValueError, match="budget is 70 tokens, expected at least 79"):
        pair.cache.set_selector(Bounds(70), summarize=True)
    with pytest.raises(ValueError, match="near_pages is 5, expected 0 or at least 8, reach x pages"):
        pair.cache.set_selector(MassThreshold(BUDGET, near_pages=5))
    assert pair.cache.policy.selector == SELECTORS["mean"]
    with (
        pytest.raises(RuntimeError, match="set_selector: a step is open"),
        pair.cache.step([seqs[0]], [1]),
    ):
        pair.cache.set_selector(SELECTORS["bounds"], summarize=True)
    (full,) = (Cache(SHAPE),)
    with pytest.raises(ValueError, match="policy 'full' selects nothing"):
        full.set_selector(SELECTORS["mean"])


# --- what cannot be ranked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "bad"), [("full", torch.nan), ("int8", torch.nan), ("full", torch.inf)])
@pytest.mark.parametrize("kind", SELECTORS)
def test_a_key_that_is_no_number_is_named(kind: str, state: str, bad: float) -> None:
    """By layer, head, sequence of the step and a position of its page; sequences without it go on."""
    pair = fed(policy(SELECTORS[kind], Position(), state))
    seq, other = pair.new(2)
    with pair.cache.step([other, seq], [600, 600]) as step:
        for layer in range(2):
            q, k, v = pair.drawn(layer, 1200)
            if layer == 1:
                k[600 + 100, 1, 3] = bad
            step.attend(layer, q, k, v)
    where = "attend: layer 1, head 1 of the 1. sequence of the step: .* page of position 96 are not finite"
    for _ in range(2):
        drawn = [pair.drawn(layer, 2) for layer in range(2)]
        with pytest.raises(ValueError, match=where), pair.cache.step([other, seq], [1, 1]) as step:
            step.attend(0, *drawn[0])
            step.attend(1, *drawn[1])
        assert pair.cache.logical_length(seq) == pair.cache.logical_length(other) == 600
    with pair.cache.step([other], [1]) as step:
        for layer in range(2):
            assert step.attend(layer, *pair.drawn(layer, 1)).isfinite().all()


def test_its_sequence_is_named_as_the_step_has_it() -> None:
    pair = fed(policy(SELECTORS["mean"]))
    other, seq = pair.new(2)
    with pair.cache.step([seq], [600]) as step:
        for layer in range(2):
            q, k, v = pair.drawn(layer, 600)
            k[100, 0] = torch.nan
            step.attend(layer, q, k, v)
    with pytest.raises(ValueError, match="of the 1. sequence of the step"):
        pair.feed([other, seq], [0, 1])


# --- greedy pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("segment", "least"), [(256, 256), (512, 512)])
def test_no_token_is_lost_or_changed_by_greedy_pages(segment: int, least: int) -> None:
    """400 decoded tokens of two sequences, with turns in between; each token once, at most 16 to a page."""
    planner = Archive(Greedy(), segment=segment, segment_min=least)
    pair = fed(replace(small(), planner=planner), Shape([LayerSpec(2, 2, 32)] * 2, torch.bfloat16))
    seqs = pair.new(2)
    rules = [[Rule(layer, least=least) for layer in range(2)] for _ in seqs]
    for lengths in [(600, 90), *[(1, 1)] * 200, (5, 130), *[(1, 1)] * 200]:
        pair.feed(seqs, list(lengths))
        for n, both in zip(lengths, rules, strict=True):
            for rule in both:
                rule.feed(n)
    pair.check_contents()
    pair.check_pools()
    for seq, both in zip(seqs, rules, strict=True):
        for layer, rule in enumerate(both):
            pair.check_rule(seq, layer, rule)
    assert max(rule.good for both in rules for rule in both) >= 512
    pair.check_empty()


def test_a_greedy_page_is_as_the_op_groups_its_segment() -> None:
    pair = fed(replace(small(chunk=1024), planner=Archive(Greedy(), segment=256, segment_min=256)))
    (seq,) = pair.new()
    pair.feed([seq], [32 + 512 + 80 + 16])
    keys, _ = pair.tokens(seq, 1)
    _, _, positions = pair.cache.materialize(1, seq)
    for h in range(2):
        want = []
        for a, b in pairwise((32, 288, 544, 624)):
            page_of, pages = ops.cluster_greedy(keys[None, a:b, h].contiguous())
            assert pages.tolist() == [(b - a) // 16]
            want += [(a + (page_of[0] == j).nonzero().flatten()).tolist() for j in range((b - a) // 16)]
        assert positions[h, 32:-16].view(37, 16).tolist() == want


def planted(seed: int) -> tuple[Tensor, Tensor]:
    """Keys [4096, 64] of 256 topics, 16 each and shuffled, and queries [20, 64] towards topics."""
    g = torch.Generator().manual_seed(seed)
    topics = torch.randn(256, 64, generator=g)
    label = torch.arange(256).repeat_interleave(16)[torch.randperm(4096, generator=g)]
    keys = topics[label] + torch.randn(4096, 64, generator=g)
    wanted = torch.randint(0, 256, (20,), generator=g)
    return keys, 2 * topics[wanted] + 0.5 * torch.randn(20, 64, generator=g)


@pytest.mark.parametrize(("packer", "low", "high"), [(Greedy(), 0.8, 1.0), (Position(), 0.0, 0.3)])
def test_what_four_pages_hold_of_planted_keys(packer: Any, low: float, high: float) -> None:
    """The share of attention in the four pages that their means promise most of."""
    planner = Archive(packer, segment=4096, segment_min=1024)
    cache = Cache(Shape([LayerSpec(1, 1, 64)], torch.float32), policy=replace(small(chunk=8192), planner=planner))
    keys, queries = planted(0)
    (seq,) = cache.new()
    k = torch.cat([torch.zeros(32, 64), keys, torch.zeros(16, 64)])[:, None]
    with cache.step([seq], [len(k)]) as step:
        step.attend(0, k, k, k)
    _, _, positions = cache.materialize(0, seq)
    pair = Fed(cache, torch.Generator(), {seq: []})
    assert (pair.looked(seq, 0)[1][0, 32:-16] == FAR).all()
    pages = keys[positions[0, 32:-16].long() - 32].view(256, 16, 64)
    blocks = reference.summarize(pages[None], torch.ones(1, 256, 16, dtype=torch.bool))
    x = reference.score_pages(queries[None], blocks, torch.full((1, 256), 0xFFFF, dtype=torch.int32).to(torch.uint16))
    share = torch.einsum("qd,psd->qps", queries, pages).mul(64**-0.5).flatten(1).softmax(1).view(20, 256, 16).sum(2)
    held = float(share.gather(1, x[0].topk(4).indices).sum(1).mean())
    assert low <= held <= high


def test_a_selector_that_is_refused_leaves_the_summaries() -> None:
    """Other summaries are made only for a selector that the cache can have."""
    outputs = []
    for refused in (True, False):
        pair = fed(policy(SELECTORS["bounds"]))
        (seq,) = pair.new()
        pair.feed([seq], [600])
        if refused:
            with pytest.raises(ValueError, match="an oracle reads every token to choose"):
                pair.cache.set_selector(TopPages(SELECTORS["bounds"].budget), summarize=True)
        pair.cache.set_selector(SELECTORS["bounds"])
        outputs.append([out for _ in range(4) for out in pair.feed([seq], [1])])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_copies_go_with_the_selector_that_kept_them() -> None:
    pair = fed(policy(PageMeans(127)))
    (seq,) = pair.new()
    pair.feed([seq], [600])
    pair.feed([seq], [1])
    store, held = pair.cache._store, pair.cache._store.pool(0)["used"]
    pair.cache.set_selector(PageMeans(127, near_pages=0))
    assert held - store.pool(0)["used"] == 4 * 4, "of two layers and two heads, four pages each"
    pair.feed([seq], [1])
    assert store.pool(0)["used"] <= held - 16
