"""Roles and the plan. A policy reads, a plan says, ``apply_plan`` acts.

A policy is a composition of roles, each a small frozen dataclass with one method; per-sequence state lives in the cache.
Letters: R rows (one sequence and KV head each), G query heads per KV head, N stored tokens of the longest row in table
order, W window queries, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from kvstrata.config import Unsupported

NEAR, FAR = range(2)
"""Values of a plan's tier column."""

UNGROUPED, PROVISIONAL, GROUPED = range(3)
"""Whether a plan has put a token's page together: not yet, for the time being, for good."""

PROVISIONAL_GROUP = 1 << 30
"""Numbers of a plan's group column from here on: pages for the time being, which a later plan will put together anew."""

BACKBONE, LESSER_HALF, PENDING = 0, 0x8000, 0xFFFF
"""Values of a plan's set column (``csrc/pages/set.h``): the set of all episodes, and what no plan has given to a set yet; a
private set is 1..E, and its lesser half, which is read where that set is read alone, 1..E + LESSER_HALF."""

EVICTED, FULL, INT8, INT4, INT2 = range(5)
"""Values of a plan's state column (``csrc/common/types.h``)."""

STATES: Mapping[str, int] = {"int8": INT8, "int4": INT4, "int2": INT2}
"""States of the quantized formats, most bits first: a token's bits only fall."""


SummaryKind = Literal["mean", "bounds", "mean_value", "halves", "quarters"]
"""What a summary says of its page (:func:`kvstrata.ops.summarize`)."""


class Reader(Protocol):
    """What the roles may ask of a layer's rows beyond :class:`Seen`; computed when asked, empty places are 0."""

    def attention(self, queries: int, spread: Literal["mean", "std", "variance"], weight: float) -> Tensor:
        """f32 [R, G, N]: attention of the last ``queries`` queries to each token, the mean over them plus ``weight`` times
        their standard deviation or variance (unbiased)."""

    def pool(
        self, score: Tensor, kernel: int, kind: Literal["avg", "max"], divide: Literal["present", "kernel"]
    ) -> Tensor:
        """f32 [R, N] of score f32 [R, G, N] or [R, N]: pooled over stored tokens at most kernel // 2 positions away, then the
        mean over G."""

    def mass(self) -> Tensor:
        """f32 [R, N]: attention mass that each token has received; only under a scorer that needs "mass"."""

    def key_scores(self, kind: Literal["norm", "diversity"]) -> Tensor:
        """f32 [R, N]: minus the norm of each key, or minus its cosine to the mean direction of its row's keys."""

    def keys(self) -> Tensor:
        """f32 [R, N, D]: the keys as stored, decoded. For scorers of your own."""

    def values(self) -> Tensor:
        """f32 [R, N, D]: the values, likewise."""

    def queries(self) -> tuple[Tensor, Tensor]:
        """f32 [R, G, W, D], the last W queries, oldest first, and how many of them there are: i64 [R]; those are the last."""

    def page_mass(self, queries: int) -> Tensor:
        """f32 [R, N]: each token's part of the share of attention that its page receives from the last ``queries`` queries, as
        summaries estimate it: of Far pages too, 0 for sinks and tail. Only under a policy that selects."""

    def cluster(self, segment: Tensor, iters: int | None) -> Tensor:
        """i32 [R, N]: tokens of one number of a row resemble each other, at most 16 of them, -1: none. segment i32 [R, N]:
        tokens that are clustered together, -1: none. iters: of :func:`kvstrata.ops.cluster`; None: by
        :func:`kvstrata.ops.cluster_greedy`."""

    def patched(self) -> Tensor:
        """f32 [E, R, N]: the most that a query of each span sees of each token (:func:`kvstrata.ops.score_max`); 0 beyond a
        row's last token. Only in a plan of a step with spans."""

    def statistics(self, queries: int, which: Literal["sound", "code"]) -> Tensor:
        """f32 [R, G, 3]: ARKV's entropy, variance and kurtosis of the attention of the last ``queries`` queries."""


@dataclass(frozen=True, eq=False)
class Allowance:
    """What the rows of a layer may hold beside their protected tokens.

    bytes: i64 [R]; page_bytes: bytes of one page by state, metadata included; full_share: f32 [R], the share r of a row's
    pages that stay Full where not all fit (None: the planner's own); formats: u8 [R, N], the state of each token where the
    allocator decides token by token (None: the planner does); spare: bytes of new pages that may stand beside those which they
    replace; most: tokens of any state that a plan may leave in a row, where the budget counts them (None: it does not).
    """

    bytes: Tensor
    page_bytes: Mapping[int, int]
    full_share: Tensor | None = None
    formats: Tensor | None = None
    spare: int = 0
    most: int | None = None


@dataclass(frozen=True, eq=False)
class Grouping:
    """What a plan of sets goes by where each token has one score. count: E; of: i32 [R, N], the episode of each stored token,
    0..E-1, in table order; rows: i64 [R], tokens of each row that one question can see (None: the planner divides them)."""

    count: int
    of: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What the roles see of one layer.

    positions: i32 [R, N], the stored tokens of each row in table order, -1 beyond a row's last;
    lengths: i64 [R], real tokens seen by the row's sequence; open: bool [R, N], tokens of the open tail;
    state: u8 [R, N], what each token is stored as now, 0 beyond a row's last; sinks: first tokens that are protected;
    score: f32 [R, N], higher is kept, as the scorer found it; allowance: what the rows may hold (None: no limit);
    read: asks for more; tier: u8 [R, N], NEAR or FAR, grouped: u8 [R, N], UNGROUPED, PROVISIONAL or GROUPED, and entry:
    i32 [R, N], the place of its page in the row's table: all three for planners that archive; grouping: for planners that name
    sets; prompt: whether a prompt's tokens are planned inside their step. A scorer finds no score and no allowance yet.
    """

    layer: int
    positions: Tensor
    lengths: Tensor
    open: Tensor
    state: Tensor
    sinks: int = 0
    score: Tensor | None = None
    allowance: Allowance | None = None
    read: Reader | None = None
    tier: Tensor | None = None
    grouped: Tensor | None = None
    entry: Tensor | None = None
    grouping: Grouping | None = None
    prompt: bool = False

    @property
    def protected(self) -> Tensor:
        """bool [R, N]: sinks and tail, which stay as they are."""
        return self.open | ((self.positions >= 0) & (self.positions < self.sinks))

    @property
    def stored(self) -> Tensor:
        """bool [R, N]: places that hold a token."""
        return self.positions >= 0


@dataclass(frozen=True)
class Plan:
    """State, tier, group and set for every stored token of one layer: data. An absent column means "as it is".

    Each column is [R, N], aligned with ``Seen.positions``; state: u8, 0 Evicted, 1 Full, 2 int8,
    3 int4, 4 int2; tier: u8, 0 Near, 1 Far; group: i32, tokens of one number of a row get pages of
    their own, -1: as it is; set: u16, BACKBONE, 1..E, with LESSER_HALF or not, or PENDING, which the open tail is and nothing
    else.
    """

    state: Tensor | None = None
    tier: Tensor | None = None
    group: Tensor | None = None
    set: Tensor | None = None


class Scorer(Protocol):
    """What matters? ``needs``: "queries" (with ``queries``: how many of a row's last) or "mass"; may be empty."""

    needs: ClassVar[frozenset[str]]

    def score(self, seen: Seen) -> Tensor:
        """f32 [R, N], higher is kept. Scores that are not finite rank lowest, and are counted."""


class Allocator(Protocol):
    """How much may each layer and head hold? See :mod:`kvstrata.budget.allocate`."""

    needs: ClassVar[frozenset[str]]

    def allocate(self, seen: Any, total: int, floor: Tensor | None = None, cap: Tensor | None = None) -> Any: ...


class Planner(Protocol):
    """Which state and tier does each token take? One with ``leaves_what_fits`` True changes nothing, whatever the scores, where
    all unprotected tokens are Full and the bytes of each row hold them so: it is not asked then. One with ``counts`` True needs
    a budget that counts tokens."""

    def plan(self, seen: Seen) -> Plan: ...


@runtime_checkable
class Divides(Planner, Protocol):
    """A planner that may divide the tokens of all layers (heads "model")."""

    heads: str

    def over_layers(self, found: Sequence[Seen]) -> list[Tensor]:
        """Tokens of each row of each layer that was seen, i64 [R] for each."""


class Reading(NamedTuple):
    """What a step of one token reads of the pages that are neither sinks nor tail (``csrc/store/store.h``, Recall).

    pages: K of each row; near_pages: Near copies of Far pages that a row keeps; weight: of the spread; aggregate: 0 sum, 1 max;
    kind: of summaries; most: pages of one row where those of a sequence's rows share K each, 0: K; mass: share of attention at
    which a row stops, 0: none, but for ``least`` pages; estimate: share of the unread pages that stand in by their means;
    oracle: all is read to choose, 1 the best pages, 2 the best tokens, 0: by summaries; audit: of so many steps, one row of one
    layer is read whole to compare, 0: none; flat_pages: of a row of more sealed pages, groups of 32 are scored first, and the
    share ``expand`` of them is looked into; reuse: so many indexed layers read what the first of them selects.
    """

    pages: int
    near_pages: int
    weight: float = 1.0
    aggregate: int = 0
    kind: SummaryKind = "mean"
    most: int = 0
    mass: float = 0.0
    least: int = 1
    estimate: float = 0.0
    oracle: int = 0
    audit: int = 0
    flat_pages: int = 1 << 30
    expand: float = 0.25
    reuse: int = 1

    @property
    def widest(self) -> int:
        """Pages that one row may read."""
        return self.most or self.pages


class Selector(Protocol):
    """Which pages does this query read? See :mod:`kvstrata.recall.selectors`."""

    @property
    def mass_floor(self) -> float: ...

    @property
    def kind(self) -> SummaryKind: ...

    def native(self, sinks: int, window: int) -> Reading: ...

    def reading(self, budget: int) -> Selector: ...


@dataclass(frozen=True)
class Policy:
    """A composition of roles.

    formats: quantized formats that its plans name; sinks: first tokens that are always kept; window: tokens of the open
    tail, a multiple of 16 (None: ``window_share`` of what the budget holds per row); interval: decoded tokens between
    plans; chunk: prompt tokens between cuts; combine: how a new score joins the last one, "replace", "sum" or "max" (the
    larger of the new one and ``decay`` times the old one); selector: which pages a step of one token reads (None: all);
    dense_layers: layers where everything is read and stays Near all the same; ring: Near pages of each Far pool in which pages
    are put together, and read through by steps of several tokens, at least 2; on_seal: one of ``formats``, which tokens take
    when they leave the tail (None: they stay Full until a plan); centre: quantized keys are relative to a mean of their row,
    frozen where one is first quantized. Policies with a planner need a budget unless their window is given and they have no
    allocator.
    """

    name: str
    planner: Planner | None = None
    scorer: Scorer | None = None
    allocator: Allocator | None = None
    formats: tuple[str, ...] = ()
    sinks: int = 0
    window: int | None = 64
    window_share: float = 1.0
    interval: int = 64
    chunk: int = 2048
    combine: Literal["replace", "sum", "max"] = "replace"
    decay: float = 0.95
    selector: Selector | None = None
    dense_layers: tuple[int, ...] = ()
    ring: int = 64
    on_seal: str | None = None
    centre: bool = True

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"policy {self.name}: sinks is {self.sinks}, expected >= 0")
        if self.window is not None and (self.window < 16 or self.window % 16):
            raise ValueError(f"policy {self.name}: window is {self.window}, expected a positive multiple of 16")
        if not 0 < self.window_share <= 1:
            raise ValueError(f"policy {self.name}: window_share is {self.window_share}, expected 0 < share <= 1")
        if unknown := [f for f in self.formats if f not in STATES]:
            raise ValueError(f"policy {self.name}: formats has {unknown[0]!r}, expected some of {', '.join(STATES)}")
        if self.combine not in ("replace", "sum", "max"):
            raise ValueError(f"policy {self.name}: combine is {self.combine!r}, expected replace, sum or max")
        if self.combine != "replace" and not getattr(self.scorer, "is_mass", True):
            raise ValueError(
                f"policy {self.name}: combine is {self.combine!r}, expected replace: scores of {type(self.scorer).__name__} may"
                " be negative and are comparable within one plan only"
            )
        if self.on_seal is not None and self.on_seal not in self.formats:
            raise ValueError(f"policy {self.name}: on_seal is {self.on_seal!r}, expected None or one of {self.formats}")
        if self.on_seal is not None and (self.planner is None or self.archives or self.episodic):
            raise Unsupported(
                f"policy {self.name}: on_seal without a planner, or beside an archive or sets, is not built"
            )
        if self.ring < 2:
            raise ValueError(f"policy {self.name}: ring is {self.ring}, expected at least 2 pages")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"policy {self.name}: decay is {self.decay}, expected 0 to 1")
        for field in ("interval", "chunk"):
            value = getattr(self, field)
            if value < 16 or value % 16:
                raise ValueError(f"policy {self.name}: {field} is {value}, expected a positive multiple of 16")
        if self.selector is not None or self.archives:
            self._check_recall()
        if self.queries > (self.window or self.queries):
            raise ValueError(
                f"policy {self.name}: scores {self.queries} window queries, expected at most {self.window}"
            )

    @property
    def queries(self) -> int:
        """Window queries that the cache must remember of each row."""
        return max(int(getattr(role, "queries", 0)) for role in (self.scorer, self.allocator))

    def _check_recall(self) -> None:
        """What selects and archives has its sinks in pages of their own. It is scored by summaries, as Far pages are not read
        for that, and its rows have equal shares, as each layer is planned for itself."""
        if self.sinks % 16 or self.window is None:
            raise ValueError(
                f"policy {self.name}: sinks is {self.sinks}, window {self.window}, expected multiples of 16"
            )
        if self.scorer is not None and not getattr(self.scorer, "by_summaries", False):
            raise Unsupported(
                f"policy {self.name}: scores of {type(self.scorer).__name__} with a selector or an archive are not built yet,"
                " expected PageMass or none"
            )
        if self.scorer is not None and self.selector is None:
            raise ValueError(f"policy {self.name}: {type(self.scorer).__name__} reads summaries, expected a selector")
        if self.allocator is not None and self.allocator.needs:
            raise Unsupported(
                f"policy {self.name}: {type(self.allocator).__name__} with a selector or an archive is not built yet,"
                " expected Uniform or none"
            )
        state = getattr(self.planner, "state", "full") if self.archives else "full"
        if state != "full" and state not in self.formats:
            raise ValueError(
                f"policy {self.name}: formats is {self.formats}, expected it to have {state!r}, in which its planner archives"
            )
        if self.selector is not None:
            reading = self.selector.native(self.sinks, self.window)
            if reading.reuse > 1 and (self.scorer is not None or self.allocator is not None):
                raise Unsupported(
                    f"policy {self.name}: reuse is {reading.reuse} with a scorer or an allocator, which may leave layers other"
                    " tokens in their pages, expected 1"
                )
            if self.archives and reading.near_pages == 0 and reading.widest > self.ring:
                raise ValueError(
                    f"policy {self.name}: ring is {self.ring}, expected at least the {reading.widest} pages that a step reads,"
                    " as rows keep no Near copies"
                )

    @property
    def archives(self) -> bool:
        """Whether tokens go to the Far tier, where there is one."""
        return bool(getattr(self.planner, "archives", False))

    @property
    def episodic(self) -> bool:
        """Whether its plans name sets: they come when they are asked for, never after a step."""
        return bool(getattr(self.planner, "names_sets", False))

    @property
    def massed(self) -> bool:
        """Whether scores are accumulated attention mass."""
        return self.scorer is not None and "mass" in self.scorer.needs

    def with_queries(self, most: int) -> Policy:
        """The policy whose roles read at most so many window queries."""
        roles: dict[str, Any] = {}
        for name in ("scorer", "allocator"):
            role = getattr(self, name)
            if int(getattr(role, "queries", 0)) > most:
                roles[name] = replace(role, queries=most)
        return replace(self, **roles)
