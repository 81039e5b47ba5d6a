"""Sets of a cache with a Far tier: what moves when a view changes, and what a failure leaves."""

from __future__ import annotations

import pytest
import torch
from feeding import check_pages
from test_sets import LAYERS, RECENT, Fed, table

from kvstrata import Cache, Sequence, Shape, testing
from kvstrata.policy import epicache
from kvstrata.policy.base import PENDING

B = 320


def made(far: str | None = "auto", private: str = "full", heads: str = "uniform") -> Fed:
    policy = epicache(B, recent=RECENT, heads=heads, private=private)  # type: ignore[arg-type]
    fed = Fed(Cache(Shape(LAYERS, torch.float32), policy=policy, far=far))
    for n in (400, 128, 128):
        fed.read(n, [24, 8, 16])
    return fed


def bytes_of(cache: Cache, seq: Sequence, sets: set[int]) -> int:
    """Of the pages of these private sets."""
    size, total = cache._store.pool(0)["page_bytes"], 0
    for layer, spec in enumerate(cache.shape.layers):
        for head in range(spec.kv_heads):
            tags, _, _ = cache._store.row_sets(seq.id, layer, head)
            total += sum(size for t in tags if t != PENDING and t & 0x7FFF in sets)
    return total


def tiers(cache: Cache, seq: Sequence, layer: int, head: int) -> dict[int, set[bool]]:
    """By set, whether its pages are Far."""
    pages, _, _, _ = cache._store.row(seq.id, layer, head)
    tags, _, _ = cache._store.row_sets(seq.id, layer, head)
    out: dict[int, set[bool]] = {}
    for page, tag in zip(pages, tags, strict=True):
        out.setdefault(tag if tag == PENDING else tag & 0x7FFF, set()).add(bool(cache._store.pool(page >> 28)["far"]))
    return out


def test_a_change_moves_the_missing_pages_and_no_others() -> None:
    fed = made()
    cache, seq = fed.cache, fed.seq
    cache.view(seq, [])
    assert all(
        tiers(cache, seq, i, h) == {0: {False}, 1: {True}, 2: {True}, 3: {True}, PENDING: {False}}
        for i in (0, 1)
        for h in (0, 1)
    )
    moved = cache.moved_bytes
    for sets in ([1], [2], [3], [1, 2], [2], [2]):
        before, known = cache._store.view(seq.id)[1], cache.moved_bytes
        cache.view(seq, sets)
        assert cache.moved_bytes - known == bytes_of(
            cache, seq, set(sets) - set(before)
        )  # leaving a clean set writes nothing
        assert tiers(cache, seq, 1, 1) == {0: {False}, PENDING: {False}} | {e: {e not in sets} for e in (1, 2, 3)}
        fed.step(3)
        check_pages(cache)
    assert cache.moved_bytes > moved


def test_better_halves_of_two_sets_come_near() -> None:
    fed = made()
    fed.cache.view(fed.seq, [])
    known = fed.cache.moved_bytes
    fed.cache.view(fed.seq, [1, 3], halves=True)
    assert fed.cache.moved_bytes - known == bytes_of(fed.cache, fed.seq, {1, 3}) * 2 // 5  # pages of five
    fed.step(5)


@pytest.mark.parametrize("private", ["full", "int8"])
def test_a_tier_changes_no_answer(private: str) -> None:
    """The same steps with and without it: the same tables and outputs, to the bit."""
    found = []
    for far in ("auto", None):
        policy = epicache(B, recent=RECENT, private=private)
        fed, outs = Fed(Cache(Shape(LAYERS, torch.float32), policy=policy, far=far), check=private == "full"), []
        for n in (400, 128, 128):
            outs += fed.read(n, [24, 8, 16])
        for sets in ([2], [1, 3], [3]):
            fed.cache.view(fed.seq, sets, halves=len(sets) > 1)
            outs += fed.step(4) + fed.step(1)
        outs += fed.read(40, [9, 9])
        found.append((outs, [table(fed.cache, fed.seq, i, h) for i in (0, 1) for h in (0, 1)]))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("point", ["far.read", "far.write", "slab.lend"])
def test_a_failed_change_leaves_the_view_as_it_was(point: str) -> None:
    fed = made()
    fed.cache.view(fed.seq, [1])
    nth = 1
    while True:
        fed.read(64, [24, 8, 16])  # sets are new again, without Far pages
        before = fed.cache._store.view(fed.seq.id)
        try:
            with testing.fault(point, nth):
                fed.cache.view(fed.seq, [2] if before[1] == [1] else [1])
        except RuntimeError:
            assert fed.cache._store.view(fed.seq.id) == before
            assert tiers(fed.cache, fed.seq, 1, 0)[before[1][0]] == {False}
            fed.step(2)
            check_pages(fed.cache)
        else:
            break
        nth += 4
        if nth > 60:
            break
    assert nth > 1 or point != "far.read"


def test_a_fault_while_a_layer_shows_all_is_rolled_back() -> None:
    fed = made()
    fed.cache.view(fed.seq, [2])
    length = fed.cache.logical_length(fed.seq)
    for nth in (1, 5, 9):
        with testing.fault("far.read", nth), pytest.raises(RuntimeError):
            fed.read(20, [8, 8, 8])
        fed.forget(length)
        assert fed.cache.logical_length(fed.seq) == length
        check_pages(fed.cache)
        fed.step(1)
        fed.cache.crop([fed.seq], [length])
        fed.forget(length)


def test_forks_share_far_pages() -> None:
    fed = made()
    fed.cache.view(fed.seq, [1])
    (kid,) = fed.cache.fork(fed.seq)
    fed.cache.view(kid, [3])
    check_pages(fed.cache)
    fed.step(2)
    fed.cache.free([fed.seq])
    check_pages(fed.cache)
    assert table(fed.cache, kid, 0, 0)[0]
    fed.cache.free([kid])
    check_pages(fed.cache)
