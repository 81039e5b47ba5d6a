"""What the rows of a cache may hold: its limit's content in equal shares of its sequences, and each share divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kvstrata.budget.allocate import AdaptiveHeads, RowsSeen, Uniform
from kvstrata.budget.costs import far_books, keeps_scores, page_costs
from kvstrata.budget.entropy import EntropyShare
from kvstrata.budget.knapsack import Knapsack
from kvstrata.budget.protect import pages
from kvstrata.columns import chosen_states, wide_columns
from kvstrata.config import SLOTS, Unsupported
from kvstrata.policy.base import FULL, STATES, Allowance, Seen
from kvstrata.statistics import Statistics

if TYPE_CHECKING:
    from kvstrata.cache import Cache

FRAGMENTS = 4
"""Pages of a row that are part-filled as groups are no multiples of a page, and its part of free ones in Far slabs."""


class Shares:
    """Divides what the limit of one cache leaves for unprotected tokens."""

    def __init__(self, cache: Cache, statistics: Statistics) -> None:
        self._cache = cache
        self._statistics = statistics
        self.goal: tuple[int, int] | None = None
        """Limit and sequences of a plan before they bind."""

    def content(self) -> int:
        """Bytes for unprotected tokens of one sequence: the same for each of the cache's, whichever are planned now. What one
        does not need is not lent to another, which would hold it yet when the first has grown."""
        cache = self._cache
        limit, batch = self.goal or (cache._slabs.limit, max(1, len(cache._live)))
        assert limit is not None
        if (own := cache._charges.limit()) is not None:
            limit = min(limit, own)
        return max(0, cache._limit.content(cache.policy, limit, batch)) // batch

    def equal(self, seen: Seen, ids: list[int]) -> Allowance:
        """A layer by itself: each of its rows as much as any other of its sequence."""
        cache = self._cache
        rows = sum(cache.shape.layers[i].kv_heads for i in cache._plans.layers)
        each = torch.div(self.content() - self._dense(seen.lengths), rows, rounding_mode="floor")
        if cache._slabs.has_far:  # all may go Far, and the books of Far pages are Near
            each -= far_books(cache.shape, seen.layer, cache.policy) * (_movable(seen) + FRAGMENTS)
        costs = page_costs(cache.shape, seen.layer, cache.policy)
        spare = cache._slabs.spare(len(cache._live) if cache._limit.each else 1)  # batch mates change nothing
        allowance = Allowance(each, costs, self._last_share(seen.layer, ids), spare=spare, most=self._most)
        if cache.policy.archives and not cache._slabs.has_far:
            return self._all_near(seen, allowance)
        return allowance

    def alone(self, seen: Seen, ids: list[int]) -> Allowance:
        """A layer by itself: its part of all layers, where the allocator asks for nothing that later layers have still to show;
        else an equal one."""
        allowance, allocator = self.equal(seen, ids), self._cache.policy.allocator
        if self._cache.policy.archives or allocator is None or allocator.needs or isinstance(allocator, Uniform):
            return allowance
        heads, n = self._cache.shape.layers[seen.layer].kv_heads, seen.positions.shape[0]
        parts = [self._part(seen, slice(r, r + heads), i) for r, i in zip(range(0, n, heads), ids, strict=True)]
        return replace(allowance, bytes=torch.cat(parts))

    def _part(self, seen: Seen, rows: slice, seq: int) -> Tensor:
        """Bytes of a layer's rows of one sequence, i64 [H], as its step goes through the layers: those before it are as they
        were cut, to those behind it the step's tokens come. Never more than what the others leave now."""
        cache, policy = self._cache, self._cache.policy
        assert policy.allocator is not None
        layers = cache._plans.layers
        at, coming = layers.index(seen.layer), int(seen.lengths[rows.start]) - cache._store.length(seq)
        guarded = (seen.stored & seen.protected).sum(1)[rows]
        costs = [page_costs(cache.shape, i, policy) for i in layers]
        stored = torch.tensor([[cache._store.stored(seq, i, h) for h in range(len(guarded))] for i in layers])
        behind = torch.arange(len(layers)).unsqueeze(1) > at
        free = (stored + coming * behind - guarded).clamp_min(0)
        own = (stored - guarded).clamp_min(0)
        held = torch.stack([self._held(i, seq, n, c) for i, n, c in zip(layers, own, costs, strict=True)])
        table = RowsSeen(
            tokens=free,
            page_bytes=torch.tensor([[cost[FULL] for cost in costs]]),
            unit=min(min(cost.values()) for cost in costs),
        )
        content = self.content() - int(self._dense(seen.lengths[rows][:1]))
        before = torch.arange(len(layers)).unsqueeze(1) < at
        cap = torch.where(before, held, table.full_bytes)
        given = policy.allocator.allocate(table, max(0, content), cap=cap).bytes[at]
        left = max(0, content - int(held.sum() - held[at].sum()))
        return given if int(given.sum()) <= left else torch.div(given * left, given.sum(), rounding_mode="floor")

    def _held(self, layer: int, seq: int, free: Tensor, costs: Mapping[int, int]) -> Tensor:
        """Bytes i64 [H] of a layer's unprotected tokens, so many in each row, of the states that the layer's are in."""
        slots, _, _ = self._cache._store.tally(layer, [seq])
        others = {state: slots[state] for state in costs if state != FULL}
        full = max(0, int(free.sum()) - sum(others.values()))
        mean = (full * costs[FULL] + sum(n * costs[s] for s, n in others.items())) // max(1, int(free.sum()))
        return -(-free // SLOTS) * min(mean, costs[FULL])

    # --- what needs no plan -----------------------------------------------------------------------------------------------

    def leaves(self, seen: Seen, allowance: Allowance) -> bool:
        """Whether a plan of a layer is sure to change nothing, whatever the scores: all is Full, and its bytes hold it so."""
        if not self._leaves_what_fits or not bool(self._as_it_is(seen).all()):
            return False
        return bool((_movable(seen) * allowance.page_bytes[FULL] <= allowance.bytes).all())

    def left_alone(self, found: list[Seen], ids: list[int]) -> list[int]:
        """Of sequences, seen in all layers, those where a plan is sure to change nothing, whatever the scores: all is Full,
        and an allocator, whose bytes sum to the least of share and caps, gives every row its cap. Where those are all of them,
        statistics that are due are measured."""
        if not self._leaves_what_fits or self._cache.policy.allocator is None:
            return []
        costs = [page_costs(self._cache.shape, seen.layer, self._cache.policy) for seen in found]
        unit = min(min(cost.values()) for cost in costs)
        units = sum(-(-_movable(seen) * cost[FULL] // unit) for seen, cost in zip(found, costs, strict=True))
        same = torch.stack([self._as_it_is(seen) for seen in found]).all(0)
        of = (len(ids), -1)
        fits = same.view(of).all(1) & (torch.as_tensor(units).view(of).sum(1) <= self.content() // unit)
        alone = [i for i, stays in zip(ids, fits.tolist(), strict=True) if stays]
        if len(alone) == len(ids) and "oq" in self._cache.policy.allocator.needs:
            for seen in found:
                self._measured(seen, ids)
        return alone

    def are_roomy(self, ids: list[int]) -> bool:
        """Whether sequences are sure to be left alone by what native counters say, without a look at their tokens: sinks and
        tails as if they were not protected, and no statistics are due."""
        cache, policy = self._cache, self._cache.policy
        if not self._leaves_what_fits or policy.allocator is None or not any(self._cache._store.length(i) for i in ids):
            return False
        layers = cache._plans.layers
        costs = {layer: page_costs(cache.shape, layer, policy) for layer in layers}
        unit, room = min(min(cost.values()) for cost in costs.values()), self.content()
        for i in ids:
            units = 0
            for layer in layers:
                rows = [cache._store.stored(i, layer, h) for h in range(cache.shape.layers[layer].kv_heads)]
                if self._most is not None and max(rows) > self._most:
                    return False
                units += sum(-(-pages(n) * costs[layer][FULL] // unit) for n in rows)
                slots, _, _ = cache._store.tally(layer, [i])
                if slots[FULL] != sum(rows) or self._is_due(layer, i):
                    return False
            if units > room // unit:
                return False
        return True

    def _is_due(self, layer: int, seq: int) -> bool:
        """Whether a layer's statistics are to be measured, if the allocator has any."""
        allocator = self._cache.policy.allocator
        if not isinstance(allocator, EntropyShare) or allocator.queries == 0:
            return False
        return any(self._statistics.due(layer, [seq], [self._cache._store.length(seq)], allocator.every))

    @property
    def _leaves_what_fits(self) -> bool:
        """Whether the planner's word does, and no score is kept that a plan would change."""
        policy = self._cache.policy
        joins = keeps_scores(policy) and policy.combine != "replace"
        return bool(getattr(policy.planner, "leaves_what_fits", False)) and not joins

    def _as_it_is(self, seen: Seen) -> Tensor:
        """bool [R]: rows whose unprotected tokens are Full, no more of all than the budget counts."""
        full = ((seen.state == FULL) | ~seen.stored | seen.protected).all(1)
        return full if self._most is None else full & (seen.stored.sum(1) <= self._most)

    @property
    def _most(self) -> int | None:
        """Tokens that a plan may leave in a row where the budget counts them."""
        return self._cache._limit.most(self._cache.policy)

    # --- what is divided --------------------------------------------------------------------------------------------------

    def _dense(self, lengths: Tensor) -> Tensor:
        """Bytes that sequences of so many tokens hold, sinks and tails excepted, where nothing is planned."""
        policy, shape = self._cache.policy, self._cache.shape
        assert policy.window is not None
        dense = [i for i in policy.dense_layers if shape.layers[i].window is None]
        page = sum(shape.layers[i].kv_heads * page_costs(shape, i, policy)[FULL] for i in dense)
        held = pages(policy.sinks) + policy.window // SLOTS + 1
        return page * (-(-lengths // SLOTS) - held).clamp_min(0)

    def _all_near(self, seen: Seen, allowance: Allowance) -> Allowance:
        """Without a Far tier every page is Near: the bytes are what is left once all of them are in the state of archived ones,
        and a Full page costs what it takes beyond that; where it takes no more, all may stay Full."""
        costs, state = allowance.page_bytes, int(getattr(self._cache.policy.planner, "native_state", FULL))
        more = costs[FULL] - costs[state]
        if more == 0:
            return replace(allowance, bytes=torch.full_like(allowance.bytes, 1 << 40), spare=1 << 40)
        left = allowance.bytes - costs[state] * _movable(seen)
        return replace(
            allowance, bytes=left, page_bytes={**costs, FULL: more}, spare=allowance.spare * more // costs[FULL]
        )

    def _last_share(self, layer: int, ids: list[int]) -> Tensor | None:
        """The share of a layer's rows that stays Full by the statistics of the last plan, f32 [R]; None: the planner's own."""
        allocator, shape = self._cache.policy.allocator, self._cache.shape
        if allocator is None or "oq" not in allocator.needs:
            return None
        heads = shape.layers[layer].kv_heads
        oq = torch.stack([self._statistics.oq(i, ids, heads) for i in self._cache._plans.layers])
        nothing = torch.zeros(oq.shape, dtype=torch.int64)
        sequence = torch.arange(len(ids)).repeat_interleave(heads)
        table = RowsSeen(nothing, torch.ones(1, len(oq), dtype=torch.int64), oq=oq, sequence=sequence)
        share: Tensor | None = allocator.allocate(table, 0).full_share
        return None if share is None else share[self._cache._plans.layers.index(layer)]

    def allocated(self, found: list[Seen], ids: list[int]) -> list[Seen]:
        """Each sequence's share divided over its own rows: batch mates change nothing."""
        cache, allocator = self._cache, self._cache.policy.allocator
        assert allocator is not None
        costs = [page_costs(cache.shape, seen.layer, cache.policy) for seen in found]
        table = self._table(found, costs, ids)
        if "mass" in allocator.needs and found[0].score is None:
            raise Unsupported(f"policy {cache.policy.name!r}: its allocator needs scores, it has no scorer")
        share = self.content()
        given = [allocator.allocate(table.of(rows), share) for rows in table.sequences()]
        each = torch.cat([g.bytes for g in given], 1)
        shares = torch.cat([g.full_share for g in given], 1) if given[0].full_share is not None else None
        formats = torch.cat([g.formats for g in given], 1) if given[0].formats is not None else None
        out = []
        for i, seen in enumerate(found):
            full = None if shares is None else shares[i]
            states = None if formats is None else chosen_states(seen, formats[i], costs[i])
            out.append(replace(seen, allowance=Allowance(each[i], costs[i], full, states, most=self._most)))
        return out

    def chosen(self, seen: Seen, allowance: Allowance, ids: list[int]) -> Allowance:
        """A layer by itself, where the allocator goes by scores of tokens: so within the equal shares of its rows together."""
        allocator = self._cache.policy.allocator
        if not isinstance(allocator, AdaptiveHeads | Knapsack) or seen.score is None:
            return allowance
        if isinstance(allocator, Knapsack):
            allocator = replace(allocator, layer_weight=None)  # the same for all there are
        costs = dict(allowance.page_bytes)
        table = self._table([seen], [costs], ids)
        shares = [(rows, int(allowance.bytes[rows].clamp_min(0).sum())) for rows in table.sequences()]
        given = [allocator.allocate(table.of(rows), share) for rows, share in shares]
        if isinstance(allocator, AdaptiveHeads):
            return replace(allowance, bytes=torch.cat([g.bytes[0] for g in given]))
        formats = torch.cat([g.formats[0] for g in given if g.formats is not None])
        return replace(allowance, formats=chosen_states(seen, formats, costs))

    def _table(self, found: list[Seen], costs: list[Any], ids: list[int]) -> RowsSeen:
        """[L, R, N] of unprotected tokens, moved to the front of each row."""
        allocator = self._cache.policy.allocator
        assert allocator is not None
        free = [seen.stored & ~seen.protected for seen in found]
        states = sorted(costs[0])
        wide: dict[str, Tensor] = {}
        if allocator.needs & {"mass"}:
            wide = wide_columns(found, free, states, getattr(allocator, "metric", "mass") == "energy")
        more: dict[str, Tensor] = {}
        if "oq" in allocator.needs:
            more["oq"] = torch.stack([self._measured(seen, ids) for seen in found])
        per_sequence = found[0].positions.shape[0] // len(ids)
        return RowsSeen(
            tokens=torch.stack([f.sum(1) for f in free]),
            page_bytes=torch.tensor([[cost[s] for cost in costs] for s in states]),
            formats=tuple("full" if s == FULL else next(n for n, t in STATES.items() if t == s) for s in states),
            unit=min(min(cost.values()) for cost in costs),
            sequence=torch.arange(len(ids)).repeat_interleave(per_sequence),
            **wide,
            **more,
        )

    def _measured(self, seen: Seen, ids: list[int]) -> Tensor:
        """OQ of each row, f32 [R], where its sequence is due; else, and where there is too little to tell, the last."""
        heads = self._cache.shape.layers[seen.layer].kv_heads
        allocator = cast(EntropyShare, self._cache.policy.allocator)
        assert seen.read is not None
        last = self._statistics.oq(seen.layer, ids, heads)
        lengths = [self._cache._store.length(i) for i in ids]
        due = self._statistics.due(seen.layer, ids, lengths, allocator.every)
        if not any(due) or allocator.queries == 0:
            return last
        queries = torch.tensor([self._cache._store.queries(seen.layer, i, 0) for i in ids]).repeat_interleave(heads)
        measured = seen.read.statistics(allocator.queries, allocator.stats)
        new = torch.tensor(due).repeat_interleave(heads)
        new &= allocator.known(queries, seen.stored.sum(1) - queries)
        oq = torch.where(new, allocator.oq(measured), last)
        values = torch.where(new[:, None], measured.mean(1), self._statistics.values(seen.layer, ids, heads))
        for b, i in enumerate(ids):
            rows = slice(b * heads, (b + 1) * heads)
            if bool(new[rows].any()):
                self._statistics.note(seen.layer, i, values[rows], oq[rows], lengths[b])
        return oq


def _movable(seen: Seen) -> Tensor:
    """i64 [R]: pages' worth of tokens that are neither sinks nor in the tail."""
    return -(-(seen.stored & ~seen.protected).sum(1) // SLOTS)
