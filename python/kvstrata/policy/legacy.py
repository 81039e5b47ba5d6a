"""What ARKV's published code does, but for its errors: ``arkv(legacy=True)`` (arXiv 2603.08727)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvstrata.config import SLOTS
from kvstrata.ops import choose_states
from kvstrata.policy.arkv import MeanSpread
from kvstrata.policy.base import FULL, STATES, Plan, Seen

TRIM = 0.75
"""Of the tokens before the tail, the part that a plan of decoding keeps (code)."""


@dataclass(frozen=True)
class CodeVotes(MeanSpread):
    """Mean + gamma * variance over the last ``queries`` queries of a prompt; of decoding, the last query alone (code)."""

    spread: Literal["std", "variance"] = "variance"
    divide: Literal["present", "kernel"] = "kernel"

    def score(self, seen: Seen) -> Tensor:
        if seen.prompt:
            return super().score(seen)
        assert seen.read is not None
        return self.pooled(seen, seen.read.attention(1, "mean", 0.0))


@dataclass(frozen=True)
class CodeStates:
    """A prompt is cut to what the budget counts, all of it Full; while decoding, a row that would pass it is trimmed (code).

    quantized: the format. With C tokens that a plan may leave in a row, ``allowance.most``, or fewer where its bytes hold fewer
    Full ones, w of them in its tail and n > C - w before that: in a prompt the C - w of the highest scores stay Full. While
    decoding, floor(TRIM * n) stay, round(r * (C - w)) - w of them Full, r the allocator's, and the others quantized; all in
    whole pages. Where r is large nothing is quantized. ValueError for an unknown format, without scores, and without a budget
    that counts tokens.
    """

    quantized: str = "int8"
    counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.quantized not in STATES:
            raise ValueError(f"CodeStates: quantized is {self.quantized!r}, expected one of {', '.join(STATES)}")

    def plan(self, seen: Seen) -> Plan:
        allowance, protect = seen.allowance, seen.protected
        if allowance is None or allowance.most is None:
            raise ValueError("CodeStates: there is no count, expected a budget in tokens with count=True")
        if seen.score is None:
            raise ValueError("CodeStates: there are no scores, expected a policy with a scorer")
        tail = (seen.stored & protect).sum(1)
        before = (seen.stored & ~protect).sum(1)
        whole = torch.div(allowance.bytes.clamp_min(0), allowance.page_bytes[FULL], rounding_mode="floor") * SLOTS
        room = torch.minimum((allowance.most - tail).clamp_min(0), whole)
        if seen.prompt:
            keep = full = room
        else:
            keep = (TRIM * before).long()
            r = torch.ones(len(before)) if allowance.full_share is None else allowance.full_share
            full = torch.minimum(((r * room).round().long() - tail).clamp_min(0), keep)
        pages = torch.div(full, SLOTS, rounding_mode="floor")
        rest = torch.div(keep, SLOTS, rounding_mode="floor") - pages
        state = choose_states(seen.score, seen.state, seen.positions, protect, pages, rest, STATES[self.quantized])
        return Plan(torch.where((before > room).unsqueeze(1), state, seen.state))
