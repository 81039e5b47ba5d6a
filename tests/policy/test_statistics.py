"""When ARKV's statistics are measured, and whose they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvstrata import Budget, Cache, LayerSpec, Shape
from kvstrata.budget import EntropyShare
from kvstrata.cache import Sequence
from kvstrata.policy import arkv
from kvstrata.rows import Rows

SHAPE = Shape([LayerSpec(2, 4, 32)] * 2, torch.float32)


def feed(cache: Cache, seqs: list[Sequence], tokens: int, step: int) -> None:
    g = torch.Generator().manual_seed(cache.logical_length(seqs[0]))
    for first in range(0, tokens, step):
        n = min(step, tokens - first)
        with cache.step(seqs, columns=n) as opened:
            for layer, spec in enumerate(SHAPE.layers):
                q, k, v = (
                    torch.randn(len(seqs), n, heads, spec.head_dim, generator=g)
                    for heads in (spec.q_heads, spec.kv_heads, spec.kv_heads)
                )
                opened.attend(layer, q, k, v)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers as they are measured."""
    seen: list[int] = []
    real = Rows.statistics

    def noted(self: Rows, *args: object) -> torch.Tensor:
        seen.append(self._layer)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Rows, "statistics", noted)
    return seen


def made(every: int) -> Cache:
    policy = arkv(allocator=EntropyShare(full_share=0.05, every=every))
    return Cache(SHAPE, Budget.bytes(SHAPE.token_bytes() * 1024), replace(policy, interval=64))


@pytest.mark.parametrize("every", [0, 512])
def test_a_sequence_is_measured_again_once_it_has_grown(every: int, measured: list[int]) -> None:
    cache = made(every)
    seqs = cache.new(1)
    feed(cache, seqs, 512, 512)
    assert measured == [0, 1]
    feed(cache, seqs, 511, 1)
    assert measured == [0, 1] * (1 if every else 1 + 511 // cache.policy.interval)
    feed(cache, seqs, 1, 1)
    assert measured == [0, 1] * (2 if every else 2 + 511 // cache.policy.interval)


def test_what_was_measured_follows_a_fork_and_ends_with_its_sequence(measured: list[int]) -> None:
    cache = made(512)
    seqs = cache.new(1)
    feed(cache, seqs, 512, 512)
    oq, values = (
        cache._plans.statistics.oq(0, [seqs[0].id], 2),
        cache._plans.statistics.values(0, [seqs[0].id], 2),
    )
    assert (oq != 1).all() and (values > 0).any()
    told, every_oq = cache.statistics()
    assert told.shape == (2, 2, 3) and torch.equal(told[0], values) and torch.equal(every_oq[0], oq)
    (fork,) = cache.fork(seqs[0])
    assert torch.equal(cache._plans.statistics.oq(0, [fork.id], 2), oq)
    cache.clear([fork])
    assert torch.equal(cache._plans.statistics.oq(0, [fork.id], 2), torch.ones(2))
    assert torch.equal(cache._plans.statistics.oq(0, [seqs[0].id], 2), oq)
