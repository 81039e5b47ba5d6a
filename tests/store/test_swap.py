"""Sets that stay Near while there is room, and rows of sets that are rewritten."""

from __future__ import annotations

import pytest
import torch
from feeding import check_pages
from test_sets import LAYERS, RECENT, Fed, table
from test_views import bytes_of, made, tiers

from kvstrata import BudgetExceeded, Cache, Shape
from kvstrata.policy import epicache

B = 320
WHERE = [(i, h) for i in (0, 1) for h in (0, 1)]


def limited(limit: int, private: str = "full") -> Fed:
    policy = epicache(B, recent=RECENT, heads="uniform", private=private)
    fed = Fed(Cache(Shape(LAYERS, torch.float32), f"{limit}B", policy), check=private == "full")
    for n in (400, 128, 128):
        fed.read(n, [24, 8, 16])
    return fed


def near(fed: Fed) -> list[int]:
    """Sets that are Near in all rows."""
    found = [tiers(fed.cache, fed.seq, *place) for place in WHERE]
    return [e for e in (1, 2, 3) if all(t[e] == {False} for t in found)]


def content(fed: Fed) -> list[object]:
    """Tables and bytes."""
    values = [[x.numpy().tobytes() for x in fed.cache.materialize(i, fed.seq)] for i in (0, 1)]
    return [values, [table(fed.cache, fed.seq, *place) for place in WHERE]]


def roomy() -> int:
    """Bytes that hold all sets."""
    return 8 << 20


def tight() -> int:
    """Bytes that hold backbone, pending tokens, a view and one layer's sets: found by what a cache takes that keeps none."""
    fed = made()
    fed.cache.view(fed.seq, [])
    fed.cache.view(fed.seq, [1])
    return fed.cache.report().peak_bytes


# --- what stays -------------------------------------------------------------------------------------------------------


def test_with_room_no_set_is_read_twice() -> None:
    """All that was written once is clean: leaving writes nothing, coming back reads nothing."""
    fed = limited(roomy())
    cache, seq = fed.cache, fed.seq
    for e in (1, 2, 3, 1):
        cache.view(seq, [e])
    assert near(fed) == [1, 2, 3]
    moved, before = cache.moved_bytes, content(fed)
    found = cache._store.fetched()
    for sets in ([2], [3], [1, 2], [1], [1]):
        cache.view(seq, sets)
        fed.step(2)
        check_pages(cache)
    assert cache.moved_bytes == moved and cache._store.fetched()[1] == found[1]
    page = cache._store.pool(0)["page_bytes"]
    came = bytes_of(cache, seq, {2}) + bytes_of(cache, seq, {3}) + bytes_of(cache, seq, {1, 2})
    assert cache._store.fetched()[0] - found[0] == came // page
    cache.crop([seq], [cache.logical_length(seq) - 10])
    cache.view(seq, [1])
    assert content(fed) == before


@pytest.mark.parametrize("private", ["full", "int8"])
def test_what_stays_changes_no_answer(private: str) -> None:
    """Under limits with and without room for sets: the same tables and outputs, to the bit; the limit holds."""
    outs = []
    for limit in (roomy(), tight() + (64 << 10)):
        fed, found = limited(limit, private), []
        for sets in ([2], [1, 3], [3], [1]):
            fed.cache.view(fed.seq, sets, halves=len(sets) > 1)
            found += fed.step(4) + fed.step(1)
            assert fed.cache.nbytes() <= fed.cache.report().peak_bytes <= limit
        found += fed.read(40, [9, 9])
        outs.append((found, [table(fed.cache, fed.seq, *place) for place in WHERE]))
        check_pages(fed.cache)
    assert all(torch.equal(a, b) for a, b in zip(outs[0][0], outs[1][0], strict=True))
    assert outs[0][1] == outs[1][1]


def test_the_set_named_least_lately_gives_way_first() -> None:
    fed = limited(roomy())
    cache, store = fed.cache, fed.cache._store
    for e in (3, 1, 2):
        cache.view(fed.seq, [e])
    moved, far = cache.moved_bytes, []
    while store.give_way():
        far.append([e for e in (1, 2, 3) for i in (0, 1) if tiers(cache, fed.seq, i, 0)[e] == {True}])
    assert far == [[3], [3, 3], [1, 3, 3], [1, 1, 3, 3]]  # of a set, the last layer first
    assert cache.moved_bytes == moved and near(fed) == [2]
    check_pages(cache)
    cache.view(fed.seq, [1])
    assert cache.moved_bytes - moved == bytes_of(cache, fed.seq, {1})
    assert near(fed) == [1, 2]
    fed.step(3)


def test_sets_give_way_before_a_step_is_refused() -> None:
    """Tokens come until the limit is full of them; those of other sets leave one by one, and nothing is written."""
    fed = limited(tight() + (150 << 10))
    cache = fed.cache
    cache.view(fed.seq, [1])
    assert near(fed) == [1, 2, 3]
    moved, seen = cache.moved_bytes, {tuple(near(fed))}
    with pytest.raises(BudgetExceeded, match="limit is"):
        for _ in range(100):
            fed.step(16)
            assert cache.nbytes() <= cache.report().limit_bytes
            seen.add(tuple(near(fed)))
    assert near(fed) == [1] and len(seen) > 1 and cache.moved_bytes == moved
    check_pages(cache)


def test_without_a_limit_nothing_stays() -> None:
    fed = made()
    fed.cache.view(fed.seq, [1])
    assert near(fed) == [1]


def test_what_two_forks_hold_leaves_for_each() -> None:
    fed = limited(roomy())
    fed.cache.view(fed.seq, [1])
    (kid,) = fed.cache.fork(fed.seq)
    fed.cache.view(kid, [2])
    while fed.cache._store.give_way():
        pass
    check_pages(fed.cache)
    assert near(fed) == [1]
    fed.step(2)
    fed.cache.free([kid])
    check_pages(fed.cache)


# --- rows that are rewritten piece by piece ---------------------------------------------------------------------------


def test_a_row_of_sets_is_rewritten_in_pieces_where_room_is_short() -> None:
    """A few pages at a time: each token in its set as in one piece, no page more, and steps attend to what they should."""
    found = []
    for most in (1 << 20, 3):
        fed = Fed(Cache(Shape(LAYERS, torch.float32), "8MiB", epicache(B, recent=RECENT, heads="uniform")))
        slabs, room, refused = fed.cache._slabs, fed.cache._slabs.make_room, []

        def scarce(needed, room=room, most=most, slabs=slabs, refused=refused) -> None:  # type: ignore[no-untyped-def]
            if needed()[0] - slabs._store.pool(0)["free"] > most:
                refused.append(needed())
                raise BudgetExceeded("budget: no room")
            room(needed)

        for n in (400, 128, 128):
            fed.read(n, [24, 8, 16])
        fed.cache.trim()
        slabs.make_room = scarce  # type: ignore[method-assign]
        slabs._spare = lambda costs, parts=1, most=most: most * costs[0]  # type: ignore[method-assign]
        fed.read(0, [8, 24, 16])
        sets = [dict(zip(*table(fed.cache, fed.seq, *place), strict=True)) for place in WHERE]
        pages = [len(fed.cache._store.row(fed.seq.id, *place)[0]) for place in WHERE]
        found.append((sets, pages))
        assert bool(refused) == (most == 3)
        slabs.make_room = room  # type: ignore[method-assign]
        fed.cache.view(fed.seq, [2])
        fed.step(3)
        check_pages(fed.cache)
    assert found[0] == found[1]
