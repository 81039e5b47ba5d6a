"""Selectors: which pages does this query read?"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, Literal, Self

from kvstrata.config import SLOTS, Unsupported
from kvstrata.policy.base import Reading, SummaryKind

MAX_NEAR_PAGES = (1 << 15) - 1
MAX_FLAT_PAGES = 1 << 30
LEAST_MASS = 1e-30
"""A threshold that any page reaches: 0 is none to the store."""


@dataclass(frozen=True)
class PageVotes:
    """The pages of highest vote, as many as a budget in tokens holds beside sinks and tail: what selectors have in common.

    budget: tokens that a row reads in a step of one token, sinks and tail included; aggregate: the votes of a KV head's query
    heads, "sum" or "max"; near_pages: Near copies of Far pages that a row keeps (None: twice what a step reads, at most
    32,767; 0: none, each step reads its pages through the ring), fewer where a limit is short; mass_floor: 0..1, steps that are
    estimated to read less of a head's attention mass are counted; audit: of so many steps, one row of one layer is read whole,
    so that its true share stands beside the estimate (0: none); reuse: of so many indexed layers, which are planned
    alike, the first selects, and the others read the same pages (IceCache, "r"); nothing is estimated of what they do not read.
    ValueError for parameters.
    """

    budget: int = 256
    _: KW_ONLY
    aggregate: Literal["sum", "max"] = "sum"
    near_pages: int | None = None
    mass_floor: float = 0.9
    audit: int = 0
    reuse: int = 1

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"{self._name}: budget is {self.budget}, expected at least 1 token")
        if self.aggregate not in ("sum", "max"):
            raise ValueError(f"{self._name}: aggregate is {self.aggregate!r}, expected 'sum' or 'max'")
        self._check_share("mass_floor")
        if self.audit < 0:
            raise ValueError(f"{self._name}: audit is {self.audit}, expected at least 0 steps")
        if self.reuse < 1:
            raise ValueError(f"{self._name}: reuse is {self.reuse}, expected at least 1 layer")

    def reading(self, budget: int) -> Self:
        """The same, with another budget."""
        return replace(self, budget=budget)

    def pages(self, sinks: int, window: int) -> int:
        """K: pages that a row reads beside sinks and tail, the tail at its longest. ValueError where that is none."""
        most = (self.budget - sinks - window - (SLOTS - 1)) // SLOTS
        if most < 1:
            least = sinks + window + 2 * SLOTS - 1
            raise ValueError(
                f"{self._name}: budget is {self.budget} tokens, expected at least {least} (sinks {sinks} + window {window}"
                " + one page)"
            )
        return most

    def native(self, sinks: int, window: int) -> Reading:
        """As the store takes it. ValueError where Near pages are fewer than are read, or could not be as many."""
        pages = self.pages(sinks, window)
        if self.near_pages is None and pages > MAX_NEAR_PAGES:
            most = sinks + window + SLOTS * (MAX_NEAR_PAGES + 2) - 2
            raise ValueError(
                f"{self._name}: budget is {self.budget} tokens, expected at most {most}, {MAX_NEAR_PAGES} pages, or"
                " near_pages=0"
            )
        near = min(2 * pages, MAX_NEAR_PAGES) if self.near_pages is None else self.near_pages
        if near and not pages <= near <= MAX_NEAR_PAGES:
            expected = f"0, or at least the {pages} pages that a step reads and at most {MAX_NEAR_PAGES}"
            raise ValueError(f"{self._name}: near_pages is {near}, expected {expected}")
        aggregate = ("sum", "max").index(self.aggregate)
        return self._read(Reading(pages, near, aggregate=aggregate, audit=self.audit, reuse=self.reuse))

    def _read(self, reading: Reading) -> Reading:
        """What the selector has of its own."""
        return reading

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_weight(self, weight: float) -> None:
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"{self._name}: spread_weight is {weight}, expected a finite number >= 0")

    def _check_share(self, name: str) -> None:
        if not 0.0 <= getattr(self, name) <= 1.0:
            raise ValueError(f"{self._name}: {name} is {getattr(self, name)}, expected 0 to 1")


@dataclass(frozen=True, kw_only=True)
class PageMeans(PageVotes):
    """The pages of highest estimated attention mass, by their mean keys.

    spread_weight: w >= 0 of the second-order term (:func:`kvstrata.ops.score_pages`); estimate: 0..1, the share of the pages
    that are not read which stand in by their mean values, each as so many tokens of its estimated logit, the best first
    (:func:`kvstrata.ops.estimate`; RetroInfer): pages with folded or dropped tokens never do; flat_pages: where a row has more,
    groups of 32 pages that follow each other are ranked first, by the means of their means, and only the share ``expand`` of
    them, 0..1, at least 4, is looked into. The rest as in :class:`PageVotes`. Source: IceCache (arXiv 2604.10539), with the
    scan of means that its public fork has instead of the tree.
    """

    spread_weight: float = 1.0
    estimate: float = 0.0
    flat_pages: int = 16_384
    expand: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_weight(self.spread_weight)
        self._check_share("estimate")
        if self.estimate and self.reuse > 1:
            raise Unsupported(
                f"{self._name}: estimate is {self.estimate} with reuse {self.reuse}, expected 0 or reuse 1"
            )
        self._check_share("expand")
        if not 0 <= self.flat_pages <= MAX_FLAT_PAGES:
            raise ValueError(
                f"{self._name}: flat_pages is {self.flat_pages}, expected 0 (all rows have groups) to {MAX_FLAT_PAGES}"
            )

    @property
    def kind(self) -> SummaryKind:
        """Of the summaries that it ranks by."""
        return "mean_value" if self.estimate else "mean"

    def _read(self, reading: Reading) -> Reading:
        reading = reading._replace(kind=self.kind, weight=self.spread_weight, estimate=self.estimate)
        return reading._replace(flat_pages=self.flat_pages, expand=self.expand)


@dataclass(frozen=True, kw_only=True)
class SplitMeans(PageVotes):
    """The pages of highest estimated attention mass, by the mean keys of parts of each (ours).

    A key that is unlike the others of its page drowns in their mean, though a query may seek it alone; in that of its part it
    shows. parts: 2, whose means in 4 bits are as many bytes as the one in 8 of :class:`PageMeans`, or 4, twice as many;
    spread_weight: w >= 0, as there, of each part. The rest as in :class:`PageVotes`.
    """

    parts: Literal[2, 4] = 2
    spread_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts not in (2, 4):
            raise ValueError(f"{self._name}: parts is {self.parts!r}, expected 2 or 4")
        self._check_weight(self.spread_weight)

    @property
    def kind(self) -> SummaryKind:
        """Of the summaries that it ranks by."""
        return "halves" if self.parts == 2 else "quarters"

    def _read(self, reading: Reading) -> Reading:
        return reading._replace(kind=self.kind, weight=self.spread_weight)


@dataclass(frozen=True, kw_only=True)
class MassThreshold(PageMeans):
    """As :class:`PageMeans`, but a row reads as few pages as are estimated to hold ``mass`` of the attention, and a row whose
    mass is spread reads more than its part: up to ``reach`` times the budget's pages, within the budget of all rows of a
    sequence and layer together, by vote (the idea of AdaKV, arXiv 2407.11550, for what is read).

    mass: 0..1 (1: no row stops early; 0: all stop at ``least``); least: pages that every row reads, >= 1; reach: >= 1. The
    votes are summed. ValueError for parameters.
    """

    mass: float = 1.0
    least: int = 1
    reach: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("mass")
        if self.aggregate != "sum":
            raise ValueError(f"{self._name}: aggregate is {self.aggregate!r}, expected 'sum', a share of the mass")
        if self.least < 1:
            raise ValueError(f"{self._name}: least is {self.least}, expected at least 1 page")
        if not 1.0 <= self.reach < float("inf"):
            raise ValueError(f"{self._name}: reach is {self.reach}, expected a finite number >= 1")

    def _read(self, reading: Reading) -> Reading:
        most = int(self.reach * reading.pages)
        if most > MAX_NEAR_PAGES:
            raise ValueError(f"{self._name}: reach x pages is {most}, expected at most {MAX_NEAR_PAGES} Near pages")
        if self.near_pages and most > self.near_pages:
            raise ValueError(
                f"{self._name}: near_pages is {self.near_pages}, expected 0 or at least {most}, reach x pages"
            )
        near = max(most, reading.near_pages) if reading.near_pages else 0
        reading = super()._read(reading)._replace(most=most, near_pages=near)
        mass = 0.0 if self.mass == 1.0 else max(self.mass, LEAST_MASS)  # f32 sums may round to all before all is read
        return reading._replace(mass=mass, least=min(self.least, reading.pages))


@dataclass(frozen=True, kw_only=True)
class Bounds(PageVotes):
    """The pages whose largest logit may be highest, by the least and the largest value of their keys in every channel (Quest,
    arXiv 2406.10774).

    aggregate: "max" by default. What is reported as captured is a floor then: x bounds a page's mass from above. The rest as
    in :class:`PageVotes`. Deviations: the paper ranks per query head; here a KV head's query heads vote together, by shares of
    their sums of bounds.
    """

    aggregate: Literal["sum", "max"] = "max"
    kind: ClassVar[SummaryKind] = "bounds"

    def _read(self, reading: Reading) -> Reading:
        return reading._replace(kind=self.kind)


@dataclass(frozen=True, kw_only=True)
class TopPages(PageVotes):
    """The pages of highest true attention mass: every token is read to choose them, so it saves nothing. An oracle, beside
    which summaries are to be judged; without a Far tier only. As :class:`PageVotes`."""

    kind: ClassVar[SummaryKind] = "mean"

    def _read(self, reading: Reading) -> Reading:
        return _alone(self._name, reading)._replace(oracle=1)


@dataclass(frozen=True, kw_only=True)
class TopTokens(PageVotes):
    """The tokens of highest true attention mass, as many as the pages of the budget hold: an oracle beside which packing is to
    be judged, too. As :class:`TopPages`."""

    kind: ClassVar[SummaryKind] = "mean"

    def _read(self, reading: Reading) -> Reading:
        return _alone(self._name, reading)._replace(oracle=2)


def _alone(name: str, reading: Reading) -> Reading:
    """What each layer chooses for itself."""
    if reading.reuse > 1:
        raise ValueError(f"{name}: reuse is {reading.reuse}, expected 1")
    return reading
