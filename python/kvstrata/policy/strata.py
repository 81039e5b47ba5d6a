"""``strata``: nothing is lost; Full, then quantized and archived by attention mass, and recalled by summaries (ours)."""

from __future__ import annotations

from kvstrata.budget import Uniform
from kvstrata.policy.base import Policy


def strata(
    budget: int = 256,
    *,
    state: str = "int8",
    queries: int = 8,
    sinks: int = 32,
    window: int = 16,
    near_pages: int | None = None,
    segment: int = 4096,
    segment_min: int = 1024,
    interval: int = 128,
    chunk: int = 2048,
) -> Policy:
    """Nothing is lost, within any Near budget that holds sinks, tails, summaries and what a step reads.

    What has left the tail is clustered into pages. Pages of high attention mass stay Full and Near, as many as the cache's
    budget in bytes, or in a share of the dense cache's, pays for; the others are quantized and archived, and a step reads the
    pages that its query needs, wherever they lie, through Near copies. A cache budget in tokens archives all, as ``icecache``.

    budget: tokens read per row and step, sinks and window included; state: of archived tokens, "full", "int8", "int4" or
    "int2"; queries: last ones by which pages are ranked; sinks, window, interval, chunk: multiples of 16; near_pages, segment,
    segment_min: as in :func:`kvstrata.policy.icecache`. ValueError for parameters.
    """
    from kvstrata.recall import KMeans, Ladder, PageMass, SplitMeans  # which itself imports policy.base

    return Policy(
        "strata",
        Ladder(KMeans(), state, segment, segment_min),
        PageMass(queries),
        Uniform(),
        selector=SplitMeans(budget=budget, near_pages=near_pages),
        formats=() if state == "full" else (state,),
        sinks=sinks,
        window=window,
        interval=interval,
        chunk=chunk,
    )
