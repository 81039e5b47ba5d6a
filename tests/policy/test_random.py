"""Random turns, decoding, forks, crops and ends under a byte limit: whether it holds, inside plans too; nothing leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feeding import feed

from kvstrata import Cache, LayerSpec, Sequence, Shape, testing
from kvstrata.config import BudgetExceeded

SHAPE = Shape([LayerSpec(2, 4, 32)] * 2, torch.bfloat16)
LIMIT = 700 << 10
MOST = 5
"""Sequences at a time."""


class Watched:
    """The store of a cache, which after every call that may take memory asks whether the limit holds."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self._inner = cache, cache._store
        self.most, self.plans, self.calls = 0, 0, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in ("apply_plan", "lend", "append", "append_attend", "attend", "add_mass", "commit", "fork"):
            return found

        def called(*args: Any) -> Any:
            out = found(*args)
            held = sum(t.untyped_storage().nbytes() for t in self._cache._slabs._tensors.values())
            self.most = max(self.most, held + self._inner.metadata_bytes + self._inner.workspace_bytes)
            self.plans += name == "apply_plan"
            self.calls += 1
            return out

        return called


def watch(cache: Cache) -> Watched:
    watched: Any = Watched(cache)
    cache._store = cache._slabs._store = cache._slabs.loans._store = cache._plans._store = watched
    return watched


def check(cache: Cache) -> None:
    report = cache.report()
    assert sum(report.states.values()) == sum(report.logical_tokens) * SHAPE.rows, "tokens are conserved"
    for pool in range(cache._store.n_pools):
        state = cache._store.pool(pool)
        assert state["free"] + state["used"] == state["total"]


def walk(name: str, steps: int, seed: int, forks: bool) -> tuple[Watched, int]:
    """Random verbs; what the limit refuses must have changed no length. Refusals are counted."""
    cache = Cache(SHAPE, budget=f"{LIMIT >> 10}KiB", policy=name)
    watched, refused = watch(cache), 0
    generator = torch.Generator().manual_seed(seed)

    def drawn(most: int) -> int:
        return int(torch.randint(0, most, (1,), generator=generator))

    seqs: list[Sequence] = cache.new(2)
    for i in range(steps):
        verb = drawn(20)
        if verb == 0 and len(seqs) < MOST:
            seqs += cache.fork(seqs[drawn(len(seqs))]) if forks else cache.new()
        elif verb == 1 and len(seqs) > 1:
            cache.free([seqs.pop(drawn(len(seqs)))])
        elif verb == 2:
            seq = seqs[drawn(len(seqs))]
            floor, length = cache.crop_floor(seq), cache.logical_length(seq)
            cache.crop([seq], [floor + drawn(length - floor + 1)])
        elif verb == 3:
            cache.compress()
        else:
            some = [s for s in seqs if drawn(4)] or seqs[:1]
            counts = [(1, 1, 1, 3, 16, 17, 90, 300)[drawn(8)] for _ in some]
            before = [cache.logical_length(s) for s in some]
            try:
                if drawn(10):
                    feed(cache, some, counts, generator)
                else:
                    with pytest.raises(RuntimeError), testing.fault("append.after_take", 1):
                        feed(cache, some, counts, generator)
            except BudgetExceeded:
                refused += 1
                assert before == [cache.logical_length(s) for s in some]
        if i % 10 == 0:
            check(cache)
    assert sum(cache.report().counts[what] for what in ("evicted", "quantized")) > 1000
    cache.free(seqs)
    assert all(cache._store.pool(p)["used"] == 0 for p in range(cache._store.n_pools)), "no page leaks"
    cache.trim()
    assert cache._slabs.held == 0
    return watched, refused


@pytest.mark.parametrize("forks", [False, True])
@pytest.mark.parametrize("name", ["arkv", "h2o", "keydiff", "keynorm", "snapkv"])
def test_random_verbs_keep_the_limit_and_the_tokens(name: str, forks: bool) -> None:
    """200 verbs, over fifteen hundred calls that take memory or rewrite rows: after each of them the slabs with the store's own
    books, rings of queries and workspace are within the limit."""
    watched, refused = walk(name, 200, 1, forks)
    assert watched.plans > 200
    assert watched.calls > 1500
    assert refused < 30
    assert LIMIT * 0.9 < watched.most <= LIMIT, "the limit is reached, and holds"
