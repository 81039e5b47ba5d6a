"""``streaming``: attention sinks and a recent window (StreamingLLM, arXiv 2309.17453).

Deviation: the paper re-numbers positions inside the cache; ours never do, a kept token stays where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstrata.policy.base import EVICTED, FULL, Plan, Policy, Seen


@dataclass(frozen=True)
class SinksAndTail:
    """Keeps the first ``sinks`` tokens and the open tail, evicts what lies between."""

    sinks: int = 4

    def plan(self, seen: Seen) -> Plan:
        kept = seen.open | (seen.positions < self.sinks)
        return Plan(state=torch.where(kept, FULL, EVICTED).to(torch.uint8))


def streaming(sinks: int = 4, window: int | None = None) -> Policy:
    """Sinks and a window of recent tokens.

    sinks: first tokens kept. window: recent tokens kept, a multiple of 16; None takes the largest that the budget holds:
    of C tokens per row, 16 * floor((C - sinks - 15) / 16).
    """
    return Policy("streaming", SinksAndTail(sinks), sinks=sinks, window=window, interval=16, chunk=512)
