"""``h2o``: the heavy hitters, tokens that have received the most attention so far (H2O, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvstrata.budget import Uniform
from kvstrata.policy.base import Policy, Seen
from kvstrata.policy.keep_top import KeepTop


@dataclass(frozen=True)
class AccumulatedMass:
    """The attention mass that a token has received from all queries so far, mean over a KV head's query heads (H2O).

    per_query: divided by the queries that could see the token, which removes the bias to old tokens (ours).
    Costs a score pass over each prompt chunk.
    """

    per_query: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    is_mass: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        assert seen.read is not None
        mass = seen.read.mass()
        if not self.per_query:
            return mass
        return mass / (seen.lengths.unsqueeze(1) - seen.positions).clamp_min(1)


def h2o(
    per_query: bool = False,
    *,
    window: int | None = None,
    window_share: float = 0.5,
    sinks: int = 16,
    interval: int = 64,
    chunk: int = 2048,
) -> Policy:
    """Keeps heavy hitters and recent tokens, half of the budget each.

    per_query: of :class:`AccumulatedMass`; window: recent tokens kept (None: ``window_share`` of what the budget holds per
    row); interval, chunk: tokens; all three multiples of 16; sinks: first tokens kept (0: paper). ValueError for parameters.
    Deviations: the paper evicts one token per step; here every ``interval`` tokens (16: the nearest). Under a limit that sinks,
    prompt chunks and tables take much of, both halves are of what is left; under a small one in bytes, which sequences yet to
    come share, the window is smaller than that.
    """
    return Policy(
        "h2o",
        KeepTop(),
        AccumulatedMass(per_query),
        Uniform(),
        sinks=sinks,
        window=window,
        window_share=window_share,
        interval=interval,
        chunk=chunk,
    )
