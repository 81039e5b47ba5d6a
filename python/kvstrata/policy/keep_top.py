"""``KeepTop``: Full or Evicted, the planner of the eviction methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstrata.ops import choose_states
from kvstrata.policy.base import EVICTED, FULL, INT2, Plan, Seen
from kvstrata.policy.choose import fall


@dataclass(frozen=True)
class KeepTop:
    """Keeps the tokens of the highest scores Full, in whole pages, and evicts the rest.

    A row with b bytes beside its protected tokens keeps 16 * floor(b / c_F) tokens, c_F the bytes of a Full page. Where the
    allocator decides token by token, that is what happens. No allowance: everything stays. Its tokens are Full or gone: one
    that another policy has quantized is evicted. ValueError without scores, and for an allocator that names a quantized
    format.
    """

    leaves_what_fits: ClassVar[bool] = True

    def plan(self, seen: Seen) -> Plan:
        allowance = seen.allowance
        if allowance is None:
            return Plan()
        if allowance.formats is not None:
            if (allowance.formats > FULL).any():
                raise ValueError("KeepTop: the allocator names a quantized format, expected Full and Evicted only")
            chosen = fall(seen.state, allowance.formats)
            kept = torch.where(seen.protected, seen.state, chosen)
            return Plan(state=torch.where(seen.stored, kept, EVICTED).to(torch.uint8))
        if seen.score is None:
            raise ValueError("KeepTop: there are no scores, expected a policy with a scorer")
        pages = torch.div(allowance.bytes.clamp_min(0), allowance.page_bytes[FULL], rounding_mode="floor")
        none = torch.zeros_like(pages)
        return Plan(
            state=choose_states(seen.score, seen.state, seen.positions, seen.protected, pages, none, INT2),
        )
