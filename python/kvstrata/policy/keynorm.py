"""``keynorm``: keys of small norm stay (L2 norm, arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvstrata.budget import Uniform
from kvstrata.policy.base import Policy, Seen
from kvstrata.policy.keep_top import KeepTop


@dataclass(frozen=True)
class KeyNorm:
    """Minus the Euclidean norm of a token's key: no query is needed. Not comparable between heads."""

    needs: ClassVar[frozenset[str]] = frozenset()
    is_mass: ClassVar[bool] = False

    def score(self, seen: Seen) -> Tensor:
        assert seen.read is not None
        return seen.read.key_scores("norm")


def keynorm(*, window: int = 64, sinks: int = 16, interval: int = 64, chunk: int = 2048) -> Policy:
    """Keeps the keys of the smallest norms, which tend to receive the most attention, and recent tokens.

    window, interval, chunk: tokens, multiples of 16; sinks: first tokens kept (0: paper). ValueError for parameters.
    Deviation: the paper leaves the first two layers whole; here every layer has the same share of the budget.
    """
    return Policy(
        "keynorm", KeepTop(), KeyNorm(), Uniform(), sinks=sinks, window=window, interval=interval, chunk=chunk
    )
