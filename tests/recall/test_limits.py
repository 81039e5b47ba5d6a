"""Bytes of the Near tier: the limit holds at every call that takes memory, and a longer prompt takes no more than its books."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from archived import Fed, fed, small

from kvstrata import Budget, Cache, LayerSpec, Shape
from kvstrata.config import BudgetExceeded
from kvstrata.recall import Far

SHAPE = Shape([LayerSpec(2, 4, 64)] * 4, torch.bfloat16)
LIMIT = 3 << 19


class Watched:
    """The store of a cache; ``most``: bytes of its slabs with its books, after every call that may take memory."""

    def __init__(self, pair: Fed) -> None:
        cache = pair.cache
        self._cache, self._inner, self.most, self.calls = cache, cache._store, 0, 0
        watched: Any = self
        cache._store = cache._slabs._store = cache._slabs.loans._store = cache._plans._store = watched

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in (
            "apply_plan",
            "lend",
            "lend_far",
            "append",
            "append_attend",
            "attend",
            "commit",
            "fork",
            "cluster",
        ):
            return found

        def called(*args: Any) -> Any:
            out = found(*args)
            held = self._cache._slabs.allocator_bytes()
            self.most = max(self.most, held + self._inner.metadata_bytes + self._inner.workspace_bytes)
            self.calls += 1
            return out

        return called


def test_the_limit_holds_at_every_call() -> None:
    """Prompts, turns and decoding, until the limit refuses: then with every token that was fed before."""
    pair = fed(small(chunk=256), SHAPE, budget=f"{LIMIT >> 10}KiB")
    watched, refused = Watched(pair), 0
    seqs = pair.new(2)
    for i in range(50):
        try:
            pair.feed(seqs, [[1, 1], [700, 1], [1, 90], [17, 16]][i % 4])
        except BudgetExceeded as error:
            refused += 1
            assert f"limit is {LIMIT} bytes" in str(error)
        within(pair)
    assert watched.calls > 1000
    assert 0.9 * LIMIT < watched.most <= LIMIT, "the limit is reached, and holds"
    assert refused > 0
    assert pair.cache.report().far_tokens > 40_000
    pair.check_contents()


def within(pair: Fed) -> None:
    """What is held, and was held at the most, is within the limit, summaries and maps included."""
    report = pair.cache.report()
    assert report.limit_bytes is not None
    assert report.nbytes == sum(report.bytes_by_kind.values()) <= report.limit_bytes
    assert report.peak_bytes <= report.limit_bytes
    assert report.allocator_bytes == pair.cache._slabs.held


def test_near_copies_give_way() -> None:
    """A limit that holds the pages which a step reads, and not all the copies that were asked for."""
    pair = fed(small(pages=16, chunk=256, near_pages=400), SHAPE, budget=f"{LIMIT >> 10}KiB")
    (seq,) = pair.new()
    for _ in range(8):
        pair.feed([seq], [256])
    for _ in range(600):
        pair.feed([seq], [1])
        within(pair)
    recall, store = pair.cache.report().recall, pair.cache._store
    assert recall is not None and recall.hits > 0 and recall.misses > 0
    assert store.shrink_near() and not store.shrink_near(), "it was made smaller on the way, once"
    pair.check_contents()


def test_forks_keep_to_the_limit() -> None:
    """Their tables and indices are new bytes: where there is no room for them, the fork is refused, and nothing has begun."""
    pair = fed(small(chunk=256), SHAPE, budget=f"{LIMIT >> 10}KiB")
    (seq,) = pair.new()
    for _ in range(8):
        pair.feed([seq], [700])
    for _ in range(200):
        before = len(pair.cache._live), pair.cache.nbytes()
        try:
            pair.fork(seq)
        except BudgetExceeded:
            assert (len(pair.cache._live), pair.cache.nbytes()) == before
            break
        within(pair)
    else:
        raise AssertionError("some fork is one too many")


def test_a_limit_of_each_sequence() -> None:
    """A batch may hold as many times the bytes, and needs them here; one sequence less, and the limit is lower."""
    each = 1 << 20
    pair = fed(small(chunk=256), SHAPE, budget=Budget.bytes(each, per="sequence"))
    assert pair.cache.report().limit_bytes == each
    seqs = pair.new(3)
    for lengths in ([700, 700, 700], [1, 1, 1], [300, 17, 1], *[[1, 1, 1]] * 40):
        pair.feed(seqs, lengths)
        within(pair)
        assert pair.cache.report().limit_bytes == 3 * each
    assert pair.cache.report().peak_bytes > 1.5 * each
    pair.check_contents()
    pair.free(seqs[1:])
    report = pair.cache.report()
    assert report.nbytes <= report.limit_bytes == each


def test_a_limit_and_fewer_bits() -> None:
    """Archived tokens may be int8 under a limit in bytes as without one."""
    pair = fed(small(state="int8", chunk=256), SHAPE, budget=f"{LIMIT >> 10}KiB")
    (seq,) = pair.new()
    for _ in range(4):
        pair.feed([seq], [700])
        within(pair)
    assert pair.cache.report().states["int8"] == pair.cache.report().far_tokens > 0


def test_what_a_limit_allows_is_far_more_than_it_holds() -> None:
    """A context of eight times the limit."""
    pair = fed(small(chunk=256, segment=512), SHAPE, budget="2MiB")
    (seq,) = pair.new()
    for _ in range(16):
        pair.feed([seq], [512])
    pair.feed([seq], [1])
    report = pair.cache.report()
    assert report.dense_bytes == 8193 * SHAPE.token_bytes() > 8 * report.peak_bytes
    assert report.far_bytes >= report.dense_bytes * 0.95
    pair.check_contents()


@pytest.mark.parametrize("far", ["auto", Far(), "1GiB"])
def test_too_small_a_limit_for_the_ring(far: Any) -> None:
    """Refused with the numbers when the cache is made, or its first tokens come."""
    with pytest.raises((BudgetExceeded, ValueError), match=r"budget: .*131072 bytes"):
        fed(small(), SHAPE, budget="128KiB", far=far)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (64, 96)])
def test_the_least_limit_for_the_ring(dims: tuple[int, int], each: bool) -> None:
    """A refusal says what needs the bytes, and how many would do: with one less it is refused again."""
    shape = Shape([LayerSpec(1, 2, dim) for dim in dims], torch.float32)

    def made(limit: int) -> Cache:
        return Cache(shape, Budget.bytes(limit, per="sequence" if each else "cache"), small(chunk=64))

    with pytest.raises(
        BudgetExceeded, match=r"limit is 300000 .*, for the ring of \d+ pages of a Far tier; exp"
    ) as error:
        made(300_000)
    least = int(str(error.value).split("expected at least ")[1].split()[0])
    assert made(least).nbytes() <= least
    with pytest.raises(BudgetExceeded, match=f"expected at least {least} bytes"):
        made(least - 1)


def peak(tokens: int, piece: int) -> tuple[int, int]:
    """Peak of a prompt in pieces, and of that what grows with its length by design: summaries, maps and tables."""
    pair = fed(small(chunk=512, segment=1024, segment_min=1024), SHAPE)
    (seq,) = pair.new()
    for _ in range(tokens // piece):
        pair.feed([seq], [piece])
    store, report = pair.cache._store, pair.cache.report()
    far = sum(store.pool(p)["total"] * 64 for p in range(store.n_pools) if store.pool(p)["far"])
    return report.peak_bytes, store.metadata_bytes + far


@pytest.mark.parametrize("whole", [False, True])
def test_a_longer_prompt_takes_only_its_books(whole: bool) -> None:
    """The Near peak of twice the tokens is higher by at most 1.1 times the added summaries and maps: in turns of 512, or at
    once."""
    n = 2048
    (short, short_books), (long, long_books) = (peak(m, m if whole else 512) for m in (n, 2 * n))
    added = n * SHAPE.token_bytes()
    assert 0 < long_books - short_books < 0.1 * added
    assert long - short <= 1.1 * (long_books - short_books)
    assert short < 0.6 * added
