"""``keydiff``: keys that differ from the rest stay (KeyDiff, arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvstrata.budget import Uniform
from kvstrata.policy.base import Policy, Seen
from kvstrata.policy.keep_top import KeepTop
from kvstrata.policy.pooling import Pooling


@dataclass(frozen=True)
class KeyDiversity(Pooling):
    """Minus the cosine of a token's key to the mean direction of its row's keys: no query is needed (KeyDiff).

    One anchor per row, never over all heads. Not comparable between heads. kernel, pool, divide: of
    :class:`kvstrata.policy.pooling.Pooling`; 1, no pooling, is the paper's. ValueError for parameters.
    """

    kernel: int = 1
    pool: Literal["avg", "max"] = "avg"
    divide: Literal["present", "kernel"] = "present"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check_pooling()

    def score(self, seen: Seen) -> Tensor:
        assert seen.read is not None
        return self.pooled(seen, seen.read.key_scores("diversity"))


def keydiff(
    *,
    window: int | None = 64,
    window_share: float = 0.2,
    sinks: int = 16,
    interval: int = 64,
    chunk: int = 2048,
) -> Policy:
    """Keeps the keys that point away from the mean of their row, and recent tokens.

    window: recent tokens kept (None: ``window_share`` of what the budget holds per row; paper: .1 to .2); interval, chunk:
    tokens; all three multiples of 16; sinks: first tokens kept (0: paper). ValueError for parameters.
    Deviation: the paper cuts at every block of the prompt and at every step; here at every chunk and ``interval`` tokens.
    """
    return Policy(
        "keydiff",
        KeepTop(),
        KeyDiversity(),
        Uniform(),
        sinks=sinks,
        window=window,
        window_share=window_share,
        interval=interval,
        chunk=chunk,
    )
