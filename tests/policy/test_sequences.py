"""A limit for each sequence: what one holds does not depend on how many others there are."""

from __future__ import annotations

import pytest
import torch

from kvstrata import Budget, Cache, LayerSpec, Shape
from kvstrata.config import BudgetExceeded
from kvstrata.policy import NAMED

SHAPE = Shape([LayerSpec(2, 4, 64)] * 3, torch.bfloat16)
EACH = 400 << 10
COMPRESSING = sorted(name for name in set(NAMED) - {"full"} if not NAMED[name]().archives)


def feed(cache: Cache, seqs: list, lengths: list[int], keys: list[torch.Generator]) -> None:  # type: ignore[type-arg]
    """Tokens of a generator for each sequence, so that its keys do not depend on the others."""
    with cache.step(seqs, lengths) as step:
        for layer in range(3):
            parts = [
                [torch.randn(n, h, 64, generator=g) for h in (4, 2, 2)] for n, g in zip(lengths, keys, strict=True)
            ]
            step.attend(layer, *(torch.cat(part).bfloat16() for part in zip(*parts, strict=True)))


def used(cache: Cache, seq) -> int:  # type: ignore[no-untyped-def]
    """Bytes of the pages in a sequence's tables, shared ones too, with their positions."""
    size = [cache._store.pool(p)["page_bytes"] + 64 for p in range(cache._store.n_pools)]
    rows = [cache._store.row(seq.id, layer, head)[0] for layer in range(3) for head in range(2)]
    return sum(size[page >> 28] for row in rows for page in row)


@pytest.mark.parametrize("name", COMPRESSING)
def test_each_sequence_keeps_to_its_limit(name: str) -> None:
    """Three of different lengths: none holds more than its limit, all of them no more than three."""
    cache = Cache(SHAPE, Budget.bytes(EACH, per="sequence"), name)
    seqs = cache.new(3)
    keys = [torch.Generator().manual_seed(i) for i in range(3)]
    for lengths in ([1500, 70, 0], *[[1, 1, 0]] * 40, [200, 90, 600], *[[1] * 3] * 70):
        feed(cache, seqs, lengths, keys)
        assert max(used(cache, s) for s in seqs) <= EACH
        assert cache.nbytes() <= 3 * EACH == cache.report().limit_bytes
    assert used(cache, seqs[0]) > 0.5 * EACH, "a long one uses its limit"
    cache.free(seqs[:2])
    assert cache.nbytes() <= EACH == cache.report().limit_bytes
    kids = cache.fork(seqs[2], 2)
    for _ in range(70):
        feed(cache, [seqs[2], *kids], [1] * 3, keys)
        assert max(used(cache, s) for s in kids) <= EACH
        assert cache.nbytes() <= 3 * EACH


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_second_sequence_takes_nothing_from_the_first(name: str) -> None:
    """What the first keeps is the same beside another, token for token."""
    found = []
    for others in (0, 2):
        cache = Cache(SHAPE, Budget.bytes(EACH, per="sequence"), name)
        seqs = cache.new()
        keys = [torch.Generator().manual_seed(i) for i in range(1 + others)]
        feed(cache, seqs, [900], keys[:1])
        if others:
            seqs += cache.new(others)
            feed(cache, seqs[1:], [800] * others, keys[1:])
        for _ in range(80):
            feed(cache, seqs, [1] * len(seqs), keys)
        found.append([cache.materialize(layer, seqs[0])[2].sort().values.tolist() for layer in range(3)])
    assert found[0] == found[1]


def test_without_a_policy_that_drops() -> None:
    """One sequence may not use what another leaves."""
    cache = Cache(SHAPE, Budget.bytes(EACH, per="sequence"), "full")
    seqs, keys = cache.new(4), [torch.Generator().manual_seed(0)] * 4
    feed(cache, seqs, [200, 1, 1, 1], keys)
    before = cache.nbytes()
    with pytest.raises(BudgetExceeded, match="limit is 409600 bytes per sequence, one of 300 tokens needs 476520"):
        feed(cache, seqs, [100, 1, 1, 1], keys)
    assert cache.nbytes() == before
    feed(cache, seqs[1:], [200] * 3, keys[1:])
