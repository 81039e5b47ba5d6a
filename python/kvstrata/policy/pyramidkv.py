"""``pyramidkv``: SnapKV's vote, with more tokens for lower layers (PyramidKV, arXiv 2406.02069)."""

from __future__ import annotations

from typing import Literal

from kvstrata.budget import Pyramid
from kvstrata.policy.base import Policy
from kvstrata.policy.keep_top import KeepTop
from kvstrata.policy.snapkv import WindowVote


def pyramidkv(
    beta: float = 20.0,
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
    """Keeps what the last queries attend to; layers share on a straight line, the last gets 1/beta of the mean.

    beta: of :class:`kvstrata.budget.Pyramid` (20: the code's; the paper searches it); the rest as in ``snapkv``. ValueError
    for parameters.
    Deviations: upstream steps by an integer division and loses or adds tokens, here the sum is exact; and those of ``snapkv``.
    """
    return Policy(
        "pyramidkv",
        KeepTop(),
        WindowVote(queries, kernel, pool, divide),
        Pyramid(beta),
        sinks=sinks,
        window=window,
        interval=interval,
        chunk=chunk,
    )
