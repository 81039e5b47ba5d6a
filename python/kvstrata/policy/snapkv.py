"""``snapkv``: the last queries of the prompt vote for what stays (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvstrata.budget import Uniform
from kvstrata.policy.base import Policy, Seen
from kvstrata.policy.keep_top import KeepTop
from kvstrata.policy.pooling import Pooling


@dataclass(frozen=True)
class WindowVote(Pooling):
    """The mean attention of a row's last queries to each token, pooled over its neighbours (SnapKV).

    queries: how many of the last, >= 1; fewer are used where fewer were seen. kernel, pool, divide: of
    :class:`kvstrata.policy.pooling.Pooling`. Pooled for each query head, then the mean over a KV head's. ValueError for
    parameters.
    Deviation: upstream repeats K and chooses per query head; here a KV head's query heads vote together.
    """

    queries: int = 64
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"
    divide: Literal["present", "kernel"] = "present"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_pooling()
        if self.queries < 1:
            raise ValueError(f"{type(self).__name__}: queries is {self.queries}, expected >= 1")

    def score(self, seen: Seen) -> Tensor:
        assert seen.read is not None
        votes = seen.read.attention(self.queries, *self._spread())
        return self.pooled(seen, votes)

    def _spread(self) -> tuple[Literal["mean", "std", "variance"], float]:
        """What is added to the mean over the queries, and its weight."""
        return "mean", 0.0


def snapkv(
    queries: int = 64,
    kernel: int = 5,
    pool: Literal["avg", "max"] = "avg",
    divide: Literal["present", "kernel"] = "present",
    *,
    window: int = 64,
    sinks: int = 16,
    interval: int = 64,
    chunk: int = 2048,
) -> Policy:
    """Keeps what the last queries attend to, the same number of tokens in every layer and head.

    queries, kernel, pool, divide: of :class:`WindowVote` (the paper's LongBench runs: 32, 7, "max", "kernel"); window: recent
    tokens kept, at least ``queries``; interval, chunk: tokens; all three multiples of 16; sinks: first tokens kept (0: paper).
    ValueError for parameters.
    Deviations: upstream chooses once, after the prompt, and lets the cache grow while decoding; here every ``interval``
    tokens are planned again, so the budget holds. Long prompts are cut chunk by chunk.
    """
    return Policy(
        "snapkv",
        KeepTop(),
        WindowVote(queries, kernel, pool, divide),
        Uniform(),
        sinks=sinks,
        window=window,
        interval=interval,
        chunk=chunk,
    )
