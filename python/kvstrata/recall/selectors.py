"""Selectors: which pages does this query read?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvstrata.config import SLOTS

MAX_NEAR_PAGES = (1 << 15) - 1


@dataclass(frozen=True)
class PageMeans:
    """The pages of highest estimated attention mass, by their mean keys.

    budget: tokens that a row reads in a step of one token, sinks and tail included; aggregate: the votes of a KV head's query
    heads, "sum" or "max"; spread_weight: w >= 0 of the second-order term (:func:`kvstrata.ops.score_pages`); near_pages: Near
    copies of Far pages that a row keeps (None: twice what a step reads, at most 32,767); mass_floor: 0..1, steps that are
    estimated to read less of a head's attention mass are counted. ValueError for parameters. Source: IceCache (arXiv
    2604.10539), with the scan of all means that its public fork has instead of the tree.
    """

    budget: int = 256
    aggregate: Literal["sum", "max"] = "sum"
    spread_weight: float = 1.0
    near_pages: int | None = None
    mass_floor: float = 0.9

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"PageMeans: budget is {self.budget}, expected at least 1 token")
        if self.aggregate not in ("sum", "max"):
            raise ValueError(f"PageMeans: aggregate is {self.aggregate!r}, expected 'sum' or 'max'")
        if not 0.0 <= self.spread_weight < float("inf"):
            raise ValueError(f"PageMeans: spread_weight is {self.spread_weight}, expected a finite number >= 0")
        if not 0.0 <= self.mass_floor <= 1.0:
            raise ValueError(f"PageMeans: mass_floor is {self.mass_floor}, expected 0 to 1")

    def reading(self, budget: int) -> PageMeans:
        """The same, with another budget."""
        return replace(self, budget=budget)

    def pages(self, sinks: int, window: int) -> int:
        """K: pages that a row reads beside sinks and tail, the tail at its longest. ValueError where that is none."""
        most = (self.budget - sinks - window - (SLOTS - 1)) // SLOTS
        if most < 1:
            least = sinks + window + 2 * SLOTS - 1
            raise ValueError(
                f"PageMeans: budget is {self.budget} tokens, expected at least {least} (sinks {sinks} + window {window}"
                " + one page)"
            )
        return most

    def native(self, sinks: int, window: int) -> tuple[int, int, float, int]:
        """As the store takes it: pages, Near pages, weight, aggregate. ValueError where Near pages are fewer than are read."""
        pages = self.pages(sinks, window)
        near = min(2 * pages, MAX_NEAR_PAGES) if self.near_pages is None else self.near_pages
        if not pages <= near <= MAX_NEAR_PAGES:
            expected = f"at least the {pages} pages that a step reads and at most {MAX_NEAR_PAGES}"
            raise ValueError(f"PageMeans: near_pages is {near}, expected {expected}")
        return pages, near, self.spread_weight, ("sum", "max").index(self.aggregate)
