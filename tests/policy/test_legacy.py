"""ARKV as its public code has it: counts, shares and trims, and that quantized tokens live on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from feeding import feed
from sight import PAGE_BYTES, seen_of

from kvstrata import Budget, Cache, LayerSpec, Shape
from kvstrata.budget import EntropyShare
from kvstrata.policy import Seen, arkv
from kvstrata.policy.base import EVICTED, FULL, INT8, Allowance
from kvstrata.policy.legacy import CodeStates, CodeVotes

SHAPE = Shape([LayerSpec(2, 4, 64)] * 2, torch.bfloat16)


def seen(tokens: int, most: int, r: float, prompt: bool) -> Seen:
    """Two rows of so many tokens, scored at random."""
    generator = torch.Generator().manual_seed(tokens)
    found = seen_of(generator, rows=2, tokens=tokens, queries=32, sinks=0)
    share = torch.full((2,), r)
    allowance = Allowance(torch.full((2,), 1 << 30), PAGE_BYTES, share, most=most)
    score = torch.randn(found.positions.shape, generator=generator)
    return replace(found, score=score, allowance=allowance, prompt=prompt)


def counts(planned: torch.Tensor, now: Seen) -> tuple[int, int, int]:
    """Of the first row, beside its tail: Full, quantized, evicted."""
    mine = planned[0][now.stored[0] & ~now.protected[0]]
    return tuple(int((mine == s).sum()) for s in (FULL, INT8, EVICTED))  # type: ignore[return-value]


@pytest.mark.parametrize("r", [0.1, 1.0])
def test_a_prompt_is_cut_and_not_quantized(r: float) -> None:
    now = seen(400, 128, r, prompt=True)
    planned = CodeStates().plan(now).state
    assert planned is not None
    tail = int((now.stored & now.protected)[0].sum())
    kept = (128 - tail) // 16 * 16
    assert counts(planned, now) == (kept, 0, 400 - tail - kept)
    free = now.stored[0] & ~now.protected[0]
    assert now.score is not None
    lowest = now.score[0][free & (planned[0] == FULL)].min()
    assert (now.score[0][free & (planned[0] == EVICTED)] < lowest).all()


@pytest.mark.parametrize("r", [0.05, 0.3, 0.5, 0.75, 0.9, 1.0])
def test_decoding_trims_to_three_quarters(r: float) -> None:
    """Of the tokens before the tail; round(r (C - w)) - w of them Full, nothing quantized where that is all of them."""
    now = seen(560, 512, r, prompt=False)
    planned = CodeStates().plan(now).state
    assert planned is not None
    w = int((now.stored & now.protected)[0].sum())
    before = 560 - w
    keep, full = int(0.75 * before), max(0, round(r * (512 - w)) - w)
    whole = min(full, keep) // 16 * 16
    assert counts(planned, now) == (whole, keep // 16 * 16 - whole, before - keep // 16 * 16)
    assert (counts(planned, now)[1] == 0) == (r >= 0.9)


@pytest.mark.parametrize("prompt", [False, True])
def test_what_the_count_holds_stays(prompt: bool) -> None:
    now = seen(300, 512, 0.1, prompt)
    planned = CodeStates().plan(now).state
    assert planned is not None and torch.equal(planned, now.state)


def test_a_cache_under_a_count() -> None:
    """No row passes C at any step; the prompt is Full, decoding quantizes, and what is quantized stays to be read: its count
    falls by trims alone."""
    cache = Cache(SHAPE, Budget.tokens(256, count=True), replace(arkv(legacy=True), interval=16))
    (seq,), generator = cache.new(), torch.Generator().manual_seed(0)
    feed(cache, [seq], [400], generator)
    assert cache.report().states["int8"] == 0 and cache.report().states["evicted"] > 0
    kept = []
    for _ in range(150):
        feed(cache, [seq], [1], generator)
        assert max(cache.stored_length(layer, seq, h) for layer in range(2) for h in range(2)) <= 256
        kept.append(cache.report().states["int8"])
    assert kept[-1] > 0
    changes = [after - before for before, after in zip(kept, kept[1:], strict=False)]
    assert all(n == 0 for i, n in enumerate(changes) if (402 + i) % 16), "between plans nothing changes"


def test_roles_and_refusals() -> None:
    policy = arkv(legacy=True)
    assert (policy.scorer, policy.allocator) == (CodeVotes(), EntropyShare(stats="code", every=0))
    assert (policy.planner, policy.window, policy.sinks, policy.formats) == (CodeStates(), 32, 0, ("int8",))
    with pytest.raises(ValueError, match="arkv: legacy with .* expected no argument but interval and chunk"):
        arkv("int8", legacy=True)
    for budget in ("1MiB", "256tok"):
        with pytest.raises(ValueError, match="policy 'arkv' expects one in tokens with count=True"):
            Cache(SHAPE, budget, policy)
    with pytest.raises(ValueError, match="CodeStates: quantized is 'fp8'"):
        CodeStates("fp8")
