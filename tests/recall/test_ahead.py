"""Far pages on their way while a step goes on: late, out of order, damaged, refused or never; right data or an error."""

from __future__ import annotations

import gc
import os
import re
import time
from dataclasses import replace

import pytest
import torch
from archived import ALL, EXACT, Fed, fed, small, worst
from test_near import PAGES, ROWS, K, Named
from waiting import file_of, tables, waiting

from kvstrata.recall import Far, PageMeans
from kvstrata.testing import trouble

LATE = 400e-6
"""Seconds by which pages come late, at the most: a few times what a step of these sizes takes."""
REFUSED = (
    r"far tier: (pread of 8192 bytes at \d+ (failed: Input/output error|ended after \d+: the file was cut short)"
    r"|the 8192 bytes at \d+ are not those that were written: the file was changed or is damaged)"
)
NEVER = r"far tier: pread of 8192 bytes at \d+ has not come back within \d+ ms"


def late(pair: Fed) -> int:
    """Pages so far that were not there at once."""
    recall = pair.cache.report().recall
    assert recall is not None
    return recall.late


def equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def reading(near: int | None, estimate: float = 0.0) -> PageMeans:
    """4 pages of each row, with so many Near copies."""
    return PageMeans(budget=32 + 16 + 15 + 64, near_pages=near, estimate=estimate)


# --- late, and out of order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("near", "estimate"), [(0, 0.0), (4, 0.5), (8, 0.0), (64, 0.0), (0, 0.5)])
def test_when_pages_come_changes_no_bit(near: int, estimate: float) -> None:
    """Steps of one token and of several, over sequences that are forked and planned on the way, beside a cache whose pages are
    there at once."""
    policy = replace(small(), selector=reading(near, estimate))
    pair, twin = fed(policy), fed(policy)
    seqs, others = pair.new(2), twin.new(2)
    for step, lengths in enumerate([[700, 300], *[[1, 1]] * 8, [5, 1], *[[1, 1]] * 4, [90, 20], *[[1, 1]] * 4]):
        if step == 5:
            seqs, others = [*seqs, *pair.fork(seqs[0])], [*others, *twin.fork(others[0])]
        lengths = [*lengths, 1][: len(seqs)]
        want = twin.feed(others, lengths)
        with trouble(step, part=0.3, delay=LATE):
            assert equal(pair.feed(seqs, lengths), want), step
    assert pair.cache._store.fetched() == twin.cache._store.fetched()
    assert late(pair) > 300
    pair.check_contents()
    pair.check_pools()


def test_hundreds_of_steps_twice() -> None:
    """Whatever the delays are: the same answers, hits and misses."""
    found = []
    for seed in range(2):
        named = Named.of(2 * K)
        seq, pages, outs = named.begun(), [list[int]()] * ROWS, []
        with trouble(seed, part=0.2, delay=LATE / 4):
            for _ in range(300):
                pages = named.drawn(list(range(PAGES)), pages)
                outs.append(named.read([seq], pages))
        named.check(outs[-1], pages)
        found.append((torch.stack(outs), named.cache._store.fetched()))
        assert named.cache._store.late()[0] == found[-1][1][1] > 400
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("near", [0, 8])
def test_what_a_step_read_is_asked_for_ahead_of_the_next(near: int) -> None:
    """Of pages that are not Near: all, where rows keep no copies, and those of a sequence that is forked, but for its first
    layer, which comes before any other."""
    pair = fed(replace(small(), selector=reading(near)))
    seqs = pair.new()
    pair.feed(seqs, [1200])
    asked, rows, pages = [], 2, 4
    with trouble():
        for step in range(4):
            if step == 3:
                seqs = pair.fork(seqs[0])
            pair.feed(seqs, [1])
            asked.append(pair.cache._store.late()[2])
    ahead = [after - before for before, after in zip(asked[1:], asked[2:], strict=False)]
    assert ahead == ([2 * rows * pages] * 2 if near == 0 else [0, rows * pages])


# --- damaged, and refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [0, 8])
@pytest.mark.parametrize("tokens", [1, 12])
def test_a_bad_disk(near: int, tokens: int) -> None:
    """A step has the right answer, or fails with what the disk did and is withdrawn; later ones go on."""
    (pair, seqs), (twin, others) = waiting(near_pages=near), waiting(near_pages=near)
    failed = 0
    for step in range(20 if tokens == 1 else 6):
        before, drawn = tables(pair)[0], pair.generator.get_state()
        want = twin.feed(others, [tokens, 1])
        for attempt in range(200):
            try:
                share = 0.01 if tokens == 1 else 0.001
                with trouble(1000 * step + attempt, fail=share, cut=share, change=share, part=0.3, delay=LATE / 4):
                    got = pair.feed(seqs, [tokens, 1])
                break
            except RuntimeError as error:
                assert re.search(REFUSED, str(error))
                assert tables(pair)[0] == before
                pair.generator.set_state(drawn)
                failed += 1
        assert equal(got, want), step
    assert failed > 2
    pair.check_contents()
    pair.check_pools()


def test_a_disk_that_fills_up() -> None:
    """Under a prompt: it is withdrawn, with the system's reason. What was there goes on."""
    pair = fed(small(ALL))
    seqs = pair.new()
    pair.feed(seqs, [40])
    drawn = pair.generator.get_state()
    full = r"far tier: pwrite of 8192 bytes at \d+ failed: No space left"
    with trouble(cut=0.3), pytest.raises(RuntimeError, match=full):
        pair.feed(seqs, [600])
    pair.generator.set_state(drawn)
    pair.check_contents()
    pair.check_pools()
    for n in (1, 600, 1):
        assert worst(pair, seqs, [n]) < EXACT
    pair.check_contents()
    pair.check_empty()


@pytest.mark.parametrize("tokens", [1, 3, 80])
def test_files_that_change_while_nothing_is_held_in_memory(tokens: int) -> None:
    """A changed byte, then a file cut short, found by the threads that read."""
    pair, (seq, other) = waiting()
    for file, at in file_of(pair, seq):
        (byte,) = os.pread(file, 1, at + 99)
        os.pwrite(file, bytes([byte ^ 1]), at + 99)
    for match in ("are not those that were written", "ended after 0: the file was cut short"):
        with trouble(delay=LATE / 4), pytest.raises(RuntimeError, match=match):
            pair.feed([seq, other], [tokens, 1])
        for file in {file for file, _ in file_of(pair, seq)}:
            os.ftruncate(file, 0)
    pair.free([seq, other])
    pair.check_pools()
    pair.feed(pair.new(), [600])
    pair.check_contents()


# --- never --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [0, 8])
@pytest.mark.parametrize("tokens", [1, 12])
def test_a_disk_that_does_not_answer(near: int, tokens: int) -> None:
    """Steps fail in time, and are withdrawn; once it answers, steps go on, and what comes late lands nowhere."""
    far = Far(timeout=0.2)
    (pair, seqs), (twin, others) = waiting(near_pages=near, far=far), waiting(near_pages=near)
    for seed in range(3):
        before, drawn = tables(pair)[0], pair.generator.get_state()
        with trouble(seed, stay=0.3 if seed % 2 else 1.0):
            start = time.monotonic()
            with pytest.raises(RuntimeError, match=NEVER):
                pair.feed(seqs, [tokens, 1])
            assert time.monotonic() - start < 5.0
        assert tables(pair)[0] == before
        pair.generator.set_state(drawn)
        with trouble(seed):
            got = pair.feed(seqs, [tokens, 1])
        assert equal(got, twin.feed(others, [tokens, 1]))
    pair.check_contents()
    pair.check_pools()


def test_a_copy_that_comes_too_late_touches_nothing() -> None:
    """Its place is another page's by then."""
    named = Named.of(K)
    seq, store, late = named.begun(), named.cache._store, 0
    store.set_ahead(True, 5)
    for step in range(30):
        first, second = ([[(9 * step + 5 * i + r + d) % PAGES for i in range(K)] for r in range(ROWS)] for d in (0, 2))
        with trouble(step, stay=0.5):
            try:
                named.check(named.read([seq], first), first)
            except RuntimeError as error:
                assert re.search(NEVER, str(error))
                late += 1
        named.check(named.read([seq], second), second)
        time.sleep(0.001)
        named.check(named.read([seq], second), second)
    assert late > 10


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), 1e6])
def test_times_that_are_none(timeout: float) -> None:
    with pytest.raises(ValueError, match="Far: timeout is .*, expected seconds above 0"):
        Far(timeout=timeout)


# --- threads --------------------------------------------------------------------------------------------------------------


def test_threads_start_with_the_first_late_page_and_end_with_the_cache() -> None:
    gc.collect()
    pair, seqs = waiting()
    pair.cache._store.set_ahead(True, 60_000)  # ends those that there may be
    before = len(os.listdir("/proc/self/task"))
    with trouble():
        pair.feed(seqs, [1, 1])
    assert len(os.listdir("/proc/self/task")) == before + 2
    del pair
    gc.collect()
    assert len(os.listdir("/proc/self/task")) == before


def test_a_cache_that_ends_while_the_disk_does_not_answer() -> None:
    """It does not wait for it for good, and the files are closed all the same."""
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    pair, seqs = waiting(far=Far(timeout=0.01))
    with trouble(stay=1.0):
        with pytest.raises(RuntimeError, match=NEVER):
            pair.feed(seqs, [1, 1])
        start = time.monotonic()
        del pair
        gc.collect()
        assert time.monotonic() - start < 10.0
        assert len(os.listdir("/proc/self/fd")) == files


def test_a_forked_process_has_threads_of_its_own() -> None:
    """The parent's are not there. Both go on, with the same answers."""
    (pair, seqs), (twin, others) = waiting(), waiting()
    with trouble(delay=LATE):
        pair.feed(seqs, [1, 1])
        twin.feed(others, [1, 1])
        want = twin.feed(others, [1, 1])
        child = os.fork()
        if child == 0:
            os._exit(0 if equal(pair.feed(seqs, [1, 1]), want) else 1)
        assert equal(pair.feed(seqs, [1, 1]), want)
        assert os.waitpid(child, 0)[1] == 0


def test_pages_that_the_system_does_not_hold_in_memory() -> None:
    """What it drops of the files comes from the disk."""
    pair = fed()
    seqs = pair.new(2)
    pair.feed(seqs, [600, 300])
    for lengths in ([1, 1], [1, 1], [3, 1], [1, 200]):
        for file, _ in pair.cache._slabs._files.values():
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        pair.feed(seqs, lengths)
    for file, _ in pair.cache._slabs._files.values():
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    pair.check_contents()
    everything = fed(small(1 << 12))
    seqs = everything.new(2)
    everything.feed(seqs, [600, 300])
    for n in (1, 4):
        for file, _ in everything.cache._slabs._files.values():
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        assert worst(everything, seqs, [n, 1]) < EXACT


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system that lies in memory")
def test_files_that_lie_in_memory_are_never_late() -> None:
    """Nothing is handed over."""
    gc.collect()
    pair, seqs = waiting(far=Far(path="/dev/shm"))
    threads = len(os.listdir("/proc/self/task"))
    for lengths in ([1, 1], [3, 1], [1, 1]):
        pair.feed(seqs, lengths)
    recall = pair.cache.report().recall
    assert recall is not None and recall.misses > 0 and (recall.late, recall.waited) == (0, 0.0)
    assert len(os.listdir("/proc/self/task")) <= threads
    pair.check_contents()
