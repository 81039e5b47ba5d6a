"""When plans fall: every interval and at no other step, not at all where everything fits, and the same in every run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from feeding import feed
from test_budgets import COMPRESSING
from torch import Tensor

from kvstrata import Budget, Cache, LayerSpec, Shape
from kvstrata.budget.costs import page_costs
from kvstrata.budget.protect import pages
from kvstrata.budget.room import room
from kvstrata.policy import NAMED
from kvstrata.policy.base import FULL, Policy

SHAPE = Shape([LayerSpec(2, 8, 64)] * 3, torch.bfloat16)


def planned(cache: Cache) -> list[tuple[int, int]]:
    """From now on: layer and length of each plan, applied or ended as it would change nothing."""
    found: list[tuple[int, int]] = []
    for name in ("_apply", "_leave"):
        acts = getattr(cache._plans, name)

        def note(what, ids, acts=acts):  # type: ignore[no-untyped-def]
            layers = what if isinstance(what, list) else [what.layer]
            found.extend((layer, cache._store.length(i)) for layer in layers for i in ids)
            acts(what, ids)

        setattr(cache._plans, name, note)
    return found


@pytest.mark.parametrize("kib", [500, 4000])
@pytest.mark.parametrize("name", COMPRESSING)
def test_plans_fall_every_interval(name: str, kib: int) -> None:
    """While decoding, at lengths that are multiples of the interval, each layer once; a roomy limit has longer intervals."""
    cache = Cache(SHAPE, budget=f"{kib}KiB", policy=name)
    (seq,) = cache.new()
    generator = torch.Generator().manual_seed(8)
    feed(cache, [seq], [333], generator)
    found = planned(cache)
    for _ in range(140):
        feed(cache, [seq], [1], generator)
    interval = cache.policy.interval
    assert interval == (16 if kib == 500 else 64)
    assert found == [(layer, n) for n in range(334, 474) if n % interval == 0 for layer in range(3)]


def fitting(policy: Policy, tokens: int) -> int:
    """The least limit under which the unprotected tokens of a prompt may all stay Full: by bisection, what ``room`` leaves.

    A division deals in whole pages of the cheapest format: where that is not the Full one, a row may lack part of one.
    """
    assert policy.window is not None
    sealed = (tokens - policy.window) // 16  # pages before the tail; the sinks' one is among them
    free = sealed * 16 - policy.sinks
    need = pages(free) * sum(spec.kv_heads * page_costs(SHAPE, i, policy)[FULL] for i, spec in enumerate(SHAPE.layers))
    if policy.formats:
        need += SHAPE.rows * min(page_costs(SHAPE, 0, policy).values())
    low, high = 0, 1 << 26
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if room(policy, SHAPE, middle, 1).content < need else (low, middle)
    return low


@pytest.mark.parametrize("name", [n for n in COMPRESSING if n != "kivi"])
def test_a_prompt_that_just_fits_is_not_trimmed_by_its_first_decode_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by the prompt itself; where the limit is a page of each row smaller, the prompt is."""
    monkeypatch.setattr("kvstrata.limit.fit", lambda policy, *_: policy)
    policy = replace(NAMED[name]().with_queries(8), window=32, interval=32, chunk=128)
    limit = fitting(policy, 352)
    row = sum(spec.kv_heads * page_costs(SHAPE, i, policy)[FULL] for i, spec in enumerate(SHAPE.layers))
    for less in (0, row):
        cache = Cache(SHAPE, budget=Budget.bytes(limit - less), policy=policy)
        (seq,) = cache.new()
        generator = torch.Generator().manual_seed(9)
        feed(cache, [seq], [352], generator)
        before = cache.report()
        full = before.stored_tokens == 352 * SHAPE.rows == before.states["full"]
        assert full == (less == 0)
        feed(cache, [seq], [1], generator)
        after = cache.report()
        assert after.states == before.states | {"full": before.states["full"] + SHAPE.rows}
        assert after.counts == before.counts


@pytest.mark.parametrize("name", COMPRESSING)
def test_two_runs_give_equal_tokens(name: str) -> None:
    """Outputs bit for bit, states and order in the tables, through prompts, turns, decoding and forks."""
    runs: list[list[Tensor]] = []
    for _ in range(2):
        cache = Cache(SHAPE, budget="500KiB", policy=name)
        seqs = cache.new()
        generator = torch.Generator().manual_seed(3)
        outs = []
        for n in (400, *[1] * 35, 50, *[1] * 20):
            with cache.step(seqs, [n]) as step:
                for layer in range(3):
                    q, k, v = (torch.randn(n, h, 64, generator=generator).bfloat16() for h in (8, 2, 2))
                    outs.append(step.attend(layer, q, k, v))
        for layer in range(3):
            outs += cache.materialize(layer, seqs[0])
        assert cache.report().states["evicted"] or cache.report().states["full"] < 400 * SHAPE.rows
        runs.append(outs)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
