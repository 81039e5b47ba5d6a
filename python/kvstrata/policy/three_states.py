"""``ThreeStates``: Full, Quantized or Evicted, token by token (ARKV, arXiv 2603.08727)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstrata.config import SLOTS
from kvstrata.ops import choose_states
from kvstrata.policy.base import EVICTED, FULL, STATES, Allowance, Plan, Seen
from kvstrata.policy.choose import fall, pages_of

_ROUNDING = 1e-9
"""Fractions of a page that the division by float64 may lose, as in the budget's splitter."""


@dataclass(frozen=True)
class ThreeStates:
    """The highest scores stay Full, the next are quantized, the rest is evicted.

    quantized: the format, "int8", "int4" or "int2"; cover: evict nothing as long as all fits quantized (ours);
    full_share: the share r in 0..1 of a row's pages that stay Full where not all fit, for allocators that say none.

    A row with b bytes beside its protected tokens, page bytes c_F and c_Q, n tokens in M = ceil(n / 16) pages:
    1. M * c_F <= b: all stay as they are. 2. cover and M * c_Q <= b: nothing is evicted,
    p_F = floor((b - M * c_Q) / (c_F - c_Q)). 3. Else p_F = floor(r * b / (r * c_F + (1 - r) * c_Q)). What p_F pages, of
    those that tokens still Full can fill, leave of b buys quantized pages.
    Where the allocator decides token by token, that is what happens. No allowance: everything stays. ValueError for
    parameters, and without scores. Deviation: the code counts tokens in any state, and never decodes what it has quantized;
    here bytes count, and a quantized token is still attended to.
    """

    quantized: str = "int4"
    cover: bool = True
    full_share: float = 1.0

    def __post_init__(self) -> None:
        if self.quantized not in STATES:
            raise ValueError(f"ThreeStates: quantized is {self.quantized!r}, expected one of {', '.join(STATES)}")
        if not 0 <= self.full_share <= 1:
            raise ValueError(f"ThreeStates: full_share is {self.full_share}, expected 0 to 1")

    def plan(self, seen: Seen) -> Plan:
        allowance, protect = seen.allowance, seen.protected
        if allowance is None:
            return Plan()
        if allowance.formats is not None:
            kept = torch.where(protect, seen.state, fall(seen.state, allowance.formats))
            return Plan(state=torch.where(seen.stored, kept, EVICTED).to(torch.uint8))
        if seen.score is None:
            raise ValueError("ThreeStates: there are no scores, expected a policy with a scorer")
        movable = seen.stored & ~protect
        full = (movable & (seen.state == FULL)).sum(1)
        full_pages, quant_pages = self.pages(allowance, full, movable.sum(1))
        target = STATES[self.quantized]
        state = choose_states(seen.score, seen.state, seen.positions, protect, full_pages, quant_pages, target)
        return Plan(state=state)

    def pages(self, allowance: Allowance, full: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pages that stay Full and pages that are quantized: i64 [R] each.

        full: i64 [R], unprotected tokens that are still Full; tokens: i64 [R], all unprotected ones.
        """
        b = allowance.bytes.clamp_min(0)
        c_full, c_quant = allowance.page_bytes[FULL], allowance.page_bytes[STATES[self.quantized]]
        most = pages_of(tokens)
        covering = _whole((b - most * c_quant), max(c_full - c_quant, 1))
        covers = (most * c_quant <= b) & self.cover
        all_full = most * c_full <= b
        wanted = torch.where(all_full, most, torch.where(covers, covering, self._shared(allowance, b, c_full, c_quant)))
        used = torch.minimum(wanted, pages_of(full))
        # Tokens still Full that do not fill their last page can cost others, quantized before, their place: rather than
        # evict, quantize those few.
        short = used * c_full + pages_of(tokens - torch.minimum(full, used * SLOTS)) * c_quant > b
        used = torch.where(short & (all_full | covers), torch.minimum(used, _whole(full, SLOTS)), used)
        return used, _whole(b - used * c_full, c_quant)

    def _shared(self, allowance: Allowance, b: Tensor, c_full: int, c_quant: int) -> Tensor:
        """Full pages where not all fit: floor(r * b / (r * c_F + (1 - r) * c_Q)), i64 [R]."""
        share = allowance.full_share
        r = torch.full_like(b, self.full_share, dtype=torch.float64) if share is None else share.to(torch.float64)
        pages = (r * b / (r * c_full + (1 - r) * c_quant) + _ROUNDING).floor().to(torch.int64)
        return torch.minimum(pages, _whole(b, c_full))


def _whole(values: Tensor, by: int) -> Tensor:
    return torch.div(values, by, rounding_mode="floor")
