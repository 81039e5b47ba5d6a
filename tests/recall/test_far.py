"""The Far tier's limit and its files: what fails leaves tables, bytes and answers as they were, and names place and reason."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from archived import ALL, EXACT, SHAPE, fed, ruled, sealed, small, worst
from waiting import check_planned, file_of, go_on, put_off, tables, waiting

from kvstrata import Cache
from kvstrata.budget import Ledger
from kvstrata.config import BudgetExceeded, Unsupported
from kvstrata.recall import Far

# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_full_tier_refuses_before_a_page_is_taken() -> None:
    """Of a prompt: the step is withdrawn. Of decoding: its tokens stand, Near; plans are put off. Freed pages serve again."""
    pair, page = fed(small(ALL), far="640KiB"), 8192
    seqs = pair.new(2)
    pair.feed(seqs, [300, 40])
    used = pair.cache.report().far_bytes
    assert used >= 4 * sealed(300) // 16 * page
    with pytest.raises(BudgetExceeded, match=r"far limit is 655360 bytes, \d+ are in use, \d+ more are needed"):
        pair.feed(seqs, [1, 1500])
    assert used <= pair.cache.report().far_bytes <= 640 << 10
    pair.check_contents()
    pair.check_pools()
    assert worst(pair, seqs, [1, 1]) < EXACT
    late = [go_on(pair, seqs[0]) for _ in range(100)]
    assert set(late) == {0, 1} and put_off(pair) == (sum(late), 0) and sum(late) > 2
    pair.check_contents()
    pair.check_pools()
    assert worst(pair, seqs, [1, 1]) < EXACT
    pair.free(seqs[:1])
    for n in (100, 1, 30, 1):
        assert worst(pair, seqs[1:], [n]) < EXACT
    closed = (
        8  # older tokens in the page of the first layer that the withdrawn prompt had filled: they are sealed since
    )
    assert pair.cache.report().far_tokens == 2 * (sealed(174) + closed) + 2 * sealed(174)
    pair.check_contents()
    pair.check_empty()


def test_a_plan_that_finds_the_tier_full_changes_nothing() -> None:
    """One whose first row needs 25 new pages before it frees 5, where there are fewer."""
    limit = (7 * 37 + 29 + 21 + 8) * 8192  # the prompt's last row frees 13 when it has written 21
    pair, seqs = waiting(far=limit)
    before, far = tables(pair), pair.cache.report().far_bytes
    assert limit - 25 * 8192 < 8 * 37 * 8192 <= far <= limit
    for _ in range(2):
        with pytest.raises(BudgetExceeded, match="far limit is"):
            pair.cache.compress()
        assert tables(pair) == before and pair.cache.report().far_bytes == far
    pair.check_contents()
    pair.feed(seqs, [1, 1])
    pair.free(seqs[:1])
    pair.cache.compress()
    check_planned(pair, seqs[1:])
    pair.check_contents()
    pair.check_pools()


@pytest.mark.parametrize("limit", [0, -5, "0KiB"])
def test_limits_below_a_byte(limit: int | str) -> None:
    with pytest.raises(ValueError, match=r"Far: limit is .*, expected None, an int >= 1 or a string"):
        Far(limit)
    with pytest.raises(ValueError, match="expected None, an int >= 1 or a string"):
        Cache(SHAPE, policy=small(), far=limit)


def test_what_is_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", Path(__file__)):
        with pytest.raises(ValueError, match="expected an existing folder"):
            Far(path=str(path))


@pytest.mark.parametrize("policy", [None, "full", "streaming"])
def test_a_policy_that_archives_nothing_has_no_tier(policy: str | None) -> None:
    for far in (Far(), "1GiB", 1 << 20):
        with pytest.raises(Unsupported, match="archives nothing; expected 'auto' or None"):
            Cache(SHAPE, "4MiB", policy, far=far)
    for none in ("auto", None):
        assert Cache(SHAPE, "4MiB", policy, far=none).report().far_bytes == 0


# --- files ------------------------------------------------------------------------------------------------------------


CUT_SHORT = r"far tier: pread of 8192 bytes at \d+ ended after 0: the file was cut short"


@pytest.mark.parametrize("tokens", [1, 3, 80])
def test_a_file_that_was_cut_short(tokens: int) -> None:
    """A step that reads it is withdrawn. One that has nothing in it goes on."""
    pair, seqs = waiting()
    (short,) = pair.new()
    pair.feed([short], [60])
    before, lengths = tables(pair)[0], [pair.cache.logical_length(s) for s in seqs]
    for file, _ in pair.cache._slabs._files.values():
        os.ftruncate(file, 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=CUT_SHORT):
            pair.feed(seqs, [tokens, 1])
        assert [pair.cache.logical_length(s) for s in seqs] == lengths and tables(pair)[0] == before
    assert worst(pair, [short], [16]) < EXACT and worst(pair, [short], [1]) < EXACT
    pair.free(seqs)
    pair.check_contents()
    pair.check_pools()


def test_a_file_that_is_cut_short_for_a_plan(caplog: pytest.LogCaptureFixture) -> None:
    """All pages have Near copies, so steps go on; the plan that clusters again what is in the file is put off and names it, and
    the step's token stands. With the file as it was, the next one does it."""
    pair = fed(small(ALL))
    (seq,) = pair.new()
    pair.feed([seq], [600])
    for _ in range(215):
        pair.feed([seq], [1])
    files = [(file, os.pread(file, os.fstat(file).st_size, 0)) for file, _ in pair.cache._slabs._files.values()]
    assert files
    for file, _ in files:
        os.ftruncate(file, 0)
    failed = []
    for n in range(816, 828):
        if go_on(pair, seq):
            failed.append(n)
    assert failed == [816, 824] and put_off(pair) == (2, 2), "where the layers have 256 tokens to cluster for good"
    (said,) = caplog.records
    assert re.search(CUT_SHORT, said.message)
    for file, held in files:
        os.pwrite(file, held, 0)
    pair.check_contents()
    while pair.cache.logical_length(seq) < 840:
        assert worst(pair, [seq], [1]) < EXACT
    for layer, (rule, n) in enumerate(zip(ruled([600]), (832, 840), strict=True)):
        rule.plan(n)
        assert rule.good == 768
        pair.check_rule(seq, layer, rule)
    pair.check_contents()
    pair.check_pools()


@pytest.mark.parametrize("tokens", [1, 3, 80])
def test_a_byte_that_was_changed(tokens: int) -> None:
    """In every page of one sequence: it is refused, the other one goes on."""
    pair, (seq, other) = waiting()
    for file, at in file_of(pair, seq):
        (byte,) = os.pread(file, 1, at + 4711)
        os.pwrite(file, bytes([byte ^ 0x10]), at + 4711)
    for lengths in ([tokens, 1], [1, tokens]):
        with pytest.raises(RuntimeError, match=r"the 8192 bytes at \d+ are not those that were written: the file was"):
            pair.feed([seq, other], lengths)
    pair.free([seq])
    for n in (2, tokens + 1, 30):
        assert worst(pair, [other], [n]) < EXACT
    pair.check_contents()
    pair.check_pools()


@pytest.mark.parametrize("with_ledger", [False, True])
def test_a_disk_that_is_full(with_ledger: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A prompt is withdrawn, and no byte stays charged; then, with room again, all goes on."""
    ledger = Ledger(near="64MiB") if with_ledger else None
    pair = fed(small(ALL), far=Far(path=str(tmp_path)), ledger=ledger)
    seqs = pair.new()
    pair.feed(seqs, [100])
    gc.collect()
    held, files = pair.cache._slabs.held, len(os.listdir("/proc/self/fd"))

    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        for _ in range(3):
            with pytest.raises(RuntimeError, match=f"far tier: {tmp_path} has no room for .* No space left on device"):
                pair.feed(seqs, [900])
    assert len(os.listdir("/proc/self/fd")) == files
    pair.check_contents()
    pair.check_pools()
    pair.cache.trim()
    assert pair.cache._slabs.held == pair.cache._slabs.allocator_bytes() <= 2 * held
    if ledger is not None and pair.cache.scope is not None:
        near = ledger.report(pair.cache.scope).near_bytes
        assert (near.used, near.reserved) == (pair.cache.nbytes(), 0)
    for n in (1, 900, 1):
        assert worst(pair, seqs, [n]) < EXACT
    pair.check_empty()


def test_files_have_no_name_and_end_with_the_cache(tmp_path: Path) -> None:
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    pair = fed(far=Far(path=str(tmp_path)))
    pair.feed(pair.new(), [900])
    assert pair.cache.report().far_bytes > 0 and len(os.listdir("/proc/self/fd")) > files
    assert not list(tmp_path.iterdir())
    del pair
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files


CHILD = """
import sys
import torch
from archived import fed
from kvstrata.recall import Far
from kvstrata.testing import trouble

pair = fed(far=Far(path=sys.argv[1]))
with trouble(delay=1e-3):
    while True:
        seqs = pair.new()
        pair.feed(seqs, [700])
        print(pair.cache.report().far_bytes, flush=True)
        pair.feed(seqs, [1])
"""


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    """Killed while pages come from the disk, or go there."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)], stdout=subprocess.PIPE, env=env
    )
    assert child.stdout is not None
    try:
        assert int(child.stdout.readline()) > 0
        assert int(child.stdout.readline()) > 0
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())
