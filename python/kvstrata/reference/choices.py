"""What stored tokens become: by rank and pages."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata.reference.pages import SLOTS

EVICTED, FULL, INT2 = 0, 1, 4


def choose_states(
    score: Tensor,
    now: Tensor,
    positions: Tensor,
    protect: Tensor,
    full_pages: Tensor,
    quant_pages: Tensor,
    quantized_state: int,
) -> Tensor:
    """The state of each token: u8 [R, N], 0 where positions is -1.

    score f32, now u8, positions i32, protect bool: [R, N]; full_pages, quant_pages i64 [R]; quantized_state 2, 3 or 4.
    By rank, 16 * full_pages tokens that are Full stay Full, others become max(now, quantized_state) as long as quant_pages
    hold them, the rest is Evicted. The protected stay as they are.
    """
    movable = (positions >= 0) & (now != EVICTED) & ~protect
    order = ranks(score, positions)
    stays = fit(order, movable & (now == FULL), now, full_pages)
    target = now.clamp_min(quantized_state)  # states count up as bits fall
    taken = fit(order, movable & ~stays, target, quant_pages)
    planned = torch.where(stays, FULL, torch.where(taken, target, EVICTED))
    return torch.where(movable, planned, torch.where(positions >= 0, now, EVICTED)).to(torch.uint8)


def ranks(score: Tensor, positions: Tensor) -> Tensor:
    """Indices of each row's tokens, best first: i64 [R, N]. Score descending, what is not finite last; ties the lower
    position, then the lower index."""
    by = positions.sort(dim=1, stable=True).indices
    finite = torch.where(score.isfinite(), score, float("-inf")).gather(1, by)
    return by.gather(1, finite.sort(dim=1, descending=True, stable=True).indices)


def fit(order: Tensor, among: Tensor, kind: Tensor, pages: Tensor) -> Tensor:
    """Those of the tokens ``among`` that fit into so many pages, best first: bool [R, N].

    order: i64 [R, N] as `ranks` gives it; among: bool [R, N]; kind: u8 [R, N], 1 to 4 for each of them; pages: i64 [R].
    Tokens of different kinds do not share a page. The longest run of ranks that fits begins pages, which are then filled.
    """
    ordered = torch.where(among, kind, EVICTED).gather(1, order)
    kinds = range(FULL, INT2 + 1)
    upto = torch.stack([(ordered == k).cumsum(1) for k in kinds])  # tokens of each kind up to a rank: [kinds, R, N]
    fits = _pages(upto).sum(0) <= pages.unsqueeze(1)
    taken = torch.zeros_like(among)
    for k, count in zip(kinds, upto, strict=True):
        mine = ordered == k
        room = SLOTS * _pages((mine & fits).sum(1))
        taken |= mine & (count <= room.unsqueeze(1))
    return torch.zeros_like(among).scatter_(1, order, taken)


def _pages(tokens: Tensor) -> Tensor:
    return torch.div(tokens + SLOTS - 1, SLOTS, rounding_mode="floor")
