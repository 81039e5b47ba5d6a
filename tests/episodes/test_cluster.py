"""Clusters: planted topics are found, whatever the threads; few, equal and zero windows; what is no embedding is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstrata.config import Unsupported
from kvstrata.episodes import Clusters, cluster

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra 'episodes')")


def planted(n: int, topics: int, d: int = 32, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors f32 [n, d] about orthogonal topics, and the topic of each i64 [n]."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(topics, (n,), generator=generator)
    topic[:topics] = torch.randperm(topics, generator=generator)
    vectors = torch.eye(d)[topic] + noise * torch.randn(n, d, generator=generator) / d**0.5
    return torch.nn.functional.normalize(vectors, dim=-1), topic


def numbered_by_first(labels: Tensor) -> list[int]:
    order: dict[int, int] = {}
    return [order.setdefault(int(x), len(order)) for x in labels]


@pytest.mark.parametrize("topics", [1, 2, 4, 8])
def test_planted_topics_are_found(topics: int) -> None:
    vectors, topic = planted(120, topics)
    found = cluster(vectors, topics)
    assert found.labels.dtype == torch.int32 and found.labels.tolist() == numbered_by_first(topic)
    assert found.centroids.dtype == torch.float32 and found.centroids.shape == (topics, 32)
    assert found.zeros == 0
    for e in range(topics):
        mean = vectors[found.labels == e].double().mean(0)
        torch.testing.assert_close(found.centroids[e].double(), mean / mean.norm(), atol=1e-6, rtol=0)


def test_tau_is_the_fifth_percentile_of_the_cosines_to_the_own_centroid() -> None:
    vectors, _ = planted(201, 4)
    found = cluster(vectors, 4)
    own = sorted(
        float(w.double() @ found.centroids[int(e)].double()) for w, e in zip(vectors, found.labels, strict=True)
    )
    assert found.tau == pytest.approx(own[10], abs=1e-6)  # 5 % of the 200 steps between them
    assert sum(x < found.tau - 1e-6 for x in own) == 10


def exhaustive(vectors: Tensor, episodes: int) -> float:
    """The least sum of squared distances to the means of ``episodes`` groups, over all ways to form them."""
    wide, least = vectors.double(), float("inf")
    for labels in itertools.product(range(episodes), repeat=len(vectors)):
        least = min(least, inertia(wide, torch.tensor(labels)))
    return least


def inertia(wide: Tensor, labels: Tensor) -> float:
    groups = (wide[labels == e] for e in labels.unique())
    return sum(float((g - g.mean(0)).square().sum()) for g in groups)


def test_small_cases_are_the_best_there_are() -> None:
    for seed in range(5):
        vectors, _ = planted(8, 3, d=4, noise=2.0, seed=seed)
        found = cluster(vectors, 3)
        assert inertia(vectors.double(), found.labels) == pytest.approx(exhaustive(vectors, 3), abs=1e-6)


def same(a: Clusters, b: Clusters) -> bool:
    return (
        torch.equal(a.labels, b.labels)
        and torch.equal(a.centroids, b.centroids)
        and (a.tau, a.zeros) == (b.tau, b.zeros)
    )


@pytest.mark.parametrize("n", [100, 3000])  # scikit-learn shares out 256 windows at a time
def test_threads_change_nothing(n: int) -> None:
    from threadpoolctl import threadpool_limits

    vectors, _ = planted(n, 6, noise=4.0)  # no clear topics: many near ties
    found = []
    for threads in (1, 4, 4):
        with threadpool_limits(limits=threads):
            found.append(cluster(vectors, 6, n_init=3))
    assert same(found[0], found[1]) and same(found[1], found[2])
    assert len(found[0].labels.unique()) == 6


def test_the_seed_decides() -> None:
    vectors, _ = planted(300, 6, noise=4.0)
    assert same(cluster(vectors, 6, seed=1, n_init=1), cluster(vectors, 6, seed=1, n_init=1))
    assert not same(cluster(vectors, 6, seed=1, n_init=1), cluster(vectors, 6, seed=2, n_init=1))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_windows_than_episodes(n: int) -> None:
    found = cluster(planted(n, n)[0], 4)
    assert found.labels.tolist() == list(range(n))
    assert found.centroids.shape[0] == n
    assert found.tau == pytest.approx(1.0)


def test_equal_windows_are_one() -> None:
    vectors = torch.eye(5)[[3, 3, 1, 3, 1, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn warns when it finds fewer clusters than asked for
        found = cluster(vectors, 4)
    assert found.labels.tolist() == [0, 0, 1, 0, 1, 1]
    assert torch.equal(found.centroids, torch.eye(5)[[3, 1]])


@pytest.mark.parametrize("noise", [1e-8, 1e-7, 1e-6])
def test_equal_texts_of_different_batches_are_one(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(12) % 2
    vectors = torch.nn.functional.normalize(torch.randn(2, 384, generator=generator), dim=-1)[kinds]
    found = cluster(vectors + noise * torch.randn(12, 384, generator=generator), 4)
    assert found.labels.tolist() == kinds.tolist()
    apart = cluster(vectors + 1e-3 * torch.randn(12, 384, generator=generator), 4)
    assert len(apart.centroids) == 4


def test_zero_windows_join_the_first_episode_and_are_counted() -> None:
    vectors, topic = planted(40, 4)
    bare = cluster(vectors, 4)
    at = [0, 7, 20]
    whole = torch.zeros(43, 32)
    rest = torch.tensor([i for i in range(43) if i not in at])
    whole[rest] = vectors
    found = cluster(whole, 4)
    assert found.zeros == 3 and found.labels[at].tolist() == [0, 0, 0]
    assert torch.equal(found.labels[rest], bare.labels)
    assert torch.equal(found.centroids, bare.centroids) and found.tau == bare.tau
    nothing = cluster(torch.zeros(3, 8), 4)
    assert nothing.labels.tolist() == [0, 0, 0] and nothing.zeros == 3 and nothing.tau == -1
    assert torch.equal(nothing.centroids, torch.zeros(1, 8))


def test_length_says_nothing() -> None:
    vectors, _ = planted(60, 4)
    scale = torch.tensor([0.125, 1.0, 8.0])[torch.arange(60) % 3].unsqueeze(1)
    assert same(cluster(vectors * scale, 4), cluster(vectors, 4))


def test_bad_input() -> None:
    vectors, _ = planted(10, 2)
    nan = vectors.clone()
    nan[3, 4] = float("nan")
    for given, says in [
        (nan, r"vectors \[10, 32\] has 1 NaN or infinite values"),
        (vectors[0], r"vectors is torch.float32 \[32\], expected floating point \[n, d\]"),
        (vectors.long(), r"vectors is torch.int64 \[10, 32\]"),
        (vectors[:0], r"vectors is \[0, 32\], expected at least one window"),
        (vectors.numpy(), "vectors is ndarray, expected a tensor"),
    ]:
        with pytest.raises(ValueError, match=says):
            cluster(given)
    with pytest.raises(ValueError, match="episodes is 0"):
        cluster(vectors, 0)
    with pytest.raises(ValueError, match="n_init is 0"):
        cluster(vectors, n_init=0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(Unsupported, match=r"scikit-learn is not installed; pip install kvstrata\[episodes\]"):
        cluster(torch.from_numpy(np.eye(4)), 1)


def test_import_brings_neither_scikit_learn_nor_sentence_transformers() -> None:
    code = (
        "import sys, kvstrata.episodes\n"
        "assert not {'sklearn', 'scipy', 'sentence_transformers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
