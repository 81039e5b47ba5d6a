"""``icecache``: all tokens in pages by meaning, archived; each step reads a few hundred (IceCache, arXiv 2604.10539)."""

from __future__ import annotations

from typing import Literal

from kvstrata.policy.base import Policy


def icecache(
    budget: int = 256,
    *,
    sinks: int = 32,
    window: int = 16,
    dense_layers: tuple[int, ...] = (),
    state: str = "full",
    near_pages: int | None = None,
    aggregate: Literal["sum", "max"] = "sum",
    spread_weight: float = 1.0,
    reuse: int = 1,
    segment: int = 4096,
    segment_min: int = 1024,
    interval: int = 128,
    chunk: int = 2048,
) -> Policy:
    """Nothing is lost: what has left the tail is clustered into pages and archived; a step reads those that its query needs.

    budget: tokens read per row and step, of which sinks and window, both multiples of 16, are always read: with 256, 12 pages;
    dense_layers: layers that read all and keep it Near; state, segment, segment_min: of
    :class:`kvstrata.recall.Archive`; near_pages, aggregate, spread_weight, reuse: of :class:`kvstrata.recall.SplitMeans`;
    interval,
    chunk: tokens between plans and between cuts of a prompt, multiples of 16. ValueError for parameters.

    Deviations: the paper indexes with a tree of random projections and token by token; here segments are clustered by k-means
    and the means of the parts of all pages are scanned. Its first two layers are dense and not counted; here none is, and all
    bytes count. A step of several tokens reads everything.
    """
    from kvstrata.recall import Archive, KMeans, SplitMeans  # which itself imports policy.base

    return Policy(
        "icecache",
        Archive(KMeans(), state, segment, segment_min),
        selector=SplitMeans(
            budget=budget, aggregate=aggregate, spread_weight=spread_weight, near_pages=near_pages, reuse=reuse
        ),
        formats=() if state == "full" else (state,),
        dense_layers=tuple(dense_layers),
        sinks=sinks,
        window=window,
        interval=interval,
        chunk=chunk,
    )
