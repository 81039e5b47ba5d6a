"""What a conversation may hold: tokens of a row from bytes, and bytes from tokens. Near memory never passes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvstrata.budget.books import SLAB, books
from kvstrata.budget.costs import far_books, page_costs
from kvstrata.budget.protect import least_limit, pages
from kvstrata.budget.units import Budget
from kvstrata.config import SLOTS, Shape, Unsupported
from kvstrata.policy.backbone import Backbone
from kvstrata.policy.base import FULL, STATES, Policy
from kvstrata.policy.epicache import epicache

SLABS = 96
"""Slabs of a cache at its limit, each of a 64th of it, with those that are made and emptied by a plan."""
PART_FILLED = 2
"""Pages of a row that may be part-filled: one of the tail, one in work."""
LEAST_CHUNK = 16
LEAST_PROMPT = 8
MOST = 1 << 17
"""Tokens of a budget that are tried for one that works."""


@dataclass(frozen=True)
class Sizes:
    """Tokens, all of a row but for prompt. budget: that one question sees (B), the tail included; chunk: read at a time (C);
    prompt: of one patched prompt (W); recent: the tail (r); system: first tokens that stay, at least 16 stay anyway; episodes:
    the most there may be; prompts: what says which tokens matter, "representatives", windows that stand for an episode
    (paper), or "reconstruct", the text itself once more (:class:`kvstrata.episodes.store.EpisodeStore`); far: sets that no
    question reads are in a Far tier, without all are Near; build: "shared", sets beside one backbone, or "separate", a cache
    of B tokens for each episode, all Near (paper; :class:`kvstrata.episodes.separate.SeparateStore`); the others: of
    :class:`kvstrata.policy.Backbone`.

    budget, chunk, recent are multiples of 16. ValueError names the argument, with the least that works; Unsupported: what
    separate caches have not.
    """

    budget: int
    chunk: int
    prompt: int
    recent: int = 64
    system: int = 0
    episodes: int = 8
    share: float = 2 / 3
    heads: Literal["pair", "uniform", "model"] = "pair"
    head_floor: float = 0.25
    layers: tuple[int, ...] | None = None
    private: str = "full"
    kernel: int = 17
    far: bool = True
    prompts: Literal["representatives", "reconstruct"] = "representatives"
    common: str = "full"
    head_cap: float = 2.5
    build: Literal["shared", "separate"] = "shared"

    def __post_init__(self) -> None:
        if self.chunk < LEAST_CHUNK or self.chunk % SLOTS:
            raise ValueError(f"chunk is {self.chunk}, expected a multiple of {SLOTS}, at least {LEAST_CHUNK}")
        if self.prompt < LEAST_PROMPT:
            raise ValueError(f"prompt_tokens is {self.prompt}, expected at least {LEAST_PROMPT}")
        if self.recent >= self.chunk:
            raise ValueError(f"recent is {self.recent}, expected less than the chunk of {self.chunk}")
        if self.episodes < 1:
            raise ValueError(f"max_episodes is {self.episodes}, expected at least 1")
        if self.prompts not in ("representatives", "reconstruct"):
            raise ValueError(f"prompts is {self.prompts!r}, expected 'representatives' or 'reconstruct'")
        if self.build not in ("shared", "separate"):
            raise ValueError(f"build is {self.build!r}, expected 'shared' or 'separate'")
        if self.build == "separate":
            self._check_separate()
        self.policy()

    def _check_separate(self) -> None:
        if self.prompts == "reconstruct":
            raise Unsupported(
                "prompts is 'reconstruct' with build 'separate', expected 'representatives': a token that is scored by its own"
                " text is worth the same to every episode, so that a cache for each would hold what a view of the shared does"
            )
        if self.far:
            raise Unsupported("far is True with build 'separate', expected False: all of its caches are Near")
        if self.private != self.common:
            raise Unsupported(
                f"private is {self.private!r}, common {self.common!r} with build 'separate', expected the same: it has no"
                " private sets"
            )

    @property
    def caches(self) -> int:
        """Sequences that hold a conversation: with build "separate" one for each episode that there may be."""
        return self.episodes if self.build == "separate" else 1

    @property
    def guards(self) -> int:
        """First tokens that stay."""
        return max(SLOTS, self.system)

    @property
    def planner(self) -> Backbone:
        """Who gives tokens to sets."""
        planner = self.policy().planner
        assert isinstance(planner, Backbone)
        return planner

    @property
    def whole(self) -> int:
        """Tokens that are kept whole before the first compaction: with "reconstruct" as many as take the bytes that backbone
        and pending tokens take later."""
        if self.prompts == "representatives":
            return self.budget + self.chunk
        backbone, _ = self.planner.sizes(self.budget, self.episodes)
        held = backbone if self.common == "full" else backbone // 2 // SLOTS * SLOTS
        return held + self.recent + self.chunk + SLOTS

    def policy(self) -> Policy:
        """The policy of the cache."""
        return epicache(
            self.budget,
            recent=self.recent,
            share=self.share,
            heads=self.heads,
            head_floor=self.head_floor,
            layers=self.layers,
            private=self.private,
            kernel=self.kernel,
            common=self.common,
            head_cap=self.head_cap,
            guards=self.guards,
            keeps=self.prompts == "reconstruct",
        )

    # --- slots and bytes --------------------------------------------------------------------------------------------------

    def stored_pages(self, shape: Shape, layer: int) -> tuple[int, int]:
        """Full and private pages of a layer's rows after a compaction and one chunk more, at the most."""
        spec, planner = shape.layers[layer], self.planner
        b = planner.of_layer(layer)
        _, private = planner.sizes(b, self.episodes)
        whole = max(b, self.budget) + self.chunk  # B + C before the first compaction
        each = whole // SLOTS + 1 + PART_FILLED
        sets = self.episodes * spec.kv_heads * private // SLOTS if self.episodes > 1 else 0
        if self.heads == "pair":  # an uneven division rounds less off
            most = int(spec.kv_heads * (1 - self.share) * (b - self.recent) / SLOTS + 1e-9)
            sets = max(sets, self.episodes * most if self.episodes > 1 else 0)
        return spec.kv_heads * each, sets

    def row_pages(self, shape: Shape, layer: int) -> tuple[int, int]:
        """Full and private pages that one row is rewritten to, at the most."""
        spec, planner = shape.layers[layer], self.planner
        b = planner.of_layer(layer)
        if self.heads == "pair":
            b = spec.kv_heads * b - (spec.kv_heads - 1) * planner.floor(layer, self.guards, self.episodes)
        backbone, private = planner.sizes(b, self.episodes)
        return pages(backbone), pages(self.episodes * private)

    def _check_layers(self, shape: Shape) -> None:
        """ValueError unless ``layers`` has one for each, which sum to as many tokens as equal ones would."""
        if self.layers is None:
            return
        if len(self.layers) != len(shape.layers):
            raise ValueError(f"layers has {len(self.layers)} budgets, expected {len(shape.layers)}")
        planned = [b for b, spec in zip(self.layers, shape.layers, strict=True) if spec.window is None]
        if sum(planned) != self.budget * len(planned):
            raise ValueError(
                f"layers sum to {sum(planned)} tokens, expected {self.budget} for each of {len(planned)} with full attention"
            )

    def limit_bytes(self, shape: Shape) -> int:
        """What the cache holds Near at the most, with its tables and what it works in: of private sets those that a question
        reads, those of the one layer in work, and one row that is rewritten; without a Far tier all of them. Of separate caches
        that of each, with all that it holds."""
        if self.build == "separate":
            return self.caches * replace(self, build="shared", episodes=1).limit_bytes(shape)
        self._check_layers(shape)
        policy = self.policy()
        costs = [page_costs(shape, layer, policy) for layer in range(len(shape.layers))]
        total = self._pages_bytes(shape) if self.prompts == "representatives" else self._kept_bytes(shape)
        if self.far:
            total += policy.ring * sum(max(costs[i].values()) for i, _ in shape.kinds)
        smallest = min(min(cost.values()) for cost in costs)
        limit = total
        for _ in range(3):  # what the books take grows with the limit, a little
            beside = books(policy, shape, limit, 1).of(limit // smallest, SLABS)
            limit = total + beside + total // 64 + SLABS * SLAB
        return limit

    def _pages_bytes(self, shape: Shape) -> int:
        """Of all pages, where each layer is planned before the next has its tokens."""
        policy = self.policy()
        costs = [page_costs(shape, layer, policy) for layer in range(len(shape.layers))]
        full, private = FULL, self.planner.native_state
        total, rewriting, working = self._sliding_bytes(shape), 0, 0
        for layer, (spec, cost) in enumerate(zip(shape.layers, costs, strict=True)):
            if spec.window is not None:
                continue
            own, sets = self.stored_pages(shape, layer)
            total += own * cost[full]
            if self.far:
                total += sets * far_books(shape, layer, policy)
                working = max(working, sets * cost[private])
            else:
                total += sets * cost[private]
            own, sets = self.row_pages(shape, layer)
            rewriting = max(rewriting, own * cost[full] + sets * cost[private])
        return total + rewriting + working

    def _kept_bytes(self, shape: Shape) -> int:
        """Of all pages, where layers are planned one by one behind a pass over all of them, and none but the one in work has a
        private set Near: the most of what a question sees, of what a plan takes, and of what is whole before the first."""
        policy, planner = self.policy(), self.planner
        planned = [i for i, spec in enumerate(shape.layers) if spec.window is None]
        costs = [page_costs(shape, i, policy) for i in planned]
        full, private, common = (
            max(cost[state] for cost in costs) for state in (FULL, planner.native_state, STATES.get(self.common, FULL))
        )
        heads = [shape.layers[i].kv_heads for i in planned]
        rows, seen = sum(heads), sum(heads) * (self.budget - self.recent) // SLOTS
        backbone = min(seen, int(self.share * seen) + rows) if self.episodes > 1 else seen
        tails = rows * (pages(self.recent + self.chunk + SLOTS) + PART_FILLED) * full
        tails += rows * pages(self.guards) * (full - common)  # which are never quantized
        sets, working, most = self._kept_pages(shape, heads)
        own, every = planner.sizes(most, self.episodes)
        rewriting = pages(own) * common + pages(self.episodes * every) * private if self.episodes > 1 else 0
        alone = pages(most - self.recent) * common
        shown = tails + backbone * common + (seen - backbone) * private + alone
        built = tails + backbone * common + working * private + max(rewriting, alone)
        whole = rows * (pages(self.whole) + PART_FILLED) * full + working * private + max(rewriting, alone)
        if not self.far:
            shown, built = shown + sets * private, built + sets * private
        books_of = sets * max(far_books(shape, i, policy) for i in planned) if self.far else 0
        return max(shown, built, whole) + books_of + self._sliding_bytes(shape)

    def _sliding_bytes(self, shape: Shape) -> int:
        """Of layers with a window, with what an answer that is taken back needs, and a chunk."""
        policy, total = self.policy(), 0
        for i, spec in enumerate(shape.layers):
            if spec.window is not None:
                slots = pages(spec.window + 2 * self.chunk) + 2
                total += spec.kv_heads * slots * page_costs(shape, i, policy)[FULL]
        return total

    def _kept_pages(self, shape: Shape, heads: Sequence[int]) -> tuple[int, int, int]:
        """Pages of all private sets, those of one layer, and tokens of a row, at the most. heads: of each planned layer."""
        planner = self.planner
        least = [planner.floor(i, self.guards, self.episodes) for i in range(len(heads))]
        total, budgets = sum(heads) * self.budget, [n * planner.of_layer(i) for i, n in enumerate(heads)]
        row = max(budgets[i] // n for i, n in enumerate(heads))
        if self.heads == "pair":
            row = max(b - (n - 1) * f for b, n, f in zip(budgets, heads, least, strict=True))
        if self.heads == "model":
            floors = sum(n * f for n, f in zip(heads, least, strict=True))
            row = min(planner.row_cap, total - floors + max(least))
            budgets = [min(n * row, total - floors + n * f) for n, f in zip(heads, least, strict=True)]
        if self.episodes == 1:
            return 0, 0, row

        def private(tokens: int, rows: int) -> int:
            return self.episodes * int((1 - self.share) * (tokens - rows * self.recent) / SLOTS + 1e-9)

        return private(total, sum(heads)), max(private(b, n) for b, n in zip(budgets, heads, strict=True)), row


def settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of :class:`Sizes` as a conversation has them where they are not given: the text is its own prompt, all layers
    share one budget unless ``layers`` divides it, and neighbours lend no scores. Separate caches take windows as prompts."""
    if options.get("build") == "separate":
        return {"far": False} | dict(options)
    if options.get("prompts", "reconstruct") != "reconstruct":
        return dict(options)
    heads = "model" if options.get("layers") is None else "pair"
    return {"prompts": "reconstruct", "heads": heads, "kernel": 1} | dict(options)


def sizes_of(
    budget: Budget, shape: Shape, *, chunk: int | None = None, prompt: int | None = None, **options: Any
) -> Sizes:
    """The sizes under a budget of B tokens, or the largest under one of bytes.

    chunk, prompt: None, min(2048, B / 2) and min(512, C / 4), where the text is its own prompt min(512, C); options: the others
    of :class:`Sizes`. ValueError for a budget too small, with the least that works; Unsupported for another kind of budget.
    """
    if budget.unit == "share" or budget.per != "cache" or budget.schedule is not None:
        raise Unsupported(f"budget: {budget}: a conversation takes bytes or tokens, without a schedule")

    def sized(b: int) -> Sizes:
        c = min(2048, b // 2 // SLOTS * SLOTS) if chunk is None else chunk
        w = min(512, c if options.get("prompts") == "reconstruct" else c // 4) if prompt is None else prompt
        return Sizes(b, c, w, **options)

    if budget.unit == "tokens":
        return _sized(sized, int(budget.value))
    if options.get("layers") is not None:
        raise ValueError(f"layers with a budget of bytes, expected one of tokens: {budget} are not told apart by layer")
    low = _least(sized) // SLOTS
    if (least := sized(low * SLOTS).limit_bytes(shape)) > budget.value:
        raise ValueError(f"budget: {int(budget.value)} bytes, expected at least {least}")
    too_large = least_limit(lambda n: sized(n * SLOTS).limit_bytes(shape) > budget.value, low)
    return sized((too_large - 1) * SLOTS)


def _sized(sized: Callable[[int], Sizes], b: int) -> Sizes:
    """ValueError names the budget, unless no budget works with all else that is given."""
    try:
        return sized(b)
    except ValueError as error:
        least = _least(sized)
        if b % SLOTS == 0 and b >= least:
            raise
        raise ValueError(f"budget: {b} tokens, expected a multiple of {SLOTS}, at least {least}") from error


def _least(sized: Callable[[int], Sizes]) -> int:
    """The smallest B that works. ValueError where none does, of the last."""
    b = SLOTS
    while True:
        try:
            sized(b)
            return b
        except ValueError:
            if b > MOST:
                raise
        b += SLOTS
