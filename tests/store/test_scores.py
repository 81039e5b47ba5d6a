"""What a store keeps for scoring: attention mass of each token, the last queries, scores that move with their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvstrata import Cache, LayerSpec, Shape, testing
from kvstrata.policy import Plan, Policy, Seen
from kvstrata.policy.base import EVICTED
from kvstrata.rows import Rows

LAYERS = [LayerSpec(2, 4, 32), LayerSpec(2, 4, 32)]


@dataclass(frozen=True)
class Mass:
    """Accumulated mass, plainly."""

    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    def score(self, seen: Seen) -> torch.Tensor:
        assert seen.read is not None
        return seen.read.mass()


@dataclass(frozen=True)
class Window:
    """Attention of the last queries."""

    queries: int = 8
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def score(self, seen: Seen) -> torch.Tensor:
        assert seen.read is not None
        return seen.read.attention(self.queries, "mean", 0.0).mean(1)


@dataclass(frozen=True)
class Drop:
    """Evicts given positions."""

    positions: tuple[int, ...] = ()

    def plan(self, seen: Seen) -> Plan:
        gone = torch.isin(seen.positions, torch.tensor(self.positions)) & ~seen.protected
        return Plan(state=torch.where(gone, EVICTED, seen.state).to(torch.uint8))


def cache_of(scorer: object, gone: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Cache:
    policy = Policy("scored", Drop(gone), scorer, sinks=4, window=16, interval=64, chunk=32)  # type: ignore[arg-type]
    return Cache(Shape(LAYERS, dtype), policy=policy)


class Dense:
    """Everything fed so far, and the mass that naive attention gives."""

    def __init__(self) -> None:
        self.q, self.k = torch.zeros(2, 4, 0, 32), torch.zeros(2, 2, 0, 32)

    def feed(self, cache: Cache, seq: object, n: int, seed: int, fail: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        made = [[torch.randn(n, h, 32, generator=generator) for h in (4, 2, 2)] for _ in LAYERS]
        with cache.step([seq], [n]) as step:  # type: ignore[list-item]
            for layer, (q, k, v) in enumerate(made):
                step.attend(layer, q, k, v)
            if fail:
                raise KeyError("a failed step")
        self.q = torch.cat([self.q, torch.stack([m[0].transpose(0, 1) for m in made])], 2)
        self.k = torch.cat([self.k, torch.stack([m[1].transpose(0, 1) for m in made])], 2)

    def shares(self, layer: int) -> torch.Tensor:
        """Attention of every query, f32 [H, G, T, N]."""
        q, k = self.q[layer].view(2, 2, -1, 32), self.k[layer]
        z = torch.einsum("hgtd,hnd->hgtn", q, k) * 32**-0.5
        return z.masked_fill(torch.ones(z.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)


def rows(cache: Cache, seq: object, layer: int) -> Rows:
    i = seq.id  # type: ignore[attr-defined]
    columns = cache._store.columns(layer, [i])
    return Rows(cache._store, cache.shape, layer, [i], columns, (32**-0.5, 0.0))


def test_mass_is_that_of_all_queries() -> None:
    """Prompts in chunks, single tokens, short turns, a failed step: every query counts once."""
    cache, dense = cache_of(Mass()), Dense()
    (seq,) = cache.new()
    for i, n in enumerate((100, 1, 1, 5, 16, 17, 70, *[1] * 20)):
        dense.feed(cache, seq, n, i)
    with pytest.raises(KeyError):
        dense.feed(cache, seq, 3, 99, fail=True)
    for layer in range(2):
        expected = dense.shares(layer).sum(2).mean(1)
        torch.testing.assert_close(rows(cache, seq, layer).mass(), expected, rtol=1e-4, atol=1e-5)


def test_scores_move_with_their_tokens() -> None:
    """Plans repack pages and forks share them: each token keeps its own mass, and each branch its own."""
    gone = tuple(range(20, 60, 3))
    cache = cache_of(Mass(), gone)
    (seq,) = cache.new()
    dense = Dense()
    for i in range(3):
        dense.feed(cache, seq, 16, i)
    before = dict(zip(range(48), rows(cache, seq, 0).mass()[0].tolist(), strict=True))
    cache.compress()
    _, _, positions = cache.materialize(0, seq)
    after = dict(zip(positions[0].tolist(), rows(cache, seq, 0).mass()[0].tolist(), strict=True))
    assert set(after) == {p for p in range(48) if p not in gone or p >= 32}
    assert all(after[p] == before[p] for p in after)
    (kid,) = cache.fork(seq)
    dense.feed(cache, kid, 1, 1)
    assert rows(cache, seq, 0).mass()[0].tolist() == [after[p] for p in positions[0].tolist()]
    assert rows(cache, kid, 0).mass()[0, 0] > after[0]


@pytest.mark.parametrize("turns", [(100,), (100, 3, 1, 1), (5, 1, 1), (30, 40)])
def test_queries_are_the_last_ones(turns: tuple[int, ...]) -> None:
    cache, dense = cache_of(Window()), Dense()
    (seq,) = cache.new()
    for i, n in enumerate(turns):
        dense.feed(cache, seq, n, i)
    with pytest.raises(KeyError):
        dense.feed(cache, seq, 12, 99, fail=True)
    for layer in range(2):
        q, counts = rows(cache, seq, layer).queries()
        n = min(8, sum(turns))
        assert counts.tolist() == [n, n]
        assert torch.equal(q[:, :, -n:], dense.q[layer].view(2, 2, -1, 32)[:, :, -n:])
        found = rows(cache, seq, layer).attention(8, "mean", 0.0)
        torch.testing.assert_close(found, dense.shares(layer)[:, :, -n:].mean(2), rtol=1e-4, atol=1e-6)


def test_queries_follow_crops_and_forks() -> None:
    cache, dense = cache_of(Window()), Dense()
    (seq,) = cache.new()
    dense.feed(cache, seq, 30, 0)
    (kid,) = cache.fork(seq)
    dense.feed(cache, kid, 2, 1)
    expected = dense.q[0].view(2, 2, -1, 32)
    assert torch.equal(rows(cache, kid, 0).queries()[0], expected[:, :, 24:32])
    assert torch.equal(rows(cache, seq, 0).queries()[0], expected[:, :, 22:30])
    cache.crop([seq], [27])
    q, counts = rows(cache, seq, 0).queries()
    assert counts.tolist() == [5, 5]
    assert torch.equal(q, expected[:, :, 22:27])


def test_a_fault_in_the_append_keeps_the_queries() -> None:
    cache, dense = cache_of(Window()), Dense()
    (seq,) = cache.new()
    dense.feed(cache, seq, 30, 0)
    before = rows(cache, seq, 1).queries()[0]
    with testing.fault("append.after_take", 2), pytest.raises(RuntimeError, match="fault"):
        dense.feed(cache, seq, 1, 1)
    assert torch.equal(before, rows(cache, seq, 1).queries()[0])


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_scores_of_rows_are_pooled_like_those_of_query_heads(kind: str) -> None:
    """Over positions, across evicted ones; one score for a row is one of all its query heads."""
    cache, dense = cache_of(Mass(), (10, 11, 12, 20)), Dense()
    (seq,) = cache.new()
    dense.feed(cache, seq, 48, 0)
    cache.compress()
    read = rows(cache, seq, 0)
    score = torch.rand(2, cache._store.columns(0, [seq.id]), generator=torch.Generator().manual_seed(1))
    got = read.pool(score, 5, kind, "present")  # type: ignore[arg-type]
    torch.testing.assert_close(got, read.pool(score.unsqueeze(1).expand(-1, 2, -1), 5, kind, "present"))  # type: ignore[arg-type]
    positions = cache.materialize(0, seq)[2]
    for r in range(2):
        near = [score[r][(positions[r] - p).abs() <= 2] for p in positions[r]]
        torch.testing.assert_close(got[r], torch.stack([n.mean() if kind == "avg" else n.max() for n in near]))
    with pytest.raises(ValueError, match=r"pool: score is torch.float32 \[3, 2\]"):
        read.pool(torch.zeros(3, 2), 5, "avg", "present")
