"""Sets that stay Near while there is room, and sets that are fetched beside other work."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from feeding import check_pages
from test_sets import LAYERS, RECENT, Fed, table
from test_views import bytes_of, made, tiers

from kvstrata import BudgetExceeded, Cache, Shape, testing
from kvstrata.policy import epicache
from kvstrata.policy.base import PENDING

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


# --- what is fetched ahead --------------------------------------------------------------------------------------------


@contextmanager
def stalled(cache: Cache, nth: int = 1) -> Iterator[None]:
    """The nth ticket is not read while this lasts, and nobody waits long."""
    cache._store.set_patience(0.02)
    with testing.fault("far.stall", nth):
        yield
    cache._store.set_patience(60)


@pytest.mark.parametrize("private", ["full", "int8"])
def test_what_is_fetched_ahead_is_what_is_read_at_once(private: str) -> None:
    """Tables, bytes and outputs, steps of one token and of many, halves, changes before anything was read."""
    found = []
    for ahead in (False, True):
        policy = epicache(B, recent=RECENT, private=private)
        fed = Fed(Cache(Shape(LAYERS, torch.float32), policy=policy), check=private == "full")
        for n in (400, 128, 128):
            fed.read(n, [24, 8, 16])
        outs = []
        for sets, tokens in (([2], 4), ([1, 3], 1), ([3], 90), ([1], 1)):
            fed.cache.view(fed.seq, [2], ahead=ahead)
            fed.cache.view(fed.seq, sets, halves=len(sets) > 1, ahead=ahead)
            outs += fed.step(tokens)
            assert not fed.cache._store.ahead(fed.seq.id)
            check_pages(fed.cache)
        fed.cache.view(fed.seq, [3], ahead=ahead)
        outs += fed.read(40, [9, 9])  # shows every set, layer by layer
        found.append((outs, content(fed), fed.cache._store.fetched()))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1] and found[0][2][1] == found[1][2][1]


def test_a_layer_waits_for_its_own_ticket() -> None:
    """The second layer's is not read: the first layer attends all the same, the second says so and the step is withdrawn."""
    fed = made()
    cache, seq = fed.cache, fed.seq
    cache.view(seq, [1])
    fed.step(1)
    before, length, pages = content(fed), cache.logical_length(seq), cache._store.pool(0)["used"]
    with stalled(cache, 2):
        cache.view(seq, [2], ahead=True)
        with pytest.raises(
            RuntimeError, match=r"far tier: \d+ pages of layer 1 have not been read within 0.02 seconds"
        ):
            fed.step(1)
        assert cache.logical_length(seq) == length and cache._store.view(seq.id)[1] == [1]
        fed.forget(length)
        late = cache._store.pool(0)["used"] - pages
        assert late > 0  # what it may yet be read into is nobody else's
        assert content(fed) == before
        fed.step(2)
        cache.crop([seq], [length])
        fed.forget(length)
    while cache._store.pool(0)["used"] > pages:  # it ends late, and its pages are free with the next change
        cache.view(seq, [])
        cache.view(seq, [1])
    assert content(fed) == before
    check_pages(cache)
    cache.view(seq, [2], ahead=True)
    fed.step(1)
    check_pages(cache)


@pytest.mark.parametrize("nth", [1, 4, 9, 14])
def test_a_fetch_that_fails_leaves_the_view_before(nth: int) -> None:
    """Whichever page it is; the retry answers as if nothing had been."""
    fed = made()
    cache, seq = fed.cache, fed.seq
    cache.view(seq, [1])
    before, length = content(fed), cache.logical_length(seq)
    assert bytes_of(cache, seq, {2}) // cache._store.pool(0)["page_bytes"] >= 14
    with testing.fault("far.read", nth) as armed:
        cache.view(seq, [2], ahead=True)
        with pytest.raises(RuntimeError, match="fault injected at far.read, where a page of set 2 was read"):
            fed.step(5)
    assert armed.visits >= nth
    assert cache._store.view(seq.id)[1] == [1] and content(fed) == before
    fed.forget(length)
    check_pages(cache)
    cache.view(seq, [2], ahead=True)
    fed.step(5)
    assert near(fed) == [2]


def test_bytes_that_others_changed_are_an_error() -> None:
    fed = made()
    cache, seq = fed.cache, fed.seq
    cache.view(seq, [1])
    for file, size in cache._slabs._files.values():
        os.pwrite(file, bytes(size), 0)
    cache.view(seq, [2], ahead=True)
    with pytest.raises(RuntimeError, match="are not those that were written: the file was changed or is damaged"):
        fed.step(1)
    assert cache._store.view(seq.id)[1] == [1]


def test_what_happens_to_a_sequence_meanwhile() -> None:
    """Forked, cropped, cleared, dropped from, freed, while pages are on their way: none is lost, none is taken twice."""
    fed = made()
    cache, seq = fed.cache, fed.seq
    fed.step(20)
    cache.view(seq, [1])
    length = cache.logical_length(seq)
    cache.view(seq, [2], ahead=True)
    (kid,) = cache.fork(seq)
    cache.crop([seq], [length - 10])
    fed.forget(length - 10)
    fed.step(1)
    check_pages(cache)
    cache.view(seq, [3], ahead=True)
    cache.trim()  # pages move from slab to slab, those that are read into as well
    fed.step(1)
    check_pages(cache)
    cache.view(seq, [1], ahead=True)
    cache.clear([seq])
    cache.view(kid, [3], ahead=True)
    cache.free([kid])
    check_pages(cache)
    assert not cache._store.ahead(seq.id)


def test_a_cache_may_end_while_pages_are_on_their_way() -> None:
    for _ in range(3):
        fed = made()
        fed.cache.view(fed.seq, [], ahead=True)
        fed.cache.view(fed.seq, [1, 2, 3], ahead=True)
        del fed
        gc.collect()


def test_sets_are_fetched_ahead_under_a_limit() -> None:
    """Pages for all layers are there before anything is asked for; a limit without room for them refuses the view."""
    limit = tight() + (64 << 10)
    fed = limited(limit)
    for e in (1, 2, 3, 1):
        fed.cache.view(fed.seq, [e], ahead=True)
        fed.step(1)
        assert fed.cache.report().peak_bytes <= limit
    fed.cache.view(fed.seq, [2])
    before = content(fed)
    with testing.fault("slab.lend"):
        try:
            fed.cache.view(fed.seq, [1, 2, 3], ahead=True)
        except RuntimeError:
            assert fed.cache._store.view(fed.seq.id)[1] == [2] and content(fed) == before
    check_pages(fed.cache)
    assert PENDING in tiers(fed.cache, fed.seq, 0, 0)


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
