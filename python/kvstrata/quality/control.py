"""``random``: the control that shows that a task can fail. Keeps sinks, tail and random pages of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstrata.budget import Budget
from kvstrata.budget.protect import concretise
from kvstrata.config import SLOTS, Shape
from kvstrata.policy import Plan, Policy, Seen
from kvstrata.policy.base import EVICTED, FULL

WINDOW = 64


@dataclass(frozen=True)
class RandomPages:
    """Keeps whole pages' worth of positions, drawn anew for each row by a hash: the same in every run.

    tokens: kept of each row beside its sinks and its open tail.
    """

    tokens: int
    sinks: int
    seed: int = 0

    def plan(self, seen: Seen) -> Plan:
        guarded = seen.open | (seen.positions < self.sinks)
        drawn = _draw(seen, self.seed).masked_fill(guarded | (seen.positions < 0), -1)
        order = drawn.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
        kept = guarded | ((rank < self.tokens) & (drawn >= 0))
        return Plan(state=torch.where(kept, FULL, EVICTED).to(torch.uint8))


def _draw(seen: Seen, seed: int) -> torch.Tensor:
    """i64 [R, N] in [0, 2^32): one number per layer, row and 16 positions."""
    rows = torch.arange(seen.positions.shape[0])[:, None]
    x = (seen.positions.long() // SLOTS) * 0x9E3779B1 + rows * 0x85EBCA77 + (seen.layer + 64 * seed + 1) * 0xC2B2AE3D
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> shift)) * factor
    return (x ^ (x >> 15)) & 0xFFFFFFFF


def random(shape: Shape, budget: Budget, sinks: int = 4, seed: int = 0) -> Policy:
    """What ``budget`` (tokens or bytes) holds for one sequence, beside sinks and a tail of 64 tokens.

    ValueError where it holds less than that.
    """
    open_ended = Policy("random", RandomPages(0, sinks), sinks=sinks, window=None, interval=16, chunk=128)
    window = concretise(open_ended, shape, budget, batch=1).window
    assert window is not None
    window -= 2 * SLOTS  # drawn pages are cut where the sinks end and where the count does
    if window < WINDOW:
        raise ValueError(f"budget: {budget} holds {window} tokens per row beside {sinks} sinks, expected >= {WINDOW}")
    planner = RandomPages(window - WINDOW, sinks, seed)
    return Policy("random", planner, sinks=sinks, window=WINDOW, interval=16, chunk=128)
