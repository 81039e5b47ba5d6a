"""Plans after a step that find no room or that the machine fails: put off, never lost, and never the step's tokens."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import pytest
import torch
from archived import ALL, EXACT, fed, ruled, sealed, small, worst
from waiting import file_of, put_off

from kvstrata.config import BudgetExceeded
from kvstrata.policy.base import FAR, PROVISIONAL, Seen
from kvstrata.recall import Archive, Far, Position

PAGE = 8192


@pytest.mark.parametrize("near", [None, "1536KiB"])
def test_a_full_tier_leaves_tokens_near_until_there_is_no_room(near: str | None) -> None:
    """Decoding goes on as long as Near holds what cannot leave; then a step is refused before a page is taken."""
    pair = fed(small(), budget=near, far=Far(4 * 20 * PAGE))
    (seq,) = pair.new()
    pair.feed([seq], [300])
    refused = ""
    for _ in range(400 if near is None else 1200):
        try:
            pair.feed([seq], [1])
        except BudgetExceeded as error:
            refused = str(error)
            break
    n, report = pair.cache.logical_length(seq), pair.cache.report()
    assert put_off(pair)[0] > 5 and put_off(pair)[1] == 0
    assert report.far_tokens < 4 * sealed(n) and report.far_bytes <= 4 * 20 * PAGE
    if near is None:
        assert n == 700 and not refused
    else:
        assert 350 < n < 1500 and re.search("limit is 1572864 bytes, .* more are needed", refused)
        assert report.peak_bytes <= 1536 << 10
    pair.check_contents()
    pair.check_pools()


def test_room_again_makes_up_for_all() -> None:
    """What was put off is planned at the next interval once another sequence has left."""
    pair = fed(small(ALL), far=Far(4 * 40 * PAGE))
    seq, other = pair.new(2)
    pair.feed([seq, other], [300, 300])
    for _ in range(201):
        pair.feed([seq], [1])
    assert put_off(pair)[0] > 2
    pair.check_contents()
    pair.free([other])
    for _ in range(32):
        assert worst(pair, [seq], [1]) < EXACT
    for layer, n in enumerate((528, 520)):
        (rule, _) = ruled([300])
        rule.plan(n)
        pair.check_rule(seq, layer, rule)
    pair.check_contents()
    pair.check_pools()


def test_pages_for_good_in_a_nearly_full_tier() -> None:
    """They need new pages before the old ones are free: put off, and the old ones are read on."""
    pair = fed(small(ALL), far=Far((4 * 15 + 12) * PAGE))
    (seq,) = pair.new()
    pair.feed([seq], [300])
    while not put_off(pair)[0]:
        assert worst(pair, [seq], [1]) < EXACT
    assert pair.cache.logical_length(seq) == 304, "where 256 tokens are to be put together for good"
    _, tier, grouped = pair.looked(seq, 0)
    assert ((grouped == PROVISIONAL).sum(1) == 240).all() and ((tier == FAR) == (grouped == PROVISIONAL)).all()
    for _ in range(40):
        assert worst(pair, [seq], [1]) < EXACT
    assert torch.equal(pair.looked(seq, 0)[2][:, :288], grouped[:, :288])
    pair.check_contents()
    pair.check_pools()


def test_a_sequence_that_fails_holds_up_no_other() -> None:
    """Of two that are due in one step, the pages of one cannot be read: the other is archived."""
    pair = fed(small(ALL))
    seqs = pair.new(2)
    pair.feed(seqs, [600, 600])
    for _ in range(215):
        pair.feed(seqs, [1, 1])
    broken = file_of(pair, seqs[0])
    held = [os.pread(file, PAGE, at) for file, at in broken]
    for file, at in broken:
        os.pwrite(file, bytes(PAGE), at)
    for _ in range(12):
        pair.feed(seqs, [1, 1])
    assert put_off(pair) == (2, 2), "of each layer"
    for layer, n in enumerate((816, 824)):
        (rule, _) = ruled([600])
        rule.plan(n)
        assert rule.good == 768
        pair.check_rule(seqs[1], layer, rule)
    for (file, at), data in zip(broken, held, strict=True):
        os.pwrite(file, data, at)
    while pair.cache.logical_length(seqs[0]) < 840:
        assert worst(pair, seqs, [1, 1]) < EXACT
    for layer, n in enumerate((832, 840)):
        (rule, _) = ruled([600])
        rule.plan(n)
        pair.check_rule(seqs[0], layer, rule)
    pair.check_contents()


@dataclass(frozen=True)
class Broken:
    """A packer with a mistake, from so many tokens on."""

    error: Exception
    after: int = 600
    packer: Position = Position()

    def group(self, seen: Seen, segment: torch.Tensor) -> torch.Tensor:
        if int(seen.lengths.max()) > self.after:
            raise self.error
        return self.packer.group(seen, segment)


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyError("mine"), torch.OutOfMemoryError("mine")])
@pytest.mark.parametrize("n", [1, 2])
def test_what_a_role_raises_comes_out(error: Exception, n: int) -> None:
    """No plan is put off for it, and it says that the step's tokens stand."""
    policy = small()
    assert isinstance(policy.planner, Archive)
    pair = fed(replace(policy, planner=replace(policy.planner, packer=Broken(error))))
    seqs = pair.new(n)
    pair.feed(seqs, [600] * n)
    raised = 0
    for i in range(32):
        try:
            pair.feed(seqs, [1] * n)
        except type(error) as found:
            assert found is error and any("the step's tokens stand" in note for note in found.__notes__)
            raised += 1
        assert [pair.cache.logical_length(s) for s in seqs] == [601 + i] * n
    assert raised == 4 and put_off(pair) == (0, 0), "of two layers, twice each"
