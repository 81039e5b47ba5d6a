"""``quest``: pages in the order of position, ranked by the bounds of their keys (Quest, arXiv 2406.10774)."""

from __future__ import annotations

from typing import Literal

from kvstrata.policy.base import Policy


def quest(
    budget: int = 1024,
    *,
    sinks: int = 16,
    window: int = 16,
    dense_layers: tuple[int, ...] = (0, 1),
    state: str = "full",
    near_pages: int | None = None,
    aggregate: Literal["sum", "max"] = "max",
    interval: int = 128,
    chunk: int = 2048,
) -> Policy:
    """Reads the pages whose largest logit may be highest; nothing is lost.

    budget: tokens read per row and step, of which sinks and window, both multiples of 16, are always read; dense_layers: layers
    that read all and keep it Near, the first two in the paper; state: of :class:`kvstrata.recall.Archive`; near_pages,
    aggregate: of :class:`kvstrata.recall.Bounds`; interval, chunk: multiples of 16. ValueError for parameters.

    Deviations: the paper keeps all pages near the compute and reads fewer of them; here they are archived, where there is a Far
    tier. It ranks for each query head; here a KV head's query heads vote together.
    """
    from kvstrata.recall import Archive, Bounds, Position  # which itself imports policy.base

    return Policy(
        "quest",
        Archive(Position(), state),
        selector=Bounds(budget, near_pages=near_pages, aggregate=aggregate),
        formats=() if state == "full" else (state,),
        dense_layers=tuple(dense_layers),
        sinks=sinks,
        window=window,
        interval=interval,
        chunk=chunk,
    )
