"""The format that tokens take as they leave the tail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from feeding import feed

from kvstrata import Budget, Cache, LayerSpec, Shape, Unsupported
from kvstrata.policy import Policy, arkv, icecache, kivi

SHAPE = Shape([LayerSpec(2, 4, 64), LayerSpec(2, 4, 64, window=32)], torch.bfloat16)


def after(policy: Policy, lengths: list[list[int]], budget: Budget | None = None) -> tuple:  # type: ignore[type-arg]
    """A cache of two sequences that was fed so."""
    cache, generator = Cache(SHAPE, budget, policy), torch.Generator().manual_seed(0)
    seqs = cache.new(2)
    for n in lengths:
        feed(cache, seqs, n, generator)
    return cache, seqs


@pytest.mark.parametrize("format", ["int8", "int4", "int2"])
def test_only_sinks_and_tail_are_full(format: str) -> None:
    """After every step, of a prompt, a turn or decoding: what has left the tail is quantized, layers that slide are not."""
    cache, seqs = after(kivi(format, window=32, sinks=4), [])
    generator = torch.Generator().manual_seed(0)
    for lengths in ([100, 7], [3, 40], *[[1, 1]] * 40):
        feed(cache, seqs, lengths, generator)
        for i, seq in enumerate(seqs):
            n = cache.logical_length(seq)
            sealed = max(0, (n - 32) // 16 * 16)
            held, _, _ = cache._store.tally(0, [seq.id])
            quantized = 2 * max(0, sealed - 4)
            assert (held[1], sum(held[2:])) == (2 * n - quantized, quantized), (i, n)
            assert sum(cache._store.tally(1, [seq.id])[0][2:]) == 0
    assert cache.report().counts["quantized"] == cache.report().states[format]


def test_as_a_plan_would_have_it() -> None:
    """Byte for byte what a plan makes of the same tokens, which then changes nothing: they are encoded once."""
    lengths = [[60, 50], *[[1, 1]] * 70]
    sealing, seqs = after(kivi(window=32), lengths)
    plain, others = after(replace(kivi(window=32), on_seal=None, interval=1024), lengths)
    assert plain.report().states["full"] > sealing.report().states["full"]
    before = sealing.report().counts["quantized"]
    for cache in (sealing, plain):
        cache.compress()
    assert sealing.report().counts["quantized"] == before
    for seq, other in zip(seqs, others, strict=True):
        pairs = zip(sealing.materialize(0, seq), plain.materialize(0, other), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_what_a_planner_would_keep_full_is_sealed_too() -> None:
    """Under a limit that holds everything Full, and one that does not: within it at every step."""
    policy = replace(arkv("int4"), on_seal="int4")
    roomy, _ = after(policy, [[200, 100], [1, 1]], Budget.bytes("8MiB"))
    assert roomy.report().states["int4"] == 2 * (128 - 16 + 32 - 16) and roomy.report().counts["evicted"] == 0
    limit = 350 << 10
    cache, seqs = after(policy, [], Budget.bytes(limit))
    generator = torch.Generator().manual_seed(1)
    for n in (300, *[1] * 70):
        feed(cache, seqs, [n, n], generator)
        assert cache._slabs.note_peak() <= limit
    assert cache.report().states["evicted"] > 0


def test_what_cannot_seal_so() -> None:
    with pytest.raises(ValueError, match=r"policy arkv: on_seal is 'int8', expected None or one of \('int4', 'int2'\)"):
        replace(arkv(), on_seal="int8")
    with pytest.raises(Unsupported, match="policy icecache: on_seal"):
        replace(icecache(state="int8"), on_seal="int8")
    with pytest.raises(Unsupported, match="policy q: on_seal without a planner"):
        Policy("q", formats=("int8",), on_seal="int8")
