"""``Backbone``: what all episodes need is kept once, what one alone needs in a set of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvstrata.budget.split import split
from kvstrata.config import SLOTS
from kvstrata.policy.base import BACKBONE, EVICTED, FULL, LESSER_HALF, PENDING, STATES, Plan, Seen
from kvstrata.policy.choose import pages_of

LEAST_SET = 32
"""Tokens of a private set, at the least: a page for each half."""


def pad(tokens: float) -> int:
    """Tokens of so many whole pages."""
    return -(-ceil(tokens) // SLOTS) * SLOTS


@dataclass(frozen=True)
class Backbone:
    """Of the tokens that a row may keep beside its tail, those that most episodes want go to the backbone, the others each to
    one episode's private set: a question reads the backbone and one set, and none is stored twice.

    budget: tokens of a row that one question can see (B of the paper), the tail included, the mean over the heads of a layer;
    layers: of each layer instead; recent: r, the tail; share: of what is left that goes to the backbone, 0 < share < 1; heads:
    "pair" divides a layer's tokens by what each head has of its best ones, each row gets at least head_floor of them, "uniform"
    equally, "model" all tokens of the model by what each row has of the best of all layers (KVzip, arXiv 2505.23416), no row
    more than head_cap times the mean; private, common: "full", or the quantized format of private sets, and of the backbone but
    for sinks; kernel: stored tokens at most kernel // 2 positions away lend their score (SnapKV's pooling, with which what
    follows a token that is attended to stays with it; 1: paper). budget, layers and recent are multiples of 16.

    With b of a row, E episodes and its scores s_e (:class:`kvstrata.policy.patched.PatchedPrompt`): the backbone has
    pad(share * (b - r)) tokens, each set what is left of b - r; one episode has no set. Episode e wants the b - r best by s_e.
    The backbone takes sinks, then tokens by how many want them, then by the sum of s_e / sum(s_e). Another token that is wanted
    goes to the episode that wants it with the largest such share, as far as its set has room; sets with room take their best of
    the rest. What is in no set is evicted. Ties: lower episode, lower position. Deviation: the paper keeps E whole caches.

    Where each token has one score and is of one episode (:class:`Grouping`), the backbone takes sinks, then the best of all,
    and each set the best of its episode that are left; sets with room take the best of the rest.
    """

    budget: int
    recent: int = 64
    share: float = 2 / 3
    heads: Literal["pair", "uniform", "model"] = "pair"
    head_floor: float = 0.25
    layers: tuple[int, ...] | None = None
    private: str = "full"
    kernel: int = 17
    common: str = "full"
    head_cap: float = 2.5
    names_sets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (
            ("budget", self.budget),
            ("recent", self.recent),
            *(("layers", b) for b in self.layers or ()),
        ):
            if value < SLOTS or value % SLOTS:
                raise ValueError(f"Backbone: {name} has {value}, expected a positive multiple of {SLOTS}")
        if not 0 < self.share < 1:
            raise ValueError(f"Backbone: share is {self.share}, expected 0 < share < 1")
        if self.heads not in ("pair", "uniform", "model"):
            raise ValueError(f"Backbone: heads is {self.heads!r}, expected 'pair', 'uniform' or 'model'")
        if self.heads == "model" and self.layers is not None:
            raise ValueError(
                f"Backbone: layers is {self.layers} with heads 'model', expected None: rows are told apart anyway"
            )
        if self.head_cap < 1:
            raise ValueError(f"Backbone: head_cap is {self.head_cap}, expected at least 1")
        if not 0 <= self.head_floor <= 1:
            raise ValueError(f"Backbone: head_floor is {self.head_floor}, expected 0 to 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"Backbone: kernel is {self.kernel}, expected odd and >= 1")
        if self.private != "full" and self.private not in STATES:
            raise ValueError(f"Backbone: private is {self.private!r}, expected 'full' or one of {', '.join(STATES)}")
        if self.common not in ("full", self.private):
            raise ValueError(
                f"Backbone: common is {self.common!r}, expected 'full' or, as private is, {self.private!r}"
            )

    @property
    def native_state(self) -> int:
        """The state of private sets, in which they go Far."""
        return STATES.get(self.private, FULL)

    # --- sizes ------------------------------------------------------------------------------------------------------------

    def of_layer(self, layer: int) -> int:
        """b of its rows, the mean."""
        return self.layers[layer] if self.layers else self.budget

    def sizes(self, b: int, episodes: int) -> tuple[int, int]:
        """Tokens of a row's backbone and of each private set."""
        room = b - self.recent
        backbone = room if episodes == 1 else min(pad(self.share * room), room)
        return backbone, room - backbone

    @property
    def row_cap(self) -> int:
        """The most tokens of a row where all of the model are divided."""
        return pad(self.head_cap * self.budget)

    def least(self, guards: int, episodes: int) -> int:
        """The smallest b whose backbone holds so many guards and a page, and whose sets are no smaller than LEAST_SET."""
        b = self.recent + SLOTS
        while True:
            backbone, private = self.sizes(b, episodes)
            if backbone >= guards + SLOTS and (episodes == 1 or private >= LEAST_SET):
                return b
            b += SLOTS

    def floor(self, layer: int, guards: int, episodes: int) -> int:
        """The smallest b of a row of the layer."""
        return max(pad(self.head_floor * self.of_layer(layer)), self.least(guards, episodes))

    # --- the plan ---------------------------------------------------------------------------------------------------------

    def plan(self, seen: Seen) -> Plan:
        order = seen.positions.masked_fill(~seen.stored, torch.iinfo(torch.int32).max).argsort(1)
        score = self._pooled(seen)
        score = score.gather(2, order.expand(score.shape))
        free, guard = ((x & seen.stored).gather(1, order) for x in (~seen.open, seen.positions < seen.sinks))
        b = self._rows(seen, score.amax(0), free, len(score))
        sizes = torch.tensor([self.sizes(n, len(score)) for n in b.tolist()])
        if seen.grouping is None:
            chosen = choose_sets(score, free, guard & free, b - self.recent, sizes[:, 0], sizes[:, 1])
        else:
            chosen = choose_own(score, free, guard & free, sizes[:, 0], sizes[:, 1])
        chosen = halve(chosen, score)
        sets = torch.full_like(chosen, -1).scatter(1, order, chosen)
        sets = torch.where(seen.open, PENDING, sets)
        state = self._states(seen, sets)
        return Plan(state=state, set=torch.where(sets < 0, BACKBONE, sets).to(torch.uint16))

    def _pooled(self, seen: Seen) -> Tensor:
        """Scores by episode, f32 [E, R, N], in table order."""
        assert seen.read is not None
        if seen.grouping is not None:
            of = seen.grouping.of == torch.arange(seen.grouping.count, dtype=torch.int32).view(-1, 1, 1)
            return torch.where(of, self._neighbours(seen, self._one(seen)), 0.0)
        score = seen.read.patched()
        score = torch.where(score.isfinite(), score, 0.0)
        return torch.stack([self._neighbours(seen, s) for s in score])

    def _one(self, seen: Seen) -> Tensor:
        """The score of each token, f32 [R, N]."""
        assert seen.score is not None
        return torch.where(seen.score.isfinite(), seen.score, 0.0)

    def _neighbours(self, seen: Seen, score: Tensor) -> Tensor:
        """f32 [R, N]: what stored tokens nearby lend."""
        assert seen.read is not None
        return score if self.kernel == 1 else seen.read.pool(score, self.kernel, "max", "present")

    def over_layers(self, found: Sequence[Seen]) -> list[Tensor]:
        """b of the rows of all layers, i64 [R] for each: as many tokens as they have together, in proportion to what each row
        has of the best of all, without what neighbours lend; ties to the earlier row. found: with scores."""
        best, rows = [], [len(seen.positions) for seen in found]
        for seen in found:
            free = ~seen.open & seen.stored
            best.append(torch.where(free, self._one(seen), -1.0))
        most = min(sum(rows) * (self.budget - self.recent), int(sum((b >= 0).sum() for b in best)))
        owner = torch.cat([torch.full((len(x),), i) for i, x in enumerate(y for b in best for y in b)])
        top = torch.cat([b.flatten() for b in best]).sort(descending=True, stable=True).indices[:most]
        counts = torch.bincount(owner[top], minlength=sum(rows))
        least = [self.floor(s.layer, s.sinks, s.grouping.count if s.grouping else 1) // SLOTS for s in found]
        floors = [n for n, r in zip(least, rows, strict=True) for _ in range(r)]
        caps = [self.row_cap // SLOTS] * sum(rows)
        units = split(sum(rows) * self.budget // SLOTS, counts.numpy(), floors, caps)
        ends = [0, *accumulate(rows)]
        return [torch.from_numpy(units[a:b]) * SLOTS for a, b in pairwise(ends)]

    def _rows(self, seen: Seen, pooled: Tensor, free: Tensor, episodes: int) -> Tensor:
        """b of each row, i64 [R]: exactly as many tokens as the layer has. pooled: f32 [R, N]."""
        if seen.grouping is not None and seen.grouping.rows is not None:
            return seen.grouping.rows
        rows, b = pooled.shape[0], self.of_layer(seen.layer)
        if self.heads == "uniform" or rows == 1:
            return torch.full((rows,), b)
        best = torch.where(free, pooled, -1.0).flatten().sort(descending=True, stable=True).indices
        best = best[: min(rows * (b - self.recent), int(free.sum()))]
        counts = torch.bincount(best // pooled.shape[1], minlength=rows)
        least = self.floor(seen.layer, seen.sinks, episodes) // SLOTS
        return torch.from_numpy(split(rows * b // SLOTS, counts.numpy(), [least] * rows)) * SLOTS

    def _states(self, seen: Seen, sets: Tensor) -> Tensor:
        """Private tokens in their format, those of the backbone in its own, sinks and others as they are: bits only fall."""
        private = (sets > BACKBONE) & (sets != PENDING)
        fallen = torch.where(private, self.native_state, FULL)
        common = (sets == BACKBONE) & (seen.positions >= seen.sinks)
        fallen = torch.where(common, STATES.get(self.common, FULL), fallen)
        kept = torch.maximum(seen.state.int(), fallen)
        return torch.where(seen.stored & (sets >= 0), kept, EVICTED).to(torch.uint8)


def choose_sets(score: Tensor, free: Tensor, guard: Tensor, want: Tensor, backbone: Tensor, private: Tensor) -> Tensor:
    """The set of each token, as :class:`Backbone` says: i32 [R, N], 0, 1..E, or -1: none.

    score: f32 [E, R, N], >= 0, by rising position; free: bool [R, N], tokens that may be chosen; guard: bool [R, N], those of
    them that the backbone must have; want, backbone, private: i64 [R], tokens that an episode wants, and of each set.
    """
    episodes = len(score)
    wanted = torch.stack([_best(s, free, want) for s in score])
    mass = (score * free).double()
    total = mass.sum(2, keepdim=True)
    shares = torch.where(total > 0, mass / total, 0.0)
    chosen = torch.where(_backbone(wanted, shares, free, guard, backbone), BACKBONE, -1).to(torch.int32)
    if episodes == 1:
        return chosen
    claims = torch.where(wanted & (chosen < 0), shares, -1.0)
    most, owner = claims.amax(0), torch.full_like(chosen, -1)
    for e in reversed(range(episodes)):
        owner = torch.where((claims[e] == most) & (most >= 0), e, owner)
    for e in range(episodes):
        chosen = chosen.masked_fill(_best(score[e], owner == e, private), e + 1)
    for e in range(episodes):
        room = private - (chosen == e + 1).sum(1)
        chosen = chosen.masked_fill(_best(score[e], free & (chosen < 0), room), e + 1)
    return chosen


def choose_own(score: Tensor, free: Tensor, guard: Tensor, backbone: Tensor, private: Tensor) -> Tensor:
    """The set of each token where each is of one episode: i32 [R, N], as :func:`choose_sets`.

    score: f32 [E, R, N], 0 in all episodes but a token's own; the others: of :func:`choose_sets`.
    """
    best, own = score.max(0)
    order = torch.where(free, best, -1.0).masked_fill(guard, torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = torch.where(_first(order, backbone) & free, BACKBONE, -1).to(torch.int32)
    if len(score) == 1:
        return chosen
    for e in range(len(score)):
        mine = free & (chosen < 0) & (own == e) & (best > 0)
        chosen = chosen.masked_fill(_best(best, mine, private), e + 1)
    for e in range(len(score)):
        room = private - (chosen == e + 1).sum(1)
        chosen = chosen.masked_fill(_best(best, free & (chosen < 0), room), e + 1)
    return chosen


def halve(chosen: Tensor, score: Tensor) -> Tensor:
    """Marks the lesser half of each private set: of its ceil(n / 16) pages, the best floor(pages / 2) are the better one."""
    out = chosen.clone()
    for e, s in enumerate(score):
        mine = chosen == e + 1
        better = pages_of(mine.sum(1)) // 2 * SLOTS
        out[mine & ~_best(s, mine, better)] += LESSER_HALF
    return out


def _best(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """bool [R, N]: the ``count`` [R] best ``among`` a row's tokens, ties the earlier."""
    order = torch.where(among, score, -1.0).argsort(dim=1, descending=True, stable=True)
    return _first(order, count) & among


def _first(order: Tensor, count: Tensor) -> Tensor:
    """bool [R, N]: the first ``count`` [R] of a row's ``order``."""
    first = torch.arange(order.shape[1]) < count.unsqueeze(1)
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order, first)


def _backbone(wanted: Tensor, shares: Tensor, free: Tensor, guard: Tensor, count: Tensor) -> Tensor:
    """bool [R, N]: guards, then by how many want a token, then by the sum of its shares, then by position."""
    votes = wanted.sum(0).masked_fill(guard, len(wanted) + 1).masked_fill(~free, -1)
    order = shares.sum(0).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, votes.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return _first(order, count) & free
