"""Oracles: the pages, and the tokens, of highest true attention mass, beside plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from archived import ALL, EXACT, Fed, error, fed, small, worst
from choosing import table

from kvstrata import Policy
from kvstrata.recall import PageMeans, TopPages, TopTokens


def choosing(selector: type[TopPages] | type[TopTokens], pages: int = 4) -> Policy:
    policy = small(pages)
    assert isinstance(policy.selector, PageMeans)
    return replace(policy, selector=selector(policy.selector.budget))


def begun(policy: Policy, tokens: int = 700) -> Fed:
    pair = fed(policy, far=None)
    pair.feed(pair.new(), [tokens])
    return pair


@pytest.mark.parametrize("selector", [TopPages, TopTokens])
def test_the_best_are_read(selector: type[TopPages] | type[TopTokens]) -> None:
    """Of each row the 4 pages, or the 64 tokens, of the largest share of all attention, summed over its query heads."""
    pair = begun(choosing(selector))
    (seq,) = pair.pieces
    shares = []
    for _ in range(8):
        before = {(i, h): table(pair.cache, seq, i, h) for i in range(2) for h in range(2)}
        for (layer, h), row in before.items():
            assert row.sealed > 20, (layer, h)
        found = pair.step([seq], [1])
        for (layer, h), row in before.items():
            q, out = (x[0, 2 * h : 2 * h + 2].double() for x in found[layer])
            own = [x[-1, h][None].double() for x in pair.tokens(seq, layer)]
            k, v = (torch.cat([x[row.slots], y]) for x, y in zip((row.k, row.v), own, strict=True))
            weights = (q @ k.T / 8).softmax(-1)
            share = torch.full(row.slots.shape, -1.0, dtype=torch.float64)
            share[row.slots] = weights.sum(0)[:-1]
            taken = row.slots.clone()
            taken[2 : row.sealed] = False
            middle = share[2 : row.sealed]
            if selector is TopPages:
                taken[2 + middle.clamp_min(0).sum(1).topk(4).indices] = True
            else:
                flat = taken[2 : row.sealed].flatten()
                flat[middle.flatten().topk(64).indices] = True
                taken[2 : row.sealed] = flat.view(-1, 16)
            read = torch.cat([taken[row.slots], torch.tensor([True])])
            shares.append(float(weights[:, read].sum(1).mean()))
            assert error(out, (q @ k[read].T / 8).softmax(-1) @ v[read]) < 1e-5
    recall = pair.cache.report().recall
    assert recall is not None and recall.captured == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    assert recall.captured < 0.9999


@pytest.mark.parametrize("selector", [TopPages, TopTokens])
def test_with_room_for_all_everything_is_read(selector: type[TopPages] | type[TopTokens]) -> None:
    pair = begun(choosing(selector, ALL))
    (seq,) = pair.pieces
    for _ in range(40):
        assert worst(pair, [seq], [1]) < EXACT
    recall = pair.cache.report().recall
    assert recall is not None and recall.captured == pytest.approx(1.0, abs=1e-6)


def test_tokens_capture_no_less_than_pages_and_these_no_less_than_summaries_promise() -> None:
    captured = []
    for policy in (choosing(TopTokens), choosing(TopPages), small(4)):
        pair = begun(replace(policy, selector=replace(policy.selector, audit=1)))  # type: ignore[type-var, arg-type]
        (seq,) = pair.pieces
        for _ in range(60):
            pair.feed([seq], [1])
        recall = pair.cache.report().recall
        assert recall is not None and recall.audited > 0
        captured.append(recall.audited_exact)
    assert captured[0] > captured[1] + 0.01 > captured[2] + 0.02, captured


def test_no_far_tier() -> None:
    with pytest.raises(ValueError, match="an oracle reads every token to choose, expected no Far tier"):
        fed(choosing(TopTokens))


def test_an_oracle_in_between_leaves_nothing_behind() -> None:
    """High, oracle, High: the answers of a cache that never had one."""
    outputs = []
    for selector in (TopTokens(127), PageMeans(127)):
        pair = begun(small(4))
        (seq,) = pair.pieces
        pair.cache.set_selector(selector)
        pair.feed([seq], [1])
        pair.cache.set_selector(PageMeans(127))
        outputs.append([out for _ in range(4) for out in pair.feed([seq], [1])])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("selector", [TopPages, TopTokens])
def test_a_key_that_is_no_number(selector: type[TopPages] | type[TopTokens], bad: float) -> None:
    """Its page cannot be told from the others: refused, as by summaries, and withdrawn. Among sinks it is read anyway."""
    for position in (300, 10):
        pair = begun(choosing(selector), 500)
        (seq,) = pair.new()
        with pair.cache.step([seq], [500]) as step:
            for layer in range(2):
                q, k, v = pair.drawn(layer, 500)
                k[position, 1, 3] = bad
                step.attend(layer, q, k, v)
        q, k, v = pair.drawn(0, 1)
        step = pair.cache.step([seq], [1]).open()
        if position >= 32:
            with pytest.raises(ValueError, match="attend: layer 0, head 1 of the 0. sequence .* are not finite"):
                step.attend(0, q, k, v)
        else:
            step.attend(0, q, k, v)
        step.rollback()
        other = next(s for s in pair.pieces if s != seq)
        pair.feed([other], [1])
        pair.cache.free([seq])
