"""Sets that are fetched beside other work: of a good disk, a bad one, a late one, and one that does not answer."""

from __future__ import annotations

import gc
import os
import re
import time
from contextlib import nullcontext

import pytest
import torch
from feeding import check_pages, drawn
from test_sets import LAYERS, RECENT, Fed
from test_swap import B, content, limited, near, roomy, tight
from test_views import bytes_of, made, tiers

from kvstrata import Cache, Shape, testing
from kvstrata.policy import epicache
from kvstrata.policy.base import PENDING

NEVER = r"far tier: pread of 4096 bytes at \d+ has not come back within 20 ms, where a page of set 2 was read"
REFUSED = (
    r"far tier: (pread of 4096 bytes at \d+ (failed: Input/output error|ended after \d+: the file was cut short)"
    r"|the 4096 bytes at \d+ are not those that were written: the file was changed or is damaged)"
)


@pytest.mark.parametrize("private", ["full", "int8"])
def test_what_is_fetched_ahead_is_what_is_read_at_once(private: str) -> None:
    """Tables, bytes and outputs, steps of one token and of many, halves, changes before anything was read; of a disk that
    answers late and out of order, too."""
    found = []
    for ahead, late in ((False, False), (True, False), (True, True)):
        policy = epicache(B, recent=RECENT, private=private)
        fed = Fed(Cache(Shape(LAYERS, torch.float32), policy=policy), check=private == "full")
        for n in (400, 128, 128):
            fed.read(n, [24, 8, 16])
        outs = []
        for sets, tokens in (([2], 4), ([1, 3], 1), ([3], 90), ([1], 1)):
            with testing.trouble(tokens, part=0.3, delay=100e-6) if late else nullcontext():
                fed.cache.view(fed.seq, [2], ahead=ahead)
                fed.cache.view(fed.seq, sets, halves=len(sets) > 1, ahead=ahead)
                outs += fed.step(tokens)
            assert not fed.cache._store.ahead(fed.seq.id)
            check_pages(fed.cache)
        fed.cache.view(fed.seq, [3], ahead=ahead)
        outs += fed.read(40, [9, 9])  # shows every set, layer by layer
        found.append((outs, content(fed), fed.cache._store.fetched()))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][0], other[0], strict=True))
        assert found[0][1] == other[1] and found[0][2][1] == other[2][1]


def test_a_layer_waits_for_its_own_pages() -> None:
    """The second layer's do not come: the first layer attends all the same, the second says so and the step is withdrawn."""
    fed = limited(roomy())
    cache, seq = fed.cache, fed.seq
    for e in (2, 3, 1):
        cache.view(seq, [e])
    assert cache._store.give_way()  # of set 2 the second layer
    before, length = content(fed), cache.logical_length(seq)
    cache._store.set_ahead(True, 20)
    with testing.trouble(stay=1.0):
        cache.view(seq, [2], ahead=True)
        with pytest.raises(RuntimeError, match=NEVER), cache.step([seq], [1]) as step:
            first, second = drawn(cache, 1, fed.generator)
            expected = fed.dense(0, *first, 1, [], whole=False)
            torch.testing.assert_close(step.attend(0, *first), expected, rtol=1e-4, atol=1e-4)
            step.attend(1, *second)
        assert cache.logical_length(seq) == length and cache._store.view(seq.id)[1] == [1]
        assert content(fed) == before
    fed.step(2)


def test_what_comes_too_late_lands_nowhere() -> None:
    """Pages that were given up are others' at once, before the disk answers and after."""
    fed = made()
    cache, seq = fed.cache, fed.seq
    cache.view(seq, [1])
    before, length, pages = content(fed), cache.logical_length(seq), cache._store.pool(0)["used"]
    cache._store.set_ahead(True, 20)
    for seed in range(4):
        with testing.trouble(seed, stay=0.5 if seed % 2 else 1.0):
            cache.view(seq, [2], ahead=True)
            with pytest.raises(RuntimeError, match=NEVER):
                fed.step(1)
            fed.forget(length)
            assert content(fed) == before and cache._store.pool(0)["used"] == pages
            check_pages(cache)
            fed.step(90)  # takes the pages that were to be read into
        stands = content(fed)
        time.sleep(0.002)
        assert content(fed) == stands
        cache.crop([seq], [length])
        fed.forget(length)
        check_pages(cache)
    cache._store.set_ahead(True, 60_000)
    cache.view(seq, [2], ahead=True)
    fed.step(1)
    check_pages(cache)


def test_a_view_that_is_left_before_the_disk_answers() -> None:
    """Layers are not waited for one by one, and what is read then is right."""
    fed = made()
    cache, seq = fed.cache, fed.seq
    cache.view(seq, [1])
    cache._store.set_ahead(True, 20)
    with testing.trouble(stay=1.0):
        cache.view(seq, [2, 3], ahead=True)
        cache.view(seq, [3])
        assert near(fed) == [3]
        cache.view(seq, [2], ahead=True)
        cache.clear([seq])
        assert cache._store.pool(0)["used"] == cache._store.ring_pages()[0]
    check_pages(cache)


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_disk_leaves_the_view_before(seed: int) -> None:
    """Whatever it does to whichever page, and said with it; the retry answers."""
    fed, failed = made(), 0
    cache, seq = fed.cache, fed.seq
    for e in (2, 3, 1):  # after which nothing is written any more
        cache.view(seq, [e])
    for attempt in range(100 * seed, 100 * seed + 60):
        before, length = content(fed), cache.logical_length(seq)
        now = cache._store.view(seq.id)[1][0]
        with testing.trouble(attempt, fail=0.01, cut=0.01, change=0.01, part=0.2):
            cache.view(seq, [now % 3 + 1], ahead=True)
            try:
                fed.step(1)
            except RuntimeError as error:
                assert re.search(REFUSED + f", where a page of set {now % 3 + 1} was read", str(error))
                assert cache.logical_length(seq) == length
                fed.forget(length)
                failed += 1
            else:
                assert near(fed) == [now % 3 + 1]
                continue
        if cache._store.view(seq.id)[1] == [now] == near(fed):
            assert content(fed) == before
    assert failed > 10
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


@pytest.mark.parametrize("stay", [1.0, 0.5, 0.0])
def test_pages_that_are_read_into_move_to_other_slabs(stay: float) -> None:
    """Before their bytes are there, and after: nothing is waited for."""
    fed = made()
    cache, seq, length = fed.cache, fed.seq, fed.cache.logical_length(fed.seq)
    cache.view(seq, [])
    cache.trim()
    fed.step(600)
    full = cache._store.slabs(0)
    with testing.trouble(3, stay=stay):
        cache.view(seq, [2], ahead=True)
        time.sleep(0.01)
        coming = [slab for slab in cache._store.slabs(0) if slab not in full]
        assert sum(pages - free for _, pages, free in coming) == bytes_of(cache, seq, {2}) // 4096
        cache.crop([seq], [length + 10])
        fed.forget(length + 10)
        for slab, _, _ in coming:
            assert cache._store.empty_out(0, slab)
            cache._slabs._return((0, slab))
    fed.step(1)
    assert near(fed) == [2]
    check_pages(cache)


def test_a_forked_process_reads_what_is_on_its_way() -> None:
    """The threads that were asked are not there."""
    fed = made()
    fed.cache.view(fed.seq, [1])
    for stay in (1.0, 0.0):
        with testing.trouble(stay=stay):
            fed.cache.view(fed.seq, [2], ahead=True)
            child = os.fork()
            if child == 0:
                try:
                    fed.step(1)
                    os._exit(0 if near(fed) == [2] else 1)
                finally:
                    os._exit(2)
            assert os.waitpid(child, 0)[1] == 0
        fed.step(1)
        fed.cache.view(fed.seq, [1])


def test_a_cache_may_end_while_pages_are_on_their_way() -> None:
    for stay in (0.0, 0.0, 1.0):
        fed = made()
        with testing.trouble(stay=stay) if stay else nullcontext():
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
