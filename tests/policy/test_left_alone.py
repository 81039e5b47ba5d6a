"""A plan that is sure to change nothing ends before anything is scored, and later plans are as if it had been made."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from feeding import feed
from test_budgets import COMPRESSING

from kvstrata import Budget, Cache, LayerSpec, Policy, Shape
from kvstrata.budget import Knapsack, Ledger
from kvstrata.policy import NAMED, KeepTop, MeanSpread, ThreeStates, WindowVote, arkv, keep_top, three_states
from kvstrata.rows import Rows

SHAPE = Shape([LayerSpec(2, 4, 32)] * 2, torch.bfloat16)
READS = ("attention", "pool", "mass", "key_scores", "keys", "values", "statistics")
LEAVING = [name for name in COMPRESSING if name not in ("kivi", "epicache")]  # kivi quantizes what fits
KNAPSACK = Policy("knapsack", ThreeStates(("int4", "int2")), WindowVote(), Knapsack(), formats=("int4", "int2"))
KNAPSACK = replace(KNAPSACK, allocator=Knapsack(("bf16", "int4", "int2")))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is asked of the rows from now on, and the choices of states."""
    found: Counter[str] = Counter()

    def counted(name: str, act: Any) -> Any:
        def counting(*args: Any) -> Any:
            found[name] += 1
            return act(*args)

        return counting

    for name in READS:
        monkeypatch.setattr(Rows, name, counted(name, getattr(Rows, name)))
    for module in (keep_top, three_states):
        monkeypatch.setattr(module, "choose_states", counted("choose_states", module.choose_states))
    return found


def policy_of(name: str) -> Policy:
    return KNAPSACK if name == "knapsack" else NAMED[name]()


@pytest.mark.parametrize("name", [*LEAVING, "knapsack"])
def test_nothing_is_scored_where_everything_fits(name: str, ran: Counter[str]) -> None:
    """Prompt, turn and decoding under a roomy limit: plans fall and count, none asks for a score or chooses states; statistics
    are measured as ever. Under a tight limit every plan does."""
    for budget, kept in (("4MiB", True), ("200KiB", False)):
        ran.clear()
        cache = Cache(SHAPE, budget=budget, policy=policy_of(name))
        seqs, generator = cache.new(2), torch.Generator().manual_seed(0)
        for lengths in ([300, 500], [40, 30], *[[1, 1]] * 64):
            feed(cache, seqs, lengths, generator)
        counts = cache.report().counts
        assert counts["plans"] >= 6
        assert (counts["evicted"] + counts["quantized"] == 0) == kept
        measures = cache.policy.allocator is not None and "oq" in cache.policy.allocator.needs
        assert set(ran) == ({"statistics"} if measures and kept else set()) or not kept
        if measures and kept:
            assert ran["statistics"] == 2  # once in each layer: fewer than 512 tokens came since
        if not kept:
            assert sum(ran.values()) - ran["statistics"] >= counts["plans"]


@pytest.mark.parametrize("name", [*LEAVING, "knapsack"])
def test_later_plans_are_as_if_all_had_been_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is passed while decoding: states, positions and payloads, bit for bit, and the counts."""
    found = []
    for leaves in (True, False):
        for planner in (KeepTop, ThreeStates):
            monkeypatch.setattr(planner, "leaves_what_fits", leaves)
        cache = Cache(SHAPE, budget="200KiB", policy=policy_of(name))
        seqs, generator = cache.new(2), torch.Generator().manual_seed(1)
        for lengths in ([120, 60], *[[1, 1]] * 90, [100, 80], *[[1, 1]] * 16):
            feed(cache, seqs, lengths, generator)
        counts = cache.report().counts
        assert counts["evicted"] + counts["quantized"] > 0
        rows = [x for layer in range(2) for seq in seqs for x in cache.materialize(layer, seq)]
        found.append((rows, counts, *cache.statistics()))
    (rows, counts, values, oq), (others, other_counts, *others_measured) = found
    assert counts == other_counts
    assert all(torch.equal(a, b) for a, b in zip((*rows, values, oq), (*others, *others_measured), strict=True))


def test_scores_that_join_later_ones_are_always_found(ran: Counter[str]) -> None:
    """What a score is now decides what it is later, where they join: such a plan is made."""
    cache = Cache(SHAPE, budget="4MiB", policy=arkv(scorer=MeanSpread(), combine="max"))
    feed(cache, cache.new(), [300], torch.Generator().manual_seed(2))
    assert ran["attention"] > 0


def test_a_sequence_that_fits_is_left_alone_beside_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The long one is planned, as it would be by itself."""
    cache = Cache(SHAPE, budget="300KiB", policy="keydiff")
    seqs, generator = cache.new(2), torch.Generator().manual_seed(3)
    feed(cache, seqs, [700, 40], generator)
    rows, score = [], Rows.key_scores

    def noted(self: Rows, kind: Any) -> torch.Tensor:
        rows.append(list(self._ids))
        return score(self, kind)

    monkeypatch.setattr(Rows, "key_scores", noted)
    for _ in range(cache.policy.interval):
        feed(cache, seqs, [1, 1], generator)
    assert rows == [[seqs[0].id]] * 2
    assert cache.stored_length(0, seqs[1], 0) == 40 + cache.policy.interval


def test_such_a_plan_is_charged() -> None:
    """Of each layer inside the prompt, and after it, as the step reserved them."""
    ledger = Ledger(near="8MiB", plans=100)
    cache = Cache(SHAPE, budget=Budget.bytes("4MiB"), policy="keydiff", ledger=ledger)
    feed(cache, cache.new(), [300], torch.Generator().manual_seed(4))
    assert ledger.report(cache.scope).plans.used == cache.report().counts["plans"] == 4
