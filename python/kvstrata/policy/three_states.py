"""``ThreeStates``: Full, Quantized or Evicted, token by token (ARKV, arXiv 2603.08727)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvstrata.config import SLOTS
from kvstrata.ops import choose_states
from kvstrata.policy.base import EVICTED, FULL, STATES, Allowance, Plan, Seen
from kvstrata.policy.choose import fall, pages_of

HELD = 1 / 5
"""Of several formats, the share of all tokens that a row must hold in one of more bits: below it, answers lack tokens rather
than precision (``bench/quality/ablations.py``)."""
_ROUNDING = 1e-9
"""Fractions of a page that the division by float64 may lose, as in the budget's splitter."""


@dataclass(frozen=True)
class ThreeStates:
    """The highest scores stay Full, the next are quantized, the rest is evicted.

    quantized: the format, "int8", "int4" or "int2", or several, most bits first: a row takes the first one in which its bytes
    hold at least ``held`` of the tokens that its sequence has seen, else the last, and none of more bits than tokens that it
    holds (ours); held: 0..1; cover: evict nothing as
    long as all fits quantized (ours); full_share: the share r in 0..1 of a row's pages that stay Full where not all fit, for
    allocators that say none.

    A row with b bytes beside its protected tokens, page bytes c_F and c_Q, n tokens in M = ceil(n / 16) pages:
    1. M * c_F <= b: all stay as they are. 2. cover and M * c_Q <= b: nothing is evicted,
    p_F = floor((b - M * c_Q) / (c_F - c_Q)). 3. Else p_F = floor(r * b / (r * c_F + (1 - r) * c_Q)). What p_F pages, of
    those that tokens still Full can fill, leave of b buys quantized pages.
    Where the allocator decides token by token, that is what happens. No allowance: everything stays. ValueError for
    parameters, and without scores. Deviation: the code counts tokens in any state, and never decodes what it has quantized;
    here bytes count, and a quantized token is still attended to.
    """

    quantized: str | tuple[str, ...] = "int4"
    cover: bool = True
    full_share: float = 1.0
    held: float = HELD
    leaves_what_fits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        states = [STATES.get(f, 0) for f in self.formats]
        if 0 in states or not states or states != sorted(set(states)):
            some = f"expected one of {', '.join(STATES)}, or some of them in this order"
            raise ValueError(f"ThreeStates: quantized is {self.quantized!r}, {some}")
        for name in ("full_share", "held"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ThreeStates: {name} is {getattr(self, name)}, expected 0 to 1")

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that it quantizes to."""
        return (self.quantized,) if isinstance(self.quantized, str) else self.quantized

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
        tokens, target = movable.sum(1), self.target(allowance, seen.lengths)
        if (
            len(self.formats) > 1
        ):  # bits only fall: a row stays in the coarsest of them that it holds, and is counted so
            target = torch.maximum(target, torch.where(movable, seen.state, EVICTED).amax(1).long())
        state = torch.zeros_like(seen.state)
        for f in sorted(set(target.tolist())):
            # Rows of one length and share, as those of a layer mostly are, have one format: no copies then.
            rows = slice(None) if bool((target == f).all()) else (target == f).nonzero().flatten()
            few = _of_rows(allowance, rows)
            pages = self.pages(few, full[rows], tokens[rows], f)
            state[rows] = choose_states(
                seen.score[rows], seen.state[rows], seen.positions[rows], protect[rows], *pages, f
            )
        return Plan(state=state)

    def target(self, allowance: Allowance, lengths: Tensor) -> Tensor:
        """What each row's tokens become that do not stay Full: i64 [R], as in a plan's state column.

        lengths: i64 [R], tokens that each row's sequence has seen.
        """
        target = torch.full_like(lengths, STATES[self.formats[-1]])
        for name in reversed(self.formats[:-1]):
            room = _whole(allowance.bytes.clamp_min(0), allowance.page_bytes[STATES[name]]) * SLOTS
            target = torch.where(room >= self.held * lengths, STATES[name], target)
        return target

    def pages(self, allowance: Allowance, full: Tensor, tokens: Tensor, quantized: int) -> tuple[Tensor, Tensor]:
        """Pages that stay Full and pages that are quantized: i64 [R] each.

        full: i64 [R], unprotected tokens that are still Full; tokens: i64 [R], all unprotected ones; quantized: the state of
        the others.
        """
        b = allowance.bytes.clamp_min(0)
        c_full, c_quant = allowance.page_bytes[FULL], allowance.page_bytes[quantized]
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


def _of_rows(allowance: Allowance, rows: Tensor | slice) -> Allowance:
    share = allowance.full_share
    return replace(allowance, bytes=allowance.bytes[rows], full_share=None if share is None else share[rows])
