"""The Far tier's files and its faults: what fails leaves tables, bytes and answers as they were, and names place and reason."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from archived import ALL, EXACT, SHAPE, Fed, fed, small, worst

from kvstrata import Cache, Sequence
from kvstrata.budget import Ledger
from kvstrata.config import BudgetExceeded, Unsupported
from kvstrata.recall import Far
from kvstrata.testing import fault

LATE = 4096
"""An interval that no test reaches: plans are made when asked for."""


def tables(pair: Fed) -> list[Any]:
    """Every row's table and, of every pool, its pages."""
    store = pair.cache._store
    rows = [
        store.row(s.id, layer, h)
        for s in pair.pieces
        for layer, spec in enumerate(SHAPE.layers)
        for h in range(spec.kv_heads)
    ]
    return [rows, [store.pool(p)["used"] for p in range(store.n_pools)], store.captured()[2]]


def waiting(pages: int = 4, seed: int = 0, **settings: Any) -> tuple[Fed, list[Sequence]]:
    """A cache of two sequences with 512 tokens in the Far tier, and sealed ones that wait for a plan."""
    pair = fed(small(pages, interval=LATE), seed=seed, **settings)
    seqs = pair.new(2)
    pair.feed(seqs, [560, 570])
    for _ in range(20):
        pair.feed(seqs, [16, 16])
    return pair, seqs


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["plan.after_check", "plan.after_write", "far.write"])
def test_a_plan_that_fails_changes_nothing(point: str) -> None:
    """The first row: no table, no page, no byte; then it goes on."""
    pair, seqs = waiting()
    before = tables(pair)
    for nth in (1, 7, 16) if point == "far.write" else (1,):
        with pytest.raises(RuntimeError, match=f"fault injected at {point}"), fault(point, nth) as armed:
            pair.cache.compress()
        assert armed.visits == nth
        assert tables(pair) == before
        pair.check_contents()
        pair.check_pools()
    far = pair.cache.report().far_tokens
    pair.cache.compress()
    assert pair.cache.report().far_tokens == far + 2 * 4 * 256
    pair.check_contents()
    pair.check_empty()


@pytest.mark.parametrize(("point", "nth"), [("plan.after_write", 3), ("plan.after_check", 6), ("far.write", 70)])
def test_rows_before_the_one_that_fails_stay_as_planned(point: str, nth: int) -> None:
    """And answers are those of a cache that never failed, once both have planned the rest."""
    (pair, seqs), (twin, others) = waiting(), waiting()
    with pytest.raises(RuntimeError, match=point), fault(point, nth):
        pair.cache.compress()
    pair.check_contents()
    pair.check_pools()
    pair.cache.compress()
    twin.cache.compress()
    for _ in range(10):
        for a, b in zip(pair.feed(seqs, [1, 1]), twin.feed(others, [1, 1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "point", ["plan.after_check", "plan.after_write", "far.write", "append.after_take", "slab.lend"]
)
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_prompt_that_fails_is_withdrawn(point: str, nth: int) -> None:
    """Older tokens stay, and are read as before."""
    pair = fed(small(ALL))
    seqs = pair.new(2)
    pair.feed(seqs, [600, 300])
    drawn = pair.generator.get_state()
    with fault(point, nth) as armed, pytest.raises(RuntimeError, match=point):
        pair.feed(seqs, [1500, 1])
    assert armed.visits == nth
    pair.generator.set_state(drawn)
    pair.check_contents()
    pair.check_pools()
    for n in (1, 1500, 1, 20, 1):
        assert worst(pair, seqs, [n, 1]) < EXACT
    pair.check_contents()
    pair.check_empty()


@pytest.mark.parametrize("tokens", [1, 5, 100])
@pytest.mark.parametrize("nth", [1, 3, 9])
def test_a_page_that_cannot_be_read(tokens: int, nth: int) -> None:
    """The step's tokens are withdrawn; then answers are those of a cache that never failed."""
    (pair, seqs), (twin, others) = waiting(), waiting()
    before, drawn = tables(pair), pair.generator.get_state()
    with pytest.raises(RuntimeError, match=r"fault injected at far\.read"), fault("far.read", nth):
        pair.feed(seqs, [tokens, 1])
    pair.generator.set_state(drawn)
    assert tables(pair)[0] == before[0]
    pair.check_contents()
    pair.check_pools()
    for n in (1, 1, tokens, 1):
        for a, b in zip(pair.feed(seqs, [n, 1]), twin.feed(others, [n, 1]), strict=True):
            assert torch.equal(a, b)
    pair.check_contents()


def test_decoded_tokens_stand_when_the_plan_after_them_fails() -> None:
    pair = fed()
    (seq,) = pair.new()
    pair.feed([seq], [300])
    drawn, failed = pair.generator.get_state(), 0
    for _ in range(200):
        drawn, length = pair.generator.get_state(), pair.cache.logical_length(seq)
        try:
            with fault("far.write", 3):
                pair.feed([seq], [1])
        except RuntimeError:
            failed += 1
            assert pair.cache.logical_length(seq) == length + 1
            pair.generator.set_state(drawn)
            pair.note([seq], [1], [(k, v) for _, k, v in (pair.drawn(layer, 1) for layer in range(2))])
    assert failed > 2
    pair.check_contents()
    for _ in range(32):
        pair.feed([seq], [1])
    assert pair.cache.report().far_tokens == 4 * 256
    pair.check_contents()
    pair.check_pools()


def test_a_key_that_is_no_number() -> None:
    """Steps of one token cannot rank its page: they are refused and withdrawn, and name it. Sequences without it go on."""
    pair = fed()
    seq, other = pair.new(2)
    pair.feed([other], [600])
    with pair.cache.step([seq], [600]) as step:
        for layer in range(2):
            q, k, v = pair.drawn(layer, 600)
            k[100, 0, 3] = torch.nan
            step.attend(layer, q, k, v)
    for _ in range(2):
        with pytest.raises(ValueError, match="select: the logits of row 0, entry .* are not finite"):
            pair.feed([seq], [1])
        assert pair.cache.logical_length(seq) == 600
    pair.cache.free([seq])
    del pair.pieces[seq]
    pair.feed([other], [1])
    pair.check_contents()
    pair.check_pools()


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_full_tier_refuses_before_a_page_is_taken() -> None:
    """Of a prompt: the step is withdrawn. Of decoding: its tokens stand, Near. Freed pages serve again."""
    pair = fed(small(ALL), far="400KiB")
    seqs = pair.new(2)
    pair.feed(seqs, [300, 40])
    used = pair.cache.report().far_bytes
    with pytest.raises(BudgetExceeded, match=r"far limit is 409600 bytes, \d+ are in use, \d+ more are needed"):
        pair.feed(seqs, [1, 1500])
    assert used <= pair.cache.report().far_bytes <= 400 << 10
    pair.check_contents()
    pair.check_pools()
    assert worst(pair, seqs, [1, 1]) < EXACT
    pair.free(seqs[:1])
    for n in (100, 1, 30, 1):
        assert worst(pair, seqs[1:], [n]) < EXACT
    pair.check_contents()
    pair.check_empty()


def test_a_plan_that_finds_the_tier_full_changes_nothing() -> None:
    pair, seqs = waiting(far=2 * 4 * 32 * 8192 + 3 * 8192)
    before, far = tables(pair), pair.cache.report().far_bytes
    for _ in range(2):
        with pytest.raises(BudgetExceeded, match="far limit is"):
            pair.cache.compress()
        assert tables(pair) == before and pair.cache.report().far_bytes == far
    pair.check_contents()
    pair.feed(seqs, [1, 1])
    pair.free(seqs[:1])
    pair.cache.compress()
    pair.check_contents()
    pair.check_pools()


@pytest.mark.parametrize("limit", [0, -5, "0KiB"])
def test_limits_below_a_byte(limit: int | str) -> None:
    with pytest.raises(ValueError, match=r"Far: limit is .*, expected None or at least 1 byte"):
        Far(limit)
    with pytest.raises(ValueError, match="expected None or at least 1 byte"):
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


def file_of(pair: Fed, seq: Sequence) -> list[tuple[int, int]]:
    """(descriptor, offset) of every Far page of a sequence."""
    store, found = pair.cache._store, []
    for layer, spec in enumerate(SHAPE.layers):
        for h in range(spec.kv_heads):
            for page in store.row(seq.id, layer, h)[0]:
                pool, slab, index = page >> 28, page >> 16 & 0xFFF, page & 0xFFFF
                if store.pool(pool)["far"]:
                    found.append((pair.cache._slabs._files[pool, slab][0], index * store.pool(pool)["page_bytes"]))
    return found


@pytest.mark.parametrize("tokens", [1, 3, 80])
def test_a_file_that_was_cut_short(tokens: int) -> None:
    pair, seqs = waiting()
    (short,) = pair.new()
    pair.feed([short], [100])
    before = pair.cache.logical_length(seqs[0])
    for file, _ in pair.cache._slabs._files.values():
        os.ftruncate(file, 0)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"far tier: pread of 8192 bytes at \d+ ended after 0: the file was cut short"
        ):
            pair.feed(seqs, [tokens, 1])
        assert pair.cache.logical_length(seqs[0]) == before
    assert worst(pair, [short], [20]) < EXACT, "others go on"
    pair.free(seqs)
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

pair = fed(far=Far(path=sys.argv[1]))
while True:
    pair.feed(pair.new(), [700])
    print(pair.cache.report().far_bytes, flush=True)
"""


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
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
