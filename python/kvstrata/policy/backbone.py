"""``Backbone``: what all episodes need is kept once, what one alone needs in a set of its own."""

from __future__ import annotations

from dataclasses import dataclass
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
    equally; private: "full", or the quantized format of private sets; kernel: stored tokens at most kernel // 2 positions away
    lend their score (SnapKV's pooling, with which what follows a token that is attended to stays with it; 1: paper). budget,
    layers and recent are multiples of 16.

    With b of a row, E episodes and its scores s_e (:class:`kvstrata.policy.patched.PatchedPrompt`): the backbone has
    pad(share * (b - r)) tokens, each set what is left of b - r; one episode has no set. Episode e wants the b - r best by s_e.
    The backbone takes sinks, then tokens by how many want them, then by the sum of s_e / sum(s_e). Another token that is wanted
    goes to the episode that wants it with the largest such share, as far as its set has room; sets with room take their best of
    the rest. What is in no set is evicted. Ties: lower episode, lower position. Deviation: the paper keeps E whole caches.
    """

    budget: int
    recent: int = 64
    share: float = 2 / 3
    heads: Literal["pair", "uniform"] = "pair"
    head_floor: float = 0.25
    layers: tuple[int, ...] | None = None
    private: str = "full"
    kernel: int = 17
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
        if self.heads not in ("pair", "uniform"):
            raise ValueError(f"Backbone: heads is {self.heads!r}, expected 'pair' or 'uniform'")
        if not 0 <= self.head_floor <= 1:
            raise ValueError(f"Backbone: head_floor is {self.head_floor}, expected 0 to 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"Backbone: kernel is {self.kernel}, expected odd and >= 1")
        if self.private != "full" and self.private not in STATES:
            raise ValueError(f"Backbone: private is {self.private!r}, expected 'full' or one of {', '.join(STATES)}")

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
        score = torch.where(score.isfinite(), score, 0.0).gather(2, order.expand(score.shape))
        free, guard = ((x & seen.stored).gather(1, order) for x in (~seen.open, seen.positions < seen.sinks))
        b = self._rows(seen, score.amax(0), free, len(score))
        sizes = torch.tensor([self.sizes(n, len(score)) for n in b.tolist()])
        chosen = choose_sets(score, free, guard & free, b - self.recent, sizes[:, 0], sizes[:, 1])
        chosen = halve(chosen, score)
        sets = torch.full_like(chosen, -1).scatter(1, order, chosen)
        sets = torch.where(seen.open, PENDING, sets)
        state = self._states(seen, sets)
        return Plan(state=state, set=torch.where(sets < 0, BACKBONE, sets).to(torch.uint16))

    def _pooled(self, seen: Seen) -> Tensor:
        """Scores by episode, f32 [E, R, N], in table order."""
        assert seen.read is not None
        score = seen.read.patched()
        if self.kernel == 1:
            return score
        return torch.stack([seen.read.pool(s, self.kernel, "max", "present") for s in score])

    def _rows(self, seen: Seen, pooled: Tensor, free: Tensor, episodes: int) -> Tensor:
        """b of each row, i64 [R]: exactly as many tokens as the layer has. pooled: f32 [R, N]."""
        rows, b = pooled.shape[0], self.of_layer(seen.layer)
        if self.heads == "uniform" or rows == 1:
            return torch.full((rows,), b)
        best = torch.where(free, pooled, -1.0).flatten().sort(descending=True, stable=True).indices
        best = best[: min(rows * (b - self.recent), int(free.sum()))]
        counts = torch.bincount(best // pooled.shape[1], minlength=rows)
        least = self.floor(seen.layer, seen.sinks, episodes) // SLOTS
        return torch.from_numpy(split(rows * b // SLOTS, counts.numpy(), [least] * rows)) * SLOTS

    def _states(self, seen: Seen, sets: Tensor) -> Tensor:
        """Private tokens in their format, others as they are: bits only fall."""
        private = (sets > BACKBONE) & (sets != PENDING)
        fallen = torch.where(private, self.native_state, FULL)
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
