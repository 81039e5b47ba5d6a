"""What planners share that drop or quantize token by token; the choice itself is ``ops.choose_states``.

Survivors are packed by format, 16 to a page, so p pages hold 16 * p tokens of one format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata.config import SLOTS
from kvstrata.policy.base import EVICTED


def at_most(state: Tensor, score: Tensor, positions: Tensor, protect: Tensor, most: int) -> Tensor:
    """The planned states u8 [R, N] with no more than ``most`` tokens kept in any row, in whatever state.

    score: f32 [R, N]; positions: i32 [R, N], -1 where no token is; protect: bool [R, N]. The unprotected tokens of the lowest
    scores go, of equal ones the newest, first those whose score is not finite; protected ones stay even where they are more.
    """
    kept = (positions >= 0) & (state != EVICTED)
    among = kept & ~protect
    drop = torch.minimum((kept.sum(1) - most).clamp_min(0), among.sum(1))
    if not bool((drop > 0).any()):
        return state
    worth = torch.where(score.isfinite(), score, float("-inf")).masked_fill(~among, float("inf"))
    newest = positions.argsort(dim=1, descending=True)  # positions of a row differ, where they are any
    order = newest.gather(1, worth.gather(1, newest).argsort(dim=1, stable=True))
    goes = torch.arange(state.shape[1], device=state.device) < drop.unsqueeze(1)
    return state.masked_fill(torch.zeros_like(among).scatter_(1, order, goes), EVICTED)


def fall(now: Tensor, target: Tensor) -> Tensor:
    """The state that a token takes which is ``now`` and shall be ``target``: the one of fewer bits, u8 as ``now``."""
    gone = (now == EVICTED) | (target == EVICTED)
    return torch.where(gone, EVICTED, torch.maximum(now, target)).to(torch.uint8)  # states count up as bits fall


def pages_of(tokens: Tensor) -> Tensor:
    """Pages for so many tokens of one format, i64 as ``tokens``."""
    return torch.div(tokens + SLOTS - 1, SLOTS, rounding_mode="floor")
