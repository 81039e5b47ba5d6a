"""Layers of a prompt are cut by their parts of all layers, where an allocator asks for nothing that is still to come, and heads
by their own scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from feeding import drawn, feed
from torch import Tensor

from kvstrata import Cache, LayerSpec, Policy, Shape
from kvstrata.budget import Allocation, Knapsack, PowerLaw, Pyramid, RowsSeen
from kvstrata.budget.costs import page_costs
from kvstrata.policy import KeepTop, KeyNorm, MeanSpread, ThreeStates, adakv, keynorm
from kvstrata.policy.base import FULL

SHAPE = Shape([LayerSpec(2, 4, 64)] * 3, torch.bfloat16)
LAW = PowerLaw(torch.tensor([[1.0, 1.0], [40.0, 10.0], [1.0, 0.0]]), torch.tensor([[0.5], [1.0], [0.5]]))
EVICT = keynorm(window=32, sinks=16, interval=32)
STATES = Policy("states", ThreeStates("int4"), KeyNorm(), LAW, ("int4",), sinks=16, window=32, interval=32, chunk=256)
KIB = 400


def stored(cache: Cache, seq: Any) -> Tensor:
    return torch.tensor([[cache.stored_length(layer, seq, h) for h in range(2)] for layer in range(3)])


@pytest.mark.parametrize("allocator", [LAW, Pyramid(4.0)])
def test_a_prompt_leaves_what_all_layers_at_once_would_be_given(allocator: Any) -> None:
    """An equal share cut inside the prompt would never be made up for."""
    cache = Cache(SHAPE, budget=f"{KIB}KiB", policy=replace(EVICT, allocator=allocator))
    (seq,) = cache.new()
    feed(cache, [seq], [1024], torch.Generator().manual_seed(1))
    kept = 16 + cache.policy.window
    cost = page_costs(SHAPE, 0, cache.policy)[FULL]
    table = RowsSeen(torch.full((3, 2), 1024 - kept), torch.full((1, 3), cost), unit=cost)
    given = allocator.allocate(table, cache._plans.shares.content()).bytes
    assert given.max() > 1.5 * given.float().mean() and given.min() < given.float().mean() / 2
    assert torch.equal(stored(cache, seq) - kept, given // cost * 16)
    assert cache.report().peak_bytes <= KIB << 10


@pytest.mark.parametrize("policy", [replace(EVICT, allocator=LAW, chunk=256), replace(EVICT, allocator=LAW), STATES])
def test_the_limit_holds_over_turns(policy: Policy) -> None:
    """Turns of all lengths on ragged sequences: layers behind hold more than their part until they are reached."""
    cache = Cache(SHAPE, budget=f"{2 * KIB}KiB", policy=policy)
    seqs = cache.new(2)
    generator = torch.Generator().manual_seed(2)
    draw = torch.Generator().manual_seed(3)
    for lengths in ([40, 1024], [17, 0], [300, 20], *torch.randint(0, 400, (8, 2), generator=draw).tolist(), [1, 1]):
        feed(cache, seqs, lengths, generator)
        assert cache.report().peak_bytes <= 2 * KIB << 10
    for seq in seqs:
        assert stored(cache, seq)[1].sum() > 1.5 * stored(cache, seq)[2].sum()


def test_heads_of_a_prompt_share_by_their_own_scores() -> None:
    """One that looks everywhere keeps what it has of its layer's highest scores, more than an equal share, in the prompt."""
    policy = adakv(queries=16, window=32, sinks=16, interval=32)
    cache = Cache(SHAPE, budget=f"{KIB}KiB", policy=policy)
    (seq,) = cache.new()
    generator = torch.Generator().manual_seed(5)
    with cache.step([seq], [1024]) as step:
        for layer, (q, k, v) in enumerate(drawn(cache, 1024, generator)):
            q[:, :2], q[:, 2:] = 0, k[600, 1]
            step.attend(layer, q, k, v)
    kept = 16 + cache.policy.window
    share = cache._plans.shares.content() / page_costs(SHAPE, 0, policy)[FULL] * 16
    free = stored(cache, seq) - kept
    assert (free[:, 0] > 1.3 * share / 6).all() and (free[:, 1] < 0.7 * share / 6).all()
    assert free.sum() > 0.95 * share
    assert cache.report().peak_bytes <= KIB << 10


@dataclass(frozen=True)
class Watched(Knapsack):
    """Remembers the norms that it saw."""

    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    def allocate(
        self, seen: RowsSeen, total: int, floor: Tensor | None = None, cap: Tensor | None = None
    ) -> Allocation:
        found.append(seen)
        return super().allocate(seen, total, floor, cap)


found: list[RowsSeen] = []


@pytest.mark.parametrize("metric", ["mass", "energy"])
def test_a_knapsack_of_energies_sees_how_long_values_are(metric: Any) -> None:
    policy = Policy(
        "energy", KeepTop(), MeanSpread(16), Watched(("bf16",), metric=metric), sinks=16, window=32, interval=32
    )
    cache = Cache(SHAPE, budget=f"{KIB}KiB", policy=policy)
    (seq,) = cache.new()
    generator = torch.Generator().manual_seed(4)
    with cache.step([seq], [512]) as step:
        for layer, (q, k, v) in enumerate(drawn(cache, 512, generator)):
            step.attend(layer, q, k, v)
            table = found.pop()
            if metric == "mass":
                assert table.norms is None
                continue
            assert table.norms is not None and table.positions is not None
            for h in range(2):
                at = table.positions[0, h, : int(table.tokens[0, h])].long()
                torch.testing.assert_close(table.norms[0, h, : len(at)], v[at, h].float().norm(dim=1))
    assert cache.report().peak_bytes <= KIB << 10
