"""What planners share that drop or quantize token by token; the choice itself is ``ops.choose_states``.

Survivors are packed by format, 16 to a page, so p pages hold 16 * p tokens of one format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata.config import SLOTS
from kvstrata.policy.base import EVICTED


def fall(now: Tensor, target: Tensor) -> Tensor:
    """The state that a token takes which is ``now`` and shall be ``target``: the one of fewer bits, u8 as ``now``."""
    gone = (now == EVICTED) | (target == EVICTED)
    return torch.where(gone, EVICTED, torch.maximum(now, target)).to(torch.uint8)  # states count up as bits fall


def pages_of(tokens: Tensor) -> Tensor:
    """Pages for so many tokens of one format, i64 as ``tokens``."""
    return torch.div(tokens + SLOTS - 1, SLOTS, rounding_mode="floor")
