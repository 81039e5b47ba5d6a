"""Scorers: what they ask for, and that what they give is what their papers say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sight import FakeReader, allowed, seen_of
from torch import Tensor

from kvstrata import Unsupported
from kvstrata.budget import AdaptiveHeads, Knapsack, Uniform
from kvstrata.budget.allocate import refuse_other_scores
from kvstrata.policy import AccumulatedMass, KeyDiversity, KeyNorm, MeanSpread, Policy, Scorer, Seen, WindowVote
from kvstrata.policy.base import EVICTED, FULL

SCORERS: list[Scorer] = [WindowVote(8), MeanSpread(8), AccumulatedMass(), KeyNorm(), KeyDiversity()]


@pytest.fixture
def seen() -> Seen:
    return seen_of(torch.Generator().manual_seed(0))


def reader(seen: Seen) -> FakeReader:
    assert isinstance(seen.read, FakeReader)
    return seen.read


def attention(seen: Seen, r: int, g: int, t: int) -> Tensor:
    """f32 [N] of one query, the t-th of those that the row has seen; 0 where it may not look. A loop's body, no einsum."""
    read = reader(seen)
    position = int(seen.lengths[r]) - read.asked.shape[2] + t
    may = (seen.positions[r] >= 0) & (seen.positions[r] <= position)
    logits = read.kept[r] @ read.asked[r, g, t]
    return torch.where(may, logits.masked_fill(~may, -1e30).softmax(0), 0.0)


def pooled(seen: Seen, r: int, score: Tensor, kernel: int, kind: str) -> Tensor:
    out = torch.zeros_like(score)
    for i in torch.nonzero(seen.stored[r]).flatten().tolist():
        near = seen.stored[r] & ((seen.positions[r] - seen.positions[r, i]).abs() <= kernel // 2)
        out[i] = score[near].mean() if kind == "avg" else score[near].max()
    return out


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: type(s).__name__)
def test_a_score_for_each_token(scorer: Scorer, seen: Seen) -> None:
    score = scorer.score(seen)
    assert score.shape == seen.positions.shape and score.dtype == torch.float32
    assert score[seen.stored].isfinite().all()
    assert scorer.needs <= {"queries", "mass"}
    assert ("queries" in scorer.needs) == hasattr(scorer, "queries")
    with pytest.raises(AttributeError):
        scorer.needs = frozenset()  # type: ignore[misc]


@pytest.mark.parametrize("queries", [1, 5, 16, 64])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_window_vote_is_the_mean_then_the_pool(queries: int, pool: str, seen: Seen) -> None:
    """Queries asked for beyond the 16 that there are: those that there are."""
    got = WindowVote(queries, 7, pool).score(seen)  # type: ignore[arg-type]
    first = 16 - min(queries, 16)
    for r in range(3):
        heads = [torch.stack([attention(seen, r, g, t) for t in range(first, 16)]).mean(0) for g in range(2)]
        want = torch.stack([pooled(seen, r, a, 7, pool) for a in heads]).mean(0)
        torch.testing.assert_close(got[r], want)


@pytest.mark.parametrize(("spread", "weight"), [("std", 1.0), ("variance", 263.81)])
def test_mean_spread_adds_the_unbiased_spread(spread: str, weight: float, seen: Seen) -> None:
    got = MeanSpread(8, kernel=1, spread=spread).score(seen)  # type: ignore[arg-type]
    for r in range(3):
        heads = [torch.stack([attention(seen, r, g, t) for t in range(8, 16)]) for g in range(2)]
        add = [a.std(0) if spread == "std" else a.var(0) for a in heads]
        want = torch.stack([a.mean(0) + weight * s for a, s in zip(heads, add, strict=True)]).mean(0)
        torch.testing.assert_close(got[r], want)
    one = MeanSpread(1, kernel=1).score(seen)
    torch.testing.assert_close(one, WindowVote(1, kernel=1).score(seen))


def test_mean_spread_without_weight_is_a_window_vote(seen: Seen) -> None:
    for plain in (MeanSpread(8, beta=0.0), MeanSpread(8, spread="variance", gamma=0.0)):
        torch.testing.assert_close(plain.score(seen), WindowVote(8).score(seen))


def test_parameters_reach_the_reader(seen: Seen) -> None:
    WindowVote(32, 7, "max", "kernel").score(seen)
    MeanSpread(spread="variance", gamma=2.0).score(seen)
    assert reader(seen).calls == [
        ("attention", 32, "mean", 0.0),
        ("pool", 7, "max", "kernel"),
        ("attention", 32, "variance", 2.0),
        ("pool", 5, "avg", "present"),
    ]


def test_accumulated_mass_sums_all_queries(seen: Seen) -> None:
    got = AccumulatedMass().score(seen)
    for r in range(3):
        want = sum(attention(seen, r, g, t) for g in range(2) for t in range(16)) / 2
        torch.testing.assert_close(got[r], want)


def test_per_query_takes_the_bias_to_old_tokens_away() -> None:
    """Attention that is uniform over what each query sees: the sum falls with the position, per query it hardly does."""
    positions = torch.arange(100, dtype=torch.int32).unsqueeze(0)
    read = FakeReader(positions, torch.zeros(1, 100, 8), torch.zeros(1, 1, 100, 8))
    stored = torch.ones_like(positions)
    seen = Seen(0, positions, torch.tensor([100]), stored == 0, stored.to(torch.uint8), read=read)
    plain, fair = AccumulatedMass().score(seen)[0], AccumulatedMass(per_query=True).score(seen)[0]
    torch.testing.assert_close(fair, plain / torch.arange(100, 0, -1))
    assert plain[0] / plain[99] > 100 * fair[0] / fair[99] - 1e-3


def test_key_scores(seen: Seen) -> None:
    norm, cosine = KeyNorm().score(seen), KeyDiversity().score(seen)
    for r in range(3):
        keys = reader(seen).kept[r][seen.stored[r]]
        torch.testing.assert_close(norm[r][seen.stored[r]], -keys.square().sum(-1).sqrt())
        anchor = (keys / keys.norm(dim=-1, keepdim=True)).mean(0)
        want = -(keys @ anchor) / keys.norm(dim=-1) / anchor.norm()
        torch.testing.assert_close(cosine[r][seen.stored[r]], want)


@pytest.mark.parametrize(("kind", "kernel"), [("avg", 5), ("max", 3)])
def test_key_scores_are_pooled_over_stored_neighbours(seen: Seen, kind: str, kernel: int) -> None:
    plain, got = KeyDiversity().score(seen), KeyDiversity(kernel, kind).score(seen)  # type: ignore[arg-type]
    assert not torch.equal(plain, got)
    for r in range(3):
        at, mine = seen.positions[r][seen.stored[r]], plain[r][seen.stored[r]]
        near = [mine[(at - p).abs() <= kernel // 2] for p in at]
        want = torch.stack([n.mean() if kind == "avg" else n.max() for n in near])
        torch.testing.assert_close(got[r][seen.stored[r]], want)


def test_allocators_that_compare_heads_take_attention_only() -> None:
    for allocator in (AdaptiveHeads(), Knapsack()):
        for scorer in (KeyNorm(), KeyDiversity()):
            with pytest.raises(Unsupported, match=type(scorer).__name__):
                refuse_other_scores(allocator, type(scorer).__name__, scorer.is_mass)
        for scorer in (WindowVote(), MeanSpread(), AccumulatedMass()):
            refuse_other_scores(allocator, type(scorer).__name__, scorer.is_mass)
    refuse_other_scores(Uniform(), "KeyNorm", KeyNorm.is_mass)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowVote(0), r"WindowVote: queries is 0, expected >= 1"),
        (lambda: WindowVote(kernel=4), r"WindowVote: kernel is 4, expected an odd number >= 1"),
        (lambda: MeanSpread(kernel=-1), r"MeanSpread: kernel is -1, expected an odd number >= 1"),
        (lambda: KeyDiversity(2), r"KeyDiversity: kernel is 2, expected an odd number >= 1"),
        (lambda: WindowVote(pool="sum"), r"WindowVote: pool is 'sum', expected 'avg' or 'max'"),  # type: ignore[arg-type]
        (lambda: WindowVote(divide="n"), r"WindowVote: divide is 'n', expected 'present' or 'kernel'"),  # type: ignore[arg-type]
        (lambda: MeanSpread(spread="var"), r"MeanSpread: spread is 'var', expected 'std' or 'variance'"),  # type: ignore[arg-type]
        (lambda: MeanSpread(beta=-1.0), r"MeanSpread: beta is -1.0, expected a finite number >= 0"),
        (lambda: MeanSpread(gamma=float("nan")), r"MeanSpread: gamma is nan, expected a finite number >= 0"),
    ],
)
def test_bad_parameters_are_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_the_readmes_own_scorer(seen: Seen) -> None:
    """The README's example is run as it stands: it scores, and the policy plans with it."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "class Outliers" in b]
    names: dict[str, object] = {}
    exec(block, names)
    policy = names["policy"]
    assert isinstance(policy, Policy) and policy.scorer is not None and policy.planner is not None
    keys = reader(seen).kept
    keys[0, 12] = torch.eye(8)[0] * 5
    score = policy.scorer.score(seen)
    assert score[0].argmax() == 12 and score.shape == seen.positions.shape
    state = policy.planner.plan(replace(seen, score=score, allowance=allowed(400, 0, 400))).state
    assert state is not None and state[0, 12] == FULL
    movable = seen.stored & ~seen.protected
    assert ((state == FULL) & movable).sum(1).tolist()[:2] == [16, 0]
    assert torch.equal(state[~movable], seen.state[~movable]) and (state[1][movable[1]] == EVICTED).all()
