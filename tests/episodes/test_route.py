"""The router: equal to brute force on random cases; margin and hysteresis, case by case."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstrata.episodes import Route, Router


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else 0.0


def brute(
    router: Router, query: Tensor, vectors: Tensor, labels: Tensor, centroids: Tensor, last: Route | None
) -> Route:
    """Section 2.7, word by word, over Python lists."""
    cos = [cosine(query, w) for w in vectors]
    episodes = range(len(centroids))
    members = {e: [k for k in range(len(cos)) if int(labels[k]) == e] for e in episodes}
    if router.rule == "nearest_window":
        v = [max(cos[k] for k in members[e]) for e in episodes]
    elif router.rule == "centroid":
        v = [cosine(query, c) for c in centroids]
    else:
        nearest = sorted(range(len(cos)), key=lambda k: (-cos[k], k))[:10]
        total = sum(max(cos[k], 0.0) for k in nearest)
        v = [sum(max(cos[k], 0.0) for k in nearest if k in members[e]) / total if total > 0 else 0.0 for e in episodes]
    first = min(episodes, key=lambda e: (-v[e], e))
    if last is not None and max(v) - v[last.episodes[0]] <= router.hysteresis:
        first = last.episodes[0]
    read, margin = [first], math.inf
    if len(v) > 1:
        second = min((e for e in episodes if e != first), key=lambda e: (-v[e], e))
        margin = v[first] - v[second]
        before = last is not None and second in last.episodes
        if router.top >= 2 and margin < router.margin + (router.hysteresis if before else 0.0):
            read.append(second)
    return Route(tuple(read), tuple(v), margin, max(cos) < router.query_floor)


@pytest.mark.parametrize("rule", ["nearest_window", "centroid", "vote"])
@pytest.mark.parametrize("top", [1, 2])
def test_equals_brute_force(rule: str, top: int) -> None:
    random = np.random.default_rng(top)
    generator = torch.Generator().manual_seed(top)
    seen = {"first": 0, "two": 0, "kept": 0, "uncertain": 0}
    for case in range(400):
        episodes, d = int(random.integers(1, 7)), int(random.integers(1, 9))
        n = episodes + int(random.integers(0, 20))
        labels = torch.tensor(random.permutation([*range(episodes), *random.integers(0, episodes, n - episodes)]))
        vectors = torch.randn(n, d, generator=generator)
        vectors[random.integers(n)] *= case % 3  # of another length, or zero
        centroids = torch.stack([vectors[labels == e].mean(0) for e in range(episodes)])
        query = torch.randn(d, generator=generator) * (case % 50 > 0)
        router = Router(rule, top, *random.choice([0.0, 0.05, 0.5], 2), float(random.choice([-1, 0.15, 0.9])))  # type: ignore[arg-type]
        before = tuple(int(e) for e in random.permutation(episodes)[: int(random.integers(1, 3))])
        last = Route(before, (), 0.0, False) if case % 2 else None
        got = router.route(query, vectors, labels.to(torch.int32), centroids, last)
        want = brute(router, query, vectors, labels, centroids, last)
        assert got.episodes == want.episodes and got.uncertain == want.uncertain
        assert got.scores == pytest.approx(want.scores, abs=1e-12)
        assert got.margin == pytest.approx(want.margin, abs=1e-12)
        seen["two"] += len(got.episodes) == 2
        seen["kept"] += got.margin < 0
        seen["uncertain"] += got.uncertain
        seen["first"] += got.episodes[0] > 0
    assert all(count > 10 for name, count in seen.items() if name != "two"), seen
    assert seen["two"] > 10 if top == 2 else seen["two"] == 0


# v of the episodes, what was read last, what is read now; margin .25, hysteresis .125: exact in binary.
MARGIN_AND_HYSTERESIS = [
    ((0.75, 0.25, 0.0), None, (0,)),  # a clear lead: one
    ((0.5, 0.25, 0.0), None, (0,)),  # a lead of exactly the margin: one
    ((0.5, 0.375, 0.0), None, (0, 1)),  # a smaller lead: two
    ((0.375, 0.5, 0.0), None, (1, 0)),  # the better one is first
    ((0.5, 0.5, 0.5), None, (0, 1)),  # ties: the lower episode, for the second too
    ((0.0, 0.5, 0.5), None, (1, 2)),
    ((0.25, 0.75, 0.0), (0,), (1,)),  # the last first is far behind: it goes
    ((0.375, 0.5, 0.0), (0,), (0, 1)),  # behind by exactly the hysteresis: it stays, and what leads is read too
    ((0.25, 0.4375, 0.0), (0,), (1, 0)),  # behind by more: it is second
    ((0.125, 0.5, 0.0), (0,), (1,)),  # as second: behind by margin and hysteresis: one
    ((0.1875, 0.5, 0.0), (0,), (1, 0)),  # by less than both: still read
    ((0.5, 0.1875, 0.0), (0, 1), (0, 1)),  # the last second is held likewise
    ((0.5, 0.1875, 0.0), (0, 2), (0,)),  # one that was not read last time is not
    ((0.5, 0.125, 0.0), (0, 1), (0,)),
    ((0.5, 0.5, 0.5), (2,), (2, 0)),  # a tie does not move the first
    ((0.0, 0.125, 0.0625), (2, 0), (2, 1)),  # all near: the last first stays, the best other one comes
]


def test_sixteen_cases_are_tabled() -> None:
    assert len(MARGIN_AND_HYSTERESIS) == 16


@pytest.mark.parametrize(("v", "before", "now"), MARGIN_AND_HYSTERESIS)
@pytest.mark.parametrize("top", [1, 2])
def test_margin_and_hysteresis(
    v: tuple[float, ...], before: tuple[int, ...] | None, now: tuple[int, ...], top: int
) -> None:
    router = Router(top=top, margin=0.25, hysteresis=0.125)
    last = None if before is None else Route(before, v, 0.0, False)
    got = router.choose(np.array(v), last=last)
    assert got.episodes == now[:top]
    assert got.scores == v
    assert got.margin == v[now[0]] - max(x for e, x in enumerate(v) if e != now[0])


def test_one_episode() -> None:
    one = torch.eye(3)[:1]
    got = Router().route(one[0], one, torch.zeros(1, dtype=torch.int32), one, Route((0,), (1.0,), math.inf, False))
    assert got == Route((0,), (1.0,), math.inf, False)


def test_equal_windows_tie_wherever_they_stand() -> None:
    """A matrix product may round equal rows differently: the lower episode is first all the same."""
    generator = torch.Generator().manual_seed(0)
    for n in range(6, 40):
        vectors, query = torch.randn(2, 384, generator=generator)[[1] * n], torch.randn(384, generator=generator)
        labels = (2 - torch.arange(n) % 3).to(torch.int32)
        assert Router().route(query, vectors, labels, vectors[:3]).episodes == (0, 1)


def test_a_question_like_no_window_is_uncertain_whatever_the_rule() -> None:
    windows = torch.eye(4)[:2]
    labels = torch.tensor([0, 1], dtype=torch.int32)
    query = torch.tensor([0.0, 0.1, 1.0, 0.0])
    for rule in ("nearest_window", "centroid", "vote"):
        # The centroid says nothing of it.
        routes = [
            Router(rule, query_floor=floor).route(query, windows, labels, query.expand(2, 4)) for floor in (0.15, 0.05)
        ]
        assert [r.uncertain for r in routes] == [True, False]


def test_bad_input() -> None:
    vectors, labels, query = torch.eye(3), torch.tensor([0, 1, 1]), torch.ones(3)
    centroids = vectors[:2]
    nan = torch.full((3,), float("nan"))
    for given, says in [
        ((nan, vectors, labels, centroids), r"query \[3\] has 3 NaN"),
        ((torch.ones(2), vectors, labels, centroids), r"query is torch.float32 \[2\], expected floating point \[3\]"),
        ((query, torch.ones(0, 3), labels[:0], centroids[:0]), "expected a window for each"),
        ((query, vectors * float("inf"), labels, centroids), r"vectors \[3, 3\] has"),
        (
            (query, vectors, labels, centroids[:, :2]),
            r"centroids is torch.float32 \[2, 2\], expected floating point \[E, 3\]",
        ),
        ((query, vectors, labels[:2], centroids), r"labels is torch.int64 \[2\], expected integers \[3\]"),
        ((query, vectors, labels.float(), centroids), "labels is torch.float32"),
        ((query, vectors, labels, vectors), r"labels name episodes \[0, 1\], centroids 3"),
        ((query, vectors, labels, centroids, Route((2,), (), 0.0, False)), r"last names episodes \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            Router().route(*given)  # type: ignore[arg-type]
    for wrong, says in [
        ({"rule": "nearest"}, "rule is 'nearest', expected one of nearest_window, centroid, vote"),
        ({"top": 3}, "top is 3"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"hysteresis": math.nan}, "hysteresis is nan"),
        ({"query_floor": 2}, "query_floor is 2"),
    ]:
        with pytest.raises(ValueError, match=says):
            Router(**wrong)  # type: ignore[arg-type]
