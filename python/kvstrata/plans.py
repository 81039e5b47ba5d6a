"""Plans of a cache: what its policy's roles see, what they say, and its application under the limit."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kvstrata.budget.allocate import RowsSeen
from kvstrata.budget.costs import far_books, keeps_scores, page_costs
from kvstrata.budget.entropy import EntropyShare
from kvstrata.columns import checked, chosen_states, wide_columns
from kvstrata.config import SLOTS, BudgetExceeded, Unsupported
from kvstrata.policy.base import FULL, STATES, Allowance, Plan, Seen
from kvstrata.policy.choose import at_most
from kvstrata.rows import Rows, Spans
from kvstrata.sight import address, see, sets_of
from kvstrata.statistics import Statistics
from kvstrata.timetable import Timetable

if TYPE_CHECKING:
    from kvstrata.cache import Cache

FRAGMENTS = 4
"""Pages of a row that are part-filled as groups are no multiples of a page, and its part of free ones in Far slabs."""

log = logging.getLogger("kvstrata")


class Plans:
    """Sees, scores, allocates, plans and applies for one cache. Knows each layer's last statistic and arithmetic."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._store = cache._store
        self.arithmetic: dict[int, tuple[float, float]] = {}
        """By layer: scale of q . k and softcap, as the model last used them."""
        self.statistics = Statistics()
        self.timetable = Timetable(cache)
        self._goal: tuple[int, int] | None = None  # limit and sequences of a plan before they bind
        self.counts = {
            "plans": 0,
            "evicted": 0,
            "quantized": 0,
            "archived": 0,
            "non-finite scores": 0,
            "plans put off": 0,
            "plans failed": 0,
        }

    @property
    def layers(self) -> list[int]:
        """Those that are planned: full attention, unless the policy leaves them dense."""
        dense = self._cache.policy.dense_layers
        return [i for i, spec in enumerate(self._cache.shape.layers) if spec.window is None and i not in dense]

    def cut(self, layer: int, ids: list[int], ends: list[int]) -> None:
        """One layer by itself, as in the middle of a prompt, by an equal share of what the limit leaves. ends: tokens after the
        step."""
        if layer not in self.layers:
            return
        seen = self._see(layer, ids, ends)
        if seen is None:
            return
        seen = self._scored(seen, ids)
        if self._cache.policy.allocator is not None:
            seen = replace(seen, allowance=self._equal_share(seen, ids))
        self._apply(seen, ids)

    def compact(self, layer: int, seq: int, spans: Spans) -> None:
        """One layer of a sequence, by what queries beside its own see of it; in a step, after its tokens were appended."""
        if layer not in self.layers:
            return
        seen = see(self._cache, layer, [seq], [self._store.seen(layer, seq)], self.arithmetic.get(layer), spans)
        if seen is not None:
            self._apply(self._scored(seen, [seq]), [seq])

    def run(self, ids: list[int], always: bool = True) -> None:
        """All layers: scores first, then each sequence's share of the limit divided over them, then each layer's plan; of what
        archives, each layer for itself. always: whether or not something waits for that."""
        if self._cache.policy.archives:
            for layer in self.layers:
                self._archive(layer, ids, always and self._cache.policy.allocator is not None)
            self.note(ids)
            return
        ends = [self._store.length(i) for i in ids]
        found = [seen for layer in self.layers if (seen := self._see(layer, ids, ends)) is not None]
        if not found:
            return
        found = [self._scored(seen, ids) for seen in found]
        if self._cache.policy.allocator is not None:
            found = self._allocated(found, ids)
        for seen in found:
            self._apply(seen, ids)
        self.note(ids)

    def _archive(self, layer: int, ids: list[int], always: bool = False) -> None:
        """A layer of those sequences that have something to archive."""
        due = [i for i in ids if always or self.timetable.is_waiting(layer, i)]
        if due:
            self.cut(layer, due, [self._store.length(i) for i in due])

    def ahead(self, ids: list[int], limit: int, batch: int) -> None:
        """All layers, for a lower limit or more sequences than now; the present limit leaves the room that rewriting takes."""
        self._goal = limit, batch
        try:
            self.run(ids)
        finally:
            self._goal = None

    def give_way(self) -> bool:
        """Before a step is refused: what can leave the Near tier goes, as far as a limit of an eighth less asks. False where
        the policy moves nothing."""
        limit = self._cache._slabs.limit
        if limit is None or not self._cache.policy.archives or self._cache.policy.allocator is None:
            return False
        self.ahead(self._cache._live, limit - limit // 8, len(self._cache._live))
        return True

    def before(self, counts: dict[int, int], cut: list[int]) -> None:
        """Plans what a step finds unplanned, where the limit has no room for both: sequences that are cut share their room with
        the tokens of their interval, others must end within it. Before that, what sequences hold too much since more share
        the limit: those that came, or forks that part, are about to take it.

        counts: the step's tokens by sequence; cut: those of them that are cut inside the step.
        """
        if self._cache.policy.allocator is None:
            return
        if crowded := self._crowded():
            self.run(crowded)
        due = [i for i, n in counts.items() if i not in crowded and self.timetable.too_many(i, n, i in cut)]
        if due:
            self.run(due, always=False)

    def after(self, before: dict[int, int]) -> None:
        """Plans what is due since a step, by the lengths of its sequences before it.

        The tokens of the step stand. What archives can leave its own where they are: a plan that finds no room, or that the
        machine fails, is put off to the end of the layer's next interval, and counted by sequence.
        """
        if not self._cache.policy.archives:
            if due := self.timetable.after(before):
                self.run(due)
            return
        for layer, due in self.timetable.after_of(before):
            self._archive_or_put_off(layer, due)

    def _archive_or_put_off(self, layer: int, ids: list[int]) -> None:
        """A sequence whose plan cannot be made holds up no other."""
        try:
            self._archive(layer, ids)
        except (BudgetExceeded, RuntimeError) as error:
            if len(ids) > 1:
                for i in ids:
                    self._archive_or_put_off(layer, [i])
                return
            self.counts["plans put off"] += 1
            if isinstance(error, RuntimeError):
                self._failed(layer, error)

    def _failed(self, layer: int, error: RuntimeError) -> None:
        """Says once that the machine failed a plan after a step, and counts it."""
        level = logging.DEBUG if self.counts["plans failed"] else logging.WARNING
        self.counts["plans failed"] += 1
        log.log(level, "the plan of layer %d failed after a step, it is put off: %s", layer, error, exc_info=error)

    def _crowded(self) -> list[int]:
        """Sequences that were planned last when fewer shared the limit; none where there is no share for so many: such a step
        may be refused, and must have changed nothing then."""
        if self._cache._limit.each:
            return []
        due = self.timetable.crowded()
        return due if due and self._share() else []

    def note(self, ids: list[int]) -> None:
        """All layers of the sequences were planned at their present lengths."""
        self.timetable.note(ids, self._goal[1] if self._goal else len(self._cache._live))

    def cropped(self, seq: int, length: int) -> None:
        """The sequence was shortened."""
        self.timetable.cropped(seq, length)
        self.statistics.cropped(seq, length)

    def follow(self, ids: list[int], sources: list[int]) -> None:
        """What is known of ``sources`` holds for the sequences ``ids`` that continue them."""
        for i, source in zip(ids, sources, strict=True):
            self.timetable.follow(i, source)
            self.statistics.follow(i, source)

    def forget(self, ids: list[int]) -> None:
        """Drops what is known of sequences that ended."""
        self.timetable.forget(set(ids))
        self.statistics.forget(set(ids))

    # --- what is seen -----------------------------------------------------------------------------------------------------

    def _see(self, layer: int, ids: list[int], ends: list[int]) -> Seen | None:
        return see(self._cache, layer, ids, ends, self.arithmetic.get(layer))

    def _scored(self, seen: Seen, ids: list[int]) -> Seen:
        policy = self._cache.policy
        if policy.scorer is None:
            return seen
        score = policy.scorer.score(seen)
        if score.dtype != torch.float32 or score.shape != seen.positions.shape:
            raise ValueError(
                f"score: {type(policy.scorer).__name__} gave {score.dtype} {list(score.shape)}, expected torch.float32"
                f" {list(seen.positions.shape)}"
            )
        self.counts["non-finite scores"] += int((~score.isfinite() & seen.stored).sum())
        if keeps_scores(policy) and "mass" not in policy.scorer.needs:
            assert isinstance(seen.read, Rows)
            last = seen.read.mass()
            score = last + score if policy.combine == "sum" else torch.maximum(policy.decay * last, score)
            score = score.contiguous()
            self._store.set_scores(seen.layer, ids, score.data_ptr(), score.shape[1])
        return replace(seen, score=score)

    def _measured(self, seen: Seen, ids: list[int]) -> Tensor:
        """OQ of each row, f32 [R], where its sequence is due; else, and where there is too little to tell, the last."""
        heads = self._cache.shape.layers[seen.layer].kv_heads
        allocator = cast(EntropyShare, self._cache.policy.allocator)
        assert seen.read is not None
        last = self.statistics.oq(seen.layer, ids, heads)
        lengths = [self._store.length(i) for i in ids]
        due = self.statistics.due(seen.layer, ids, lengths, allocator.every)
        if not any(due) or allocator.queries == 0:
            return last
        queries = torch.tensor([self._store.queries(seen.layer, i, 0) for i in ids]).repeat_interleave(heads)
        measured = seen.read.statistics(allocator.queries, allocator.stats)
        new = torch.tensor(due).repeat_interleave(heads)
        new &= allocator.known(queries, seen.stored.sum(1) - queries)
        oq = torch.where(new, allocator.oq(measured), last)
        values = torch.where(new[:, None], measured.mean(1), self.statistics.values(seen.layer, ids, heads))
        for b, i in enumerate(ids):
            rows = slice(b * heads, (b + 1) * heads)
            if bool(new[rows].any()):
                self.statistics.note(seen.layer, i, values[rows], oq[rows], lengths[b])
        return oq

    # --- what they may hold -------------------------------------------------------------------------------------------------

    def _share(self) -> int:
        """Bytes for unprotected tokens of one sequence: the same for each of the cache's, whichever are planned now. What one
        does not need is not lent to another, which would hold it yet when the first has grown."""
        cache = self._cache
        limit, batch = self._goal or (cache._slabs.limit, max(1, len(cache._live)))
        assert limit is not None
        return max(0, cache._limit.content(cache.policy, limit, batch)) // batch

    def _equal_share(self, seen: Seen, ids: list[int]) -> Allowance:
        cache = self._cache
        rows = sum(cache.shape.layers[i].kv_heads for i in self.layers)
        each = torch.full((seen.positions.shape[0],), self._share() // rows, dtype=torch.int64)
        if cache._slabs.has_far:  # all may go Far, and the books of Far pages are Near
            movable = (seen.stored & ~seen.protected).sum(1)
            each -= far_books(cache.shape, seen.layer, cache.policy) * (-(-movable // SLOTS) + FRAGMENTS)
        costs = page_costs(cache.shape, seen.layer, cache.policy)
        spare = cache._slabs.spare(len(cache._live) if cache._limit.each else 1)  # batch mates change nothing
        allowance = Allowance(each, costs, self._last_share(seen.layer, ids), spare=spare)
        if cache.policy.archives and not cache._slabs.has_far:
            return self._all_near(seen, allowance)
        return allowance

    def _all_near(self, seen: Seen, allowance: Allowance) -> Allowance:
        """Without a Far tier every page is Near: the bytes are what is left once all of them are in the state of archived ones,
        and a Full page costs what it takes beyond that; where it takes no more, all may stay Full."""
        costs, state = allowance.page_bytes, int(getattr(self._cache.policy.planner, "native_state", FULL))
        more = costs[FULL] - costs[state]
        if more == 0:
            return replace(allowance, bytes=torch.full_like(allowance.bytes, 1 << 40), spare=1 << 40)
        pages = -(-(seen.stored & ~seen.protected).sum(1) // SLOTS)
        left = allowance.bytes - costs[state] * pages
        return replace(
            allowance, bytes=left, page_bytes={**costs, FULL: more}, spare=allowance.spare * more // costs[FULL]
        )

    def _last_share(self, layer: int, ids: list[int]) -> Tensor | None:
        """The share of a layer's rows that stays Full by the statistics of the last plan, f32 [R]; None: the planner's own."""
        allocator, shape = self._cache.policy.allocator, self._cache.shape
        if allocator is None or "oq" not in allocator.needs:
            return None
        heads = shape.layers[layer].kv_heads
        oq = torch.stack([self.statistics.oq(i, ids, heads) for i in self.layers])
        nothing = torch.zeros(oq.shape, dtype=torch.int64)
        sequence = torch.arange(len(ids)).repeat_interleave(heads)
        table = RowsSeen(nothing, torch.ones(1, len(oq), dtype=torch.int64), oq=oq, sequence=sequence)
        share: Tensor | None = allocator.allocate(table, 0).full_share
        return None if share is None else share[self.layers.index(layer)]

    def _allocated(self, found: list[Seen], ids: list[int]) -> list[Seen]:
        """Each sequence's share divided over its own rows: batch mates change nothing."""
        cache, allocator = self._cache, self._cache.policy.allocator
        assert allocator is not None
        costs = [page_costs(cache.shape, seen.layer, cache.policy) for seen in found]
        table = self._table(found, costs, ids)
        if "mass" in allocator.needs and found[0].score is None:
            raise Unsupported(f"policy {cache.policy.name!r}: its allocator needs scores, it has no scorer")
        share = self._share()
        given = [allocator.allocate(table.of(rows), share) for rows in table.sequences()]
        each = torch.cat([g.bytes for g in given], 1)
        shares = torch.cat([g.full_share for g in given], 1) if given[0].full_share is not None else None
        formats = torch.cat([g.formats for g in given], 1) if given[0].formats is not None else None
        out = []
        for i, seen in enumerate(found):
            full = None if shares is None else shares[i]
            states = None if formats is None else chosen_states(seen, formats[i], costs[i])
            out.append(replace(seen, allowance=Allowance(each[i], costs[i], full, states)))
        return out

    def _table(self, found: list[Seen], costs: list[Any], ids: list[int]) -> RowsSeen:
        """[L, R, N] of unprotected tokens, moved to the front of each row."""
        allocator = self._cache.policy.allocator
        assert allocator is not None
        free = [seen.stored & ~seen.protected for seen in found]
        states = sorted(costs[0])
        wide: dict[str, Tensor] = {}
        if allocator.needs & {"mass"}:
            wide = wide_columns(found, free, states)
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

    # --- what is done -----------------------------------------------------------------------------------------------------

    def _apply(self, seen: Seen, ids: list[int]) -> None:
        planner = self._cache.policy.planner
        assert planner is not None
        self._cache._charges.plan()
        plan: Plan = planner.plan(seen)
        self.counts["plans"] += 1
        if plan.set is not None and not self._cache.policy.episodic:
            raise ValueError(f"plan: set is given, {type(planner).__name__} says nothing of sets (names_sets)")
        if all(column is None for column in (plan.state, plan.tier, plan.group, plan.set)):
            return
        plan = self._columns(seen, plan)
        assert plan.state is not None
        where = (address(plan.tier), address(plan.group), plan.state.shape[1])
        self._store.check_plan(seen.layer, ids, plan.state.data_ptr(), *where, True, address(plan.set))
        changed = (plan.state != seen.state) & seen.stored
        self.counts["evicted"] += int((changed & (plan.state == 0)).sum())
        self.counts["quantized"] += int((changed & (plan.state > FULL)).sum())
        if plan.tier is not None and seen.tier is not None:
            moved = (plan.tier != seen.tier) & seen.stored
            self.counts["archived"] += int(moved.sum())
            changed |= moved
        if plan.group is not None:
            changed |= plan.group >= 0
        if plan.set is not None:
            changed |= plan.set.int() != sets_of(self._cache, seen, ids).int()
        self.apply(seen.layer, ids, plan, torch.nonzero(changed.any(1)).flatten().tolist())

    def _columns(self, seen: Seen, plan: Plan) -> Plan:
        """The plan with its columns checked; the state within what the budget counts, and of its own: it is brought into the
        order of the tables as they change. No tier where the cache has no Far tier."""
        plan = replace(plan, state=seen.state if plan.state is None else plan.state)
        plan = checked(plan, seen.positions.shape, self._cache._slabs.has_far)
        assert plan.state is not None
        return replace(plan, state=self._capped(seen, plan.state))

    def _capped(self, seen: Seen, state: Tensor) -> Tensor:
        """A copy of the planned states, within the tokens that a row may hold where the budget counts them."""
        most = self._cache._limit.most(self._cache.policy)
        if most is not None:
            score = seen.positions.to(torch.float32) if seen.score is None else seen.score
            state = at_most(state, score, seen.positions, seen.protected, most)
        return state.contiguous().clone()

    def apply(self, layer: int, ids: list[int], plan: Plan, rows: list[int]) -> None:
        """Changes the given rows to the plan's columns, which were checked, one after another: each whole, or where memory is
        short piece by piece, each piece whole. Rows of the state column follow their tables' new order."""
        heads = self._cache.shape.layers[layer].kv_heads
        assert plan.state is not None
        try:
            for r in rows:
                seq, head = ids[r // heads], r % heads
                tier, group, sets = (0 if c is None else c[r].data_ptr() for c in (plan.tier, plan.group, plan.set))
                columns = plan.state[r].data_ptr(), tier, group, sets
                more = True
                while more:
                    most = self._cache._slabs.reserve_plan(layer, seq, head, columns)
                    more = self._store.apply_plan(layer, seq, head, *columns[:3], most, sets)
        finally:
            self._cache._slabs.settle()
