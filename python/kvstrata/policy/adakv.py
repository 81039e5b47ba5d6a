"""``adakv``: SnapKV's vote, with more tokens for heads that look widely (Ada-KV, arXiv 2407.11550)."""

from __future__ import annotations

from typing import Literal

from kvstrata.budget import AdaptiveHeads
from kvstrata.policy.base import Policy
from kvstrata.policy.keep_top import KeepTop
from kvstrata.policy.snapkv import WindowVote


def adakv(
    alpha: float = 0.2,
    normalize: bool = False,
    queries: int = 32,
    kernel: int = 7,
    pool: Literal["avg", "max"] = "max",
    divide: Literal["present", "kernel"] = "present",
    *,
    window: int = 64,
    sinks: int = 16,
    interval: int = 64,
    chunk: int = 2048,
) -> Policy:
    """Keeps what the last queries attend to; a layer's heads share by where its highest votes fall.

    alpha, normalize: of :class:`kvstrata.budget.AdaptiveHeads` (.2: paper); the rest as in ``snapkv`` (32 queries, max over
    7, window 32: paper). ValueError for parameters.
    Deviations: upstream rounds per head and its sum drifts, here it is exact; and those of ``snapkv``.
    """
    return Policy(
        "adakv",
        KeepTop(),
        WindowVote(queries, kernel, pool, divide),
        AdaptiveHeads(alpha, normalize),
        sinks=sinks,
        window=window,
        interval=interval,
        chunk=chunk,
    )
