"""Plans of a cache: what its policy's roles see, what they say, and its application under the limit."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstrata.anchors import Anchors
from kvstrata.budget.costs import keeps_scores
from kvstrata.columns import checked
from kvstrata.config import SLOTS, BudgetExceeded, MachineError
from kvstrata.policy.base import FULL, STATES, Divides, Grouping, Plan, Seen
from kvstrata.policy.choose import at_most
from kvstrata.rows import Rows, Spans
from kvstrata.shares import Shares
from kvstrata.sight import address, see, sets_of
from kvstrata.statistics import Statistics
from kvstrata.timetable import Timetable

if TYPE_CHECKING:
    from kvstrata.cache import Cache

log = logging.getLogger("kvstrata")


class Plans:
    """Sees, scores, allocates, plans and applies for one cache. Knows each layer's last statistic and arithmetic."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._store = cache._store
        self.arithmetic: dict[int, tuple[float, float]] = {}
        """By layer: scale of q . k and softcap, as the model last used them."""
        self.statistics = Statistics()
        self.shares = Shares(cache, self.statistics)
        self.timetable = Timetable(cache)
        self._anchors = Anchors(cache)
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
        """One layer by itself, as in the middle of a prompt, by its part of what the limit leaves. ends: tokens after the
        step."""
        if layer not in self.layers:
            return
        seen = self._see(layer, ids, ends)
        if seen is None:
            return
        seen = replace(seen, prompt=True)
        allowance = None if self._cache.policy.allocator is None else self.shares.alone(seen, ids)
        if allowance is not None and self.shares.leaves(seen, allowance):
            self._leave([layer], ids)
            return
        seen = self._scored(seen, ids)
        if allowance is not None:
            seen = replace(seen, allowance=self.shares.chosen(seen, allowance, ids))
        self._apply(seen, ids)

    def compact(self, layer: int, seq: int, spans: Spans) -> None:
        """One layer of a sequence, by what queries beside its own see of it; in a step, after its tokens were appended."""
        if layer not in self.layers:
            return
        if (seen := self._see(layer, [seq], [self._store.seen(layer, seq)], spans)) is not None:
            self._apply(self._scored(seen, [seq]), [seq])

    def score(self, layer: int, seq: int, spans: Spans, since: int) -> None:
        """What queries beside its own see of one layer of a sequence joins the scores of its tokens from one on; in a step,
        after they were appended."""
        if (
            layer in self.layers
            and (seen := self._see(layer, [seq], [self._store.seen(layer, seq)], spans)) is not None
        ):
            self._scored(seen, [seq], since)

    def drop(self, layer: int, seq: int, keep: Tensor) -> None:
        """:meth:`kvstrata.Cache.drop`."""
        heads = self._cache.shape.layers[layer].kv_heads
        if keep.dtype != torch.bool or keep.dim() != 2 or keep.shape[0] != heads:
            raise ValueError(f"drop: keep is {keep.dtype} {list(keep.shape)}, expected torch.bool [{heads}, N]")
        columns = self._store.columns(layer, [seq])
        if keep.shape[1] < columns:
            raise ValueError(f"drop: keep has {keep.shape[1]} columns, expected at least the {columns} stored tokens")
        state = torch.empty(heads, columns, dtype=torch.uint8)
        self._store.look(layer, [seq], 0, 0, state.data_ptr(), 0, 0, 0, 0, columns)
        state *= keep[:, :columns]
        self._store.check_plan(layer, [seq], state.data_ptr(), 0, 0, columns, False)
        self.apply(layer, [seq], Plan(state), list(range(heads)))

    def regroup(self, seq: int, of: Tensor, count: int) -> None:
        """All layers of a sequence, by its scores: first how many tokens each row may show, then each layer's sets. of: i32
        [tokens], the episode of each."""
        policy, n = self._cache.policy, self._store.length(seq)
        if not policy.episodic or not keeps_scores(policy):
            raise ValueError(f"regroup: policy {policy.name!r}, expected one that names sets and keeps scores")
        if of.dtype != torch.int32 or of.shape != (n,) or n and not 0 <= int(of.min()) <= int(of.max()) < count:
            raise ValueError(
                f"regroup: of is {of.dtype} {list(of.shape)}, expected torch.int32 [{n}] in 0..{count - 1}"
            )
        planner = policy.planner
        found = [seen for layer in self.layers if (seen := self._grouped(layer, seq, of, count)) is not None]
        rows: list[Tensor] | None = None
        if found and isinstance(planner, Divides) and planner.heads == "model":
            rows = planner.over_layers(found)
        for i, layer in enumerate(seen.layer for seen in found):
            self._cache._views.open(layer, seq)
            try:
                again = self._grouped(layer, seq, of, count, rows[i] if rows else None)
                assert again is not None
                self._apply(again, [seq])
            finally:
                self._cache._views.close(layer, seq)

    def _grouped(self, layer: int, seq: int, of: Tensor, count: int, rows: Tensor | None = None) -> Seen | None:
        seen = self._see(layer, [seq], [self._store.length(seq)])
        if seen is None:
            return None
        assert isinstance(seen.read, Rows)
        episodes = of[seen.positions.clamp(0).long()].masked_fill(~seen.stored, -1)
        return replace(seen, score=seen.read.mass(), grouping=Grouping(count, episodes, rows))

    def run(self, ids: list[int], always: bool = True) -> None:
        """All layers: scores first, then each sequence's share of the limit divided over them, then each layer's plan; of what
        archives, each layer for itself. Sequences whose share holds all they have as it is are neither scored nor planned.
        always: whether or not something waits for that."""
        if self._cache.policy.archives:
            for layer in self.layers:
                self._archive(layer, ids, always and self._cache.policy.allocator is not None)
            return self.note(ids)
        ends = [self._store.length(i) for i in ids]
        if self.shares.are_roomy(ids):
            self._leave(self.layers, ids)
            return self.note(ids)
        found = [seen for layer in self.layers if (seen := self._see(layer, ids, ends)) is not None]
        if not found:
            return
        if left := self.shares.left_alone(found, ids):
            self.note(left)
            rest = [i for i in ids if i not in left]
            return self.run(rest) if rest else self._leave([seen.layer for seen in found], ids)
        found = [self._scored(seen, ids) for seen in found]
        if self._cache.policy.allocator is not None:
            found = self.shares.allocated(found, ids)
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
        self.shares.goal = limit, batch
        try:
            self.run(ids)
        finally:
            self.shares.goal = None

    @property
    def gives_way(self) -> bool:
        """Whether pages of the policy stay Near only as long as there is room."""
        policy, limited = self._cache.policy, self._cache._slabs.limit is not None
        return limited and policy.archives and policy.allocator is not None

    def give_way(self, ends: dict[int, int]) -> None:
        """Before a step is refused: what can leave the Near tier goes, as far as an eighth less than may be held asks. Not by
        plans that the step reserved in a ledger. ends: tokens after the step, of sequences that are cut in it."""
        live, bound = self._cache._live, self._cache._slabs.bound()
        assert bound is not None
        self.shares.goal = bound - bound // 8, len(live)
        try:
            with self._cache._charges.apart():
                for layer in self.layers:
                    self.cut(layer, live, [ends.get(i, self._store.length(i)) for i in live])
            self.note(live)
        finally:
            self.shares.goal = None

    def before(self, counts: dict[int, int], cut: list[int]) -> None:
        """Plans what a step finds unplanned, where the limit has no room for both: sequences that are cut share their room with
        the tokens of their interval, others must end within it. Before that, what sequences hold too much since more share
        the limit: those that came, or forks that part, are about to take it.

        counts: the step's tokens by sequence; cut: those of them that are cut inside the step.
        """
        crowded, due = self._first(counts, cut)
        if crowded:
            self.run(crowded)
        if due:
            self.run(due, always=False)

    def coming(self, counts: dict[int, int], cut: list[int]) -> int:
        """Plans of a layer that a step makes, at the most: before it, inside it and after it. As :meth:`before`."""
        crowded, due = self._first(counts, cut)
        before = len(self.layers) * bool(crowded)
        if self._cache.policy.archives:
            before += sum(any(self.timetable.is_waiting(layer, i) for i in due) for layer in self.layers)
        else:
            before += len(self.layers) * bool(due)
        return before + self.timetable.coming(counts, cut)

    def _first(self, counts: dict[int, int], cut: list[int]) -> tuple[list[int], list[int]]:
        """Sequences that are planned before a step: those that hold too much, and those that it finds unplanned."""
        if self._cache.policy.allocator is None:
            return [], []
        crowded = self._crowded()
        return crowded, [i for i, n in counts.items() if i not in crowded and self.timetable.too_many(i, n, i in cut)]

    def after(self, before: dict[int, int]) -> None:
        """Plans what is due since a step, by the lengths of its sequences before it.

        The tokens of the step stand, whatever is raised here, which says so. What archives can leave its own where they are: a
        plan that finds no room, or that the machine fails, is put off to the end of the layer's next interval, and counted by
        sequence. What a role of the policy raises by itself comes out.
        """
        try:
            if self._cache.policy.archives:
                for layer, due in self.timetable.after_of(before):
                    self._archive_or_put_off(layer, due)
            elif due := self.timetable.after(before):
                self.run(due)
        except Exception as error:
            error.add_note("raised by a plan after a step: the step's tokens stand")
            raise

    def seal(self, before: dict[int, int]) -> None:
        """What has left the tails of a step's sequences, and is Full yet, takes the format of the policy's ``on_seal``. before:
        their lengths before the step."""
        sealing = self._cache.policy.on_seal
        ids = [i for i, n in before.items() if n // SLOTS != self._store.length(i) // SLOTS]
        if sealing is None or not ids:
            return
        for layer in self.layers:
            seen = self._see(layer, ids, [self._store.length(i) for i in ids])
            if seen is None:
                continue
            fresh = seen.stored & ~seen.protected & (seen.state == FULL)
            self.counts["quantized"] += int(fresh.sum())
            plan = Plan(seen.state.masked_fill(fresh, STATES[sealing]))
            self.apply(layer, ids, plan, torch.nonzero(fresh.any(1)).flatten().tolist())

    def _archive_or_put_off(self, layer: int, ids: list[int]) -> None:
        """A sequence whose plan cannot be made holds up no other."""
        try:
            self._archive(layer, ids)
        except (BudgetExceeded, MachineError) as error:
            if len(ids) > 1:
                for i in ids:
                    self._archive_or_put_off(layer, [i])
                return
            self.counts["plans put off"] += 1
            if isinstance(error, MachineError):
                self._failed(layer, error)

    def _failed(self, layer: int, error: MachineError) -> None:
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
        return due if due and self.shares.content() else []

    def note(self, ids: list[int]) -> None:
        """All layers of the sequences were planned at their present lengths."""
        self._anchors.forget()
        self.timetable.note(ids, self.shares.goal[1] if self.shares.goal else len(self._cache._live))

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

    def _see(self, layer: int, ids: list[int], ends: list[int], spans: Spans | None = None) -> Seen | None:
        return see(self._cache, layer, ids, ends, self.arithmetic.get(layer), spans)

    def _scored(self, seen: Seen, ids: list[int], since: int = 0) -> Seen:
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
            score = torch.where(seen.positions >= since, score, last).contiguous()
            self._store.set_scores(seen.layer, ids, score.data_ptr(), score.shape[1])
        return replace(seen, score=score)

    # --- what is done -----------------------------------------------------------------------------------------------------

    def _apply(self, seen: Seen, ids: list[int]) -> None:
        planner = self._cache.policy.planner
        assert planner is not None
        self._cache._charges.plan()
        plan: Plan = self._anchors.plan(planner, seen, ids, self.layers)
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

    def _leave(self, layers: list[int], ids: list[int]) -> None:
        """Plans of layers that are sure to change nothing: they end before anything is scored, and count."""
        del ids
        for _ in layers:
            self._cache._charges.plan()
        self.counts["plans"] += len(layers)

    def _columns(self, seen: Seen, plan: Plan) -> Plan:
        """The plan with its columns checked; the state within what the budget counts. State and set are of its own: they are
        brought into the order of the tables as these change. No tier where the cache has no Far tier."""
        plan = replace(plan, state=seen.state if plan.state is None else plan.state)
        plan = checked(plan, seen.positions.shape, self._cache._slabs.has_far)
        assert plan.state is not None
        return replace(plan, state=self._capped(seen, plan.state), set=None if plan.set is None else plan.set.clone())

    def _capped(self, seen: Seen, state: Tensor) -> Tensor:
        """A copy of the planned states, within the tokens that a row may hold where the budget counts them."""
        most = self._cache._limit.most(self._cache.policy)
        if most is not None:
            score = seen.positions.to(torch.float32) if seen.score is None else seen.score
            state = at_most(state, score, seen.positions, seen.protected, most)
        return state.contiguous().clone()

    def apply(self, layer: int, ids: list[int], plan: Plan, rows: list[int]) -> None:
        """Changes the given rows to the plan's columns, which were checked, one after another: each whole, or where memory is
        short piece by piece, each piece whole. Rows of the state and set columns follow their tables' new order."""
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
