"""New windows: joined, held as strays, founding; equal to a reference over lists, and never changing what was."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstrata.episodes import Clusters, Placed, Topics

AXES = torch.eye(6)


def two_topics(**given: object) -> Topics:
    """Two windows on axis 0 are episode 0, two on axis 1 episode 1; tau 0.8."""
    vectors, labels = AXES[[0, 1, 1, 0]], torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    return Topics.of(vectors, Clusters(labels, AXES[:2], 0.8, 0), **given)  # type: ignore[arg-type]


def follow(topics: Topics, *vectors: Tensor) -> tuple[Topics, list[Placed]]:
    placed = []
    for vector in vectors:
        topics, where = topics.assign(vector)
        placed.append(where)
    return topics, placed


def test_a_window_joins_the_nearest_and_its_centroid_becomes_the_mean() -> None:
    topics, placed = follow(two_topics(), torch.tensor([0.9, 0.1, 0.3, 0, 0, 0]) * 5)
    assert placed == [Placed(4, 0)]
    assert topics.labels.tolist() == [0, 1, 1, 0, 0]
    mean = (2 * AXES[0] + torch.nn.functional.normalize(torch.tensor([0.9, 0.1, 0.3, 0, 0, 0]), dim=0)) / 3
    torch.testing.assert_close(topics.centroids, torch.stack([mean / mean.norm(), AXES[1]]))


def test_one_stray_opens_nothing_two_alike_one_episode() -> None:
    before = two_topics()
    one, placed = follow(before, AXES[2] + 0.1 * AXES[1])
    assert placed == [Placed(4, 1, stray=True)]  # held by the nearest
    assert one.strays == (4,) and one.labels.tolist() == [0, 1, 1, 0, 1]
    assert torch.equal(one.centroids, before.centroids)  # which it does not move
    apart, placed = follow(one, AXES[3])
    assert placed == [Placed(5, 0, stray=True)]  # ties: the lower episode
    alike, placed = follow(apart, AXES[2])
    assert placed == [Placed(6, 2, founded=(4, 6))]
    assert alike.labels.tolist() == [0, 1, 1, 0, 2, 0, 2] and alike.strays == (5,)
    torch.testing.assert_close(
        alike.centroids[2], torch.nn.functional.normalize(AXES[2] + 0.0499 * AXES[1], dim=0), atol=1e-4, rtol=0
    )
    joined, placed = follow(alike, AXES[2], AXES[3])
    assert placed == [Placed(7, 2), Placed(8, 3, founded=(5, 8))]
    assert joined.strays == () and joined.centroids.shape == (4, 6)
    # Nothing that was has changed.
    assert before.labels.tolist() == [0, 1, 1, 0] and one.strays == (4,) and apart.strays == (4, 5)


def test_open_after() -> None:
    near = [AXES[2] + 0.3 * AXES[i] for i in (3, 4, 5)]  # within 0.9 of each other
    for count in (1, 2, 3):
        _, placed = follow(two_topics(open_after=count), *near[:count])
        assert placed[-1] == Placed(3 + count, 2, founded=tuple(range(4, 4 + count)))
        assert all(p.stray and not p.founded for p in placed[:-1])
    # b and c are near a, but not each other: no three are.
    a, b, c = AXES[2], AXES[2] + 0.7 * AXES[3], AXES[2] - 0.7 * AXES[3]
    topics, placed = follow(two_topics(open_after=3), b, c, a)
    assert [p.stray for p in placed] == [True] * 3 and topics.strays == (4, 5, 6)
    _, placed = follow(topics, a)
    assert placed == [Placed(7, 2, founded=(4, 6, 7))]  # the earliest that do


def test_max_episodes_is_kept_and_the_refusal_is_told() -> None:
    topics, placed = follow(two_topics(max_episodes=2), AXES[2], AXES[2], AXES[3], AXES[2])
    assert placed == [
        Placed(4, 0, stray=True),
        Placed(5, 0, stray=True, refused=True),
        Placed(6, 0, stray=True),
        Placed(7, 0, stray=True, refused=True),
    ]
    assert topics.refused == 2 and topics.strays == (4, 5, 6, 7) and len(topics.centroids) == 2


def test_tau_is_the_clusters_or_a_number() -> None:
    off = AXES[0] + AXES[2]  # 0.707 of axis 0
    assert two_topics().assign(off)[1].stray
    assert not two_topics(tau=0.7).assign(off)[1].stray
    assert not two_topics(tau=-1).assign(-AXES[0] - AXES[1])[1].stray
    assert two_topics(tau=1).assign(AXES[0] + 0.01 * AXES[2])[1].stray
    assert not two_topics(tau=1).assign(AXES[0] * 3)[1].stray  # exactly there


def test_a_zero_window_joins_the_first_and_is_counted() -> None:
    before = two_topics(open_after=1)
    topics, placed = follow(before, torch.zeros(6), torch.zeros(6))
    assert placed == [Placed(4, 0), Placed(5, 0)]
    assert (before.zeros, topics.zeros) == (0, 2)
    assert torch.equal(topics.centroids, before.centroids)


def reference(vectors: list[Tensor], topics: Topics, members: list[list[int]], first: int) -> list[Placed]:
    """Section 2.8 over lists. members: the windows of each episode; first: windows clustered before."""
    placed, strays = [], []

    def cos(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    def centroid(e: int) -> Tensor:
        return torch.stack([v / v.norm() for k in members[e] for v in [vectors[k]]]).mean(0)

    for k in range(first, len(vectors)):
        near = [cos(vectors[k], centroid(e)) for e in range(len(members))]
        e = near.index(max(near))
        if near[e] >= topics.tau:
            members[e].append(k)
            placed.append(Placed(k, e))
            continue
        groups = [(*g, k) for g in itertools.combinations(strays, topics.open_after - 1)]
        strays.append(k)
        alike = [
            g for g in groups if all(cos(vectors[a], vectors[b]) >= topics.tau for a, b in itertools.combinations(g, 2))
        ]
        if alike and len(members) < topics.max_episodes:
            members.append(list(alike[0]))
            strays = [s for s in strays if s not in alike[0]]
            placed.append(Placed(k, len(members) - 1, founded=alike[0]))
        else:
            placed.append(Placed(k, e, stray=True, refused=bool(alike)))
    return placed


@pytest.mark.parametrize("open_after", [1, 2, 3])
def test_random_conversations_equal_the_reference_and_a_resumed_one(open_after: int) -> None:
    generator = torch.Generator().manual_seed(open_after)
    seen = {"founded": 0, "refused": 0, "stray": 0, "joined": 0}
    for case in range(30):
        d, tau = int(torch.randint(2, 12, (1,), generator=generator)), 0.3 + 0.6 * case / 30
        vectors = list(torch.randn(60, d, generator=generator, dtype=torch.float64).float())
        labels = torch.tensor([0, 1, 0, 1, 2, 2], dtype=torch.int32)
        start = torch.stack(vectors[:6])
        kept = {"tau": tau, "open_after": open_after, "max_episodes": 5}
        topics = Topics.resume(start, labels, **kept)  # type: ignore[arg-type]
        members = [[0, 2], [1, 3], [4, 5]]
        want = reference([v.double() for v in vectors], topics, members, 6)
        for k, expected in zip(range(6, 60), want, strict=True):
            topics, placed = topics.assign(vectors[k])
            assert placed == expected
            seen["founded"] += bool(placed.founded)
            seen["refused"] += placed.refused
            seen["stray"] += placed.stray
            seen["joined"] += not placed.stray
            if k % 6:
                continue
            again = Topics.resume(
                torch.stack(vectors[: k + 1]),
                topics.labels,
                strays=topics.strays,
                refused=topics.refused,
                **kept,  # type: ignore[arg-type]
            )
            assert np.array_equal(again.totals, topics.totals) and np.array_equal(again.held, topics.held)
            assert torch.equal(again.centroids, topics.centroids)
        own = [[k for k in range(60) if topics.labels[k] == e and k not in topics.strays] for e in range(len(members))]
        assert own == members
        assert topics.refused == sum(p.refused for p in want)
    assert min(seen.values()) > 10, seen


def test_bad_input() -> None:
    topics = two_topics()
    with pytest.raises(ValueError, match=r"vector is torch.float32 \[5\], expected floating point \[6\]"):
        topics.assign(torch.ones(5))
    with pytest.raises(ValueError, match=r"vector \[6\] has 6 NaN or infinite"):
        topics.assign(torch.full((6,), float("nan")))
    for given, says in [
        ({"tau": 1.5}, "tau is 1.5, expected 'auto' or a cosine"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"open_after": 0}, "open_after is 0"),
        ({"max_episodes": 1}, "max_episodes is 1, expected at least the 2 there are"),
    ]:
        with pytest.raises(ValueError, match=says):
            two_topics(**given)
    labels = torch.tensor([0, 1, 1, 0])
    for windows, of, strays, says in [
        (AXES, labels, (), r"labels is torch.int64 \[4\], expected integers \[6\]"),
        (AXES[:4], labels * 2, (), r"labels name episodes \[0, 2\]"),
        (AXES[:0], labels[:0], (), r"labels name episodes \[\]"),
        (AXES[:4], labels, (4,), r"strays is \[4\]"),
        (AXES[:4], labels, (1, 1), r"strays is \[1, 1\]"),
    ]:
        with pytest.raises(ValueError, match=says):
            Topics.resume(windows, of, tau=0.5, strays=strays)
