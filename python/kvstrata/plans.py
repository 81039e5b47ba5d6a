"""Plans of a cache: what its policy's roles see, what they say, and its application under the limit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvstrata.budget.allocate import RowsSeen
from kvstrata.budget.room import keeps_scores, page_costs
from kvstrata.config import Unsupported
from kvstrata.policy.base import FULL, STATES, Allowance, Plan, Seen
from kvstrata.policy.choose import at_most
from kvstrata.rows import Rows

if TYPE_CHECKING:
    from kvstrata.cache import Cache


class Plans:
    """Sees, scores, allocates, plans and applies for one cache. Knows each layer's last statistic and arithmetic."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._store = cache._store
        self.arithmetic: dict[int, tuple[float, float]] = {}
        """By layer: scale of q . k and softcap, as the model last used them."""
        self.statistics: dict[tuple[int, int], Tensor] = {}
        """By (layer, sequence): OQ of its rows, f32 [H]."""
        self.planned: dict[int, int] = {}
        """By sequence: its length when all its layers were planned last."""
        self._goal: tuple[int, int] | None = None  # limit and sequences of a plan before they bind
        self.counts = {"plans": 0, "evicted": 0, "quantized": 0, "non-finite scores": 0, "plans put off": 0}

    @property
    def layers(self) -> list[int]:
        """Those that are planned: full attention."""
        return [i for i, spec in enumerate(self._cache.shape.layers) if spec.window is None]

    def cut(self, layer: int, ids: list[int], ends: list[int]) -> None:
        """One layer in the middle of a prompt, by an equal share of what the limit leaves. ends: tokens after the step."""
        seen = self._see(layer, ids, ends)
        if seen is None:
            return
        seen = self._scored(seen, ids)
        if self._cache.policy.allocator is not None:
            seen = replace(seen, allowance=self._equal_share(seen, ids))
        self._apply(seen, ids)

    def run(self, ids: list[int]) -> None:
        """All layers: scores first, then one division of the limit over them, then each layer's plan. Where each sequence has
        a limit of its own, one after another."""
        if self._cache._limit.each and len(ids) > 1:
            for i in ids:
                self.run([i])
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

    def ahead(self, ids: list[int], limit: int, batch: int) -> None:
        """All layers, for a lower limit or more sequences than now; the present limit leaves the room that rewriting takes."""
        self._goal = limit, batch
        try:
            self.run(ids)
        finally:
            self._goal = None

    def before(self, ids: list[int], counts: list[int], cut: bool) -> None:
        """Plans what a step of so many tokens for each of ``ids`` finds unplanned, where the limit has no room for both: a step
        that is cut shares its room with the tokens of an interval in all sequences, others must end within the interval."""
        if self._cache.policy.allocator is None or max(counts) <= 1:
            return
        new = dict(zip(ids, counts, strict=True))
        most = 0 if cut else self._cache.policy.interval
        waiting = {i: self._store.length(i) - self.planned.get(i, 0) for i in (self._cache._live if cut else ids)}
        due = [i for i, n in waiting.items() if n > 0 and n + (0 if cut else new[i]) > most]
        if due:
            self.run(due)

    def coming(self, ids: list[int], counts: list[int], cut: bool) -> int:
        """Plans of a layer that a step makes which brings so many tokens to its sequences."""
        policy = self._cache.policy
        if policy.planner is None:
            return 0
        ends = [(self._store.length(i), self._store.length(i) + n) for i, n in zip(ids, counts, strict=True)]
        due = [first // policy.interval != last // policy.interval for first, last in ends]
        whole = sum(due) if self._cache._limit.each else int(any(due))
        return len(self.layers) * (whole + (-(-max(counts) // policy.chunk) if cut else 0))

    def note(self, ids: list[int]) -> None:
        """All layers of the sequences were planned at their present lengths."""
        self.planned |= {i: self._store.length(i) for i in ids}

    def cropped(self, seq: int, length: int) -> None:
        """The sequence was shortened."""
        self.planned[seq] = min(self.planned.get(seq, 0), length)

    def follow(self, ids: list[int], sources: list[int]) -> None:
        """What is known of ``sources`` holds for the sequences ``ids`` that continue them."""
        for i, source in zip(ids, sources, strict=True):
            self.planned[i] = self.planned.get(source, 0)
            known = {layer: oq for (layer, seq), oq in self.statistics.items() if seq == source}
            self.statistics |= {(layer, i): oq for layer, oq in known.items()}

    def forget(self, ids: list[int]) -> None:
        """Drops what is known of sequences that ended."""
        gone = set(ids)
        self.statistics = {key: value for key, value in self.statistics.items() if key[1] not in gone}
        self.planned = {i: n for i, n in self.planned.items() if i not in gone}

    # --- what is seen -----------------------------------------------------------------------------------------------------

    def _see(self, layer: int, ids: list[int], ends: list[int]) -> Seen | None:
        spec = self._cache.shape.layers[layer]
        columns = self._store.columns(layer, ids)
        if spec.window is not None or columns == 0:
            return None
        rows = len(ids) * spec.kv_heads
        positions = torch.empty(rows, columns, dtype=torch.int32)
        tail, state = torch.empty(rows, columns, dtype=torch.bool), torch.empty(rows, columns, dtype=torch.uint8)
        self._store.look(layer, ids, positions.data_ptr(), tail.data_ptr(), state.data_ptr(), 0, columns)
        arithmetic = self.arithmetic.get(layer, (spec.head_dim**-0.5, 0.0))
        return Seen(
            layer,
            positions,
            torch.tensor(ends).repeat_interleave(spec.kv_heads),
            tail,
            state,
            self._cache.policy.sinks,
            read=Rows(self._store, self._cache.shape, layer, ids, columns, arithmetic),
        )

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
        """OQ of each row, f32 [R]; the last one where there is too little to tell, 1 at first."""
        heads = self._cache.shape.layers[seen.layer].kv_heads
        assert seen.read is not None
        allocator: Any = self._cache.policy.allocator
        last = torch.cat([self.statistics.get((seen.layer, i), torch.ones(heads)) for i in ids])
        queries = torch.tensor([self._store.queries(seen.layer, i, 0) for i in ids]).repeat_interleave(heads)
        past = seen.stored.sum(1) - queries
        found: Tensor = allocator.oq(seen.read.statistics(allocator.queries, allocator.stats), last, queries, past)
        for b, i in enumerate(ids):
            self.statistics[seen.layer, i] = found[b * heads : (b + 1) * heads].clone()
        return found

    # --- what they may hold -------------------------------------------------------------------------------------------------

    def _total(self) -> tuple[int, int]:
        """Bytes for unprotected tokens of all the cache's sequences, and how many these are."""
        cache = self._cache
        limit, batch = self._goal or (cache._slabs.limit, max(1, len(cache._live)))
        assert limit is not None
        return max(0, cache._limit.content(cache.policy, limit, batch)), batch

    def _equal_share(self, seen: Seen, ids: list[int]) -> Allowance:
        cache = self._cache
        total, batch = self._total()
        rows = batch * sum(cache.shape.layers[i].kv_heads for i in self.layers)
        each = torch.full((seen.positions.shape[0],), total // rows, dtype=torch.int64)
        return Allowance(each, page_costs(cache.shape, seen.layer, cache.policy), self._last_share(seen.layer, ids))

    def _last_share(self, layer: int, ids: list[int]) -> Tensor | None:
        """The share of a layer's rows that stays Full by the statistics of the last plan, f32 [R]; None: the planner's own."""
        allocator, shape = self._cache.policy.allocator, self._cache.shape
        if allocator is None or "oq" not in allocator.needs:
            return None
        heads = shape.layers[layer].kv_heads
        last = [[self.statistics.get((i, seq), torch.ones(heads)) for seq in ids] for i in self.layers]
        oq = torch.stack([torch.cat(line) for line in last])
        nothing = torch.zeros(oq.shape, dtype=torch.int64)
        sequence = torch.arange(len(ids)).repeat_interleave(heads)
        table = RowsSeen(nothing, torch.ones(1, len(oq), dtype=torch.int64), oq=oq, sequence=sequence)
        share: Tensor | None = allocator.allocate(table, 0).full_share
        return None if share is None else share[self.layers.index(layer)]

    def _allocated(self, found: list[Seen], ids: list[int]) -> list[Seen]:
        cache, allocator = self._cache, self._cache.policy.allocator
        assert allocator is not None
        total, batch = self._total()
        total = total * len(ids) // batch
        costs = [page_costs(cache.shape, seen.layer, cache.policy) for seen in found]
        table, needs = self._table(found, costs, ids), allocator.needs
        if "mass" in needs and found[0].score is None:
            raise Unsupported(f"policy {cache.policy.name!r}: its allocator needs scores, it has no scorer")
        given = allocator.allocate(table, total)
        heaviest = int(given.bytes.max()) if given.bytes.numel() else 0
        spare = total // max(1, given.bytes.numel())
        if heaviest > spare and int(given.bytes.sum()) > total + spare - heaviest:
            given = allocator.allocate(table, max(0, total + spare - heaviest))  # the plan rewrites one row at a time
        out = []
        for i, seen in enumerate(found):
            share = None if given.full_share is None else given.full_share[i]
            formats = None if given.formats is None else self._states(seen, given.formats[i])
            out.append(replace(seen, allowance=Allowance(given.bytes[i], costs[i], share, formats)))
        return out

    def _table(self, found: list[Seen], costs: list[Any], ids: list[int]) -> RowsSeen:
        """[L, R, N] of unprotected tokens, moved to the front of each row."""
        allocator = self._cache.policy.allocator
        assert allocator is not None
        free = [seen.stored & ~seen.protected for seen in found]
        states = sorted(costs[0])
        wide: dict[str, Tensor] = {}
        if allocator.needs & {"mass"}:
            wide = self._wide(found, free, states)
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

    def _wide(self, found: list[Seen], free: list[Tensor], states: list[int]) -> dict[str, Tensor]:
        most = max(int(f.sum(1).max()) for f in free)
        scores, stored, positions, mass = [], [], [], []
        for seen, f in zip(found, free, strict=True):
            assert seen.score is not None
            order = (~f).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
            order = torch.nn.functional.pad(order, (0, most - order.shape[1]))
            score = seen.score.nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)
            scores.append(score.gather(1, order))
            index = torch.zeros(max(states) + 1, dtype=torch.uint8)
            index[torch.tensor(states)] = torch.arange(len(states), dtype=torch.uint8)
            stored.append(index[seen.state.gather(1, order).long().clamp_max(max(states))])
            positions.append(seen.positions.gather(1, order))
            mass.append(torch.where(seen.stored, score, 0.0).sum(1))
        return {
            "scores": torch.stack(scores),
            "stored": torch.stack(stored),
            "positions": torch.stack(positions),
            "mass": torch.stack(mass),
        }

    def _states(self, seen: Seen, formats: Tensor) -> Tensor:
        """u8 [R, N] in table order of an allocator's formats (0 Evicted, 1 + index) of unprotected tokens."""
        states = torch.tensor([0, *sorted(page_costs(self._cache.shape, seen.layer, self._cache.policy))])
        free = seen.stored & ~seen.protected
        out = seen.state.clone()
        rank = (free.cumsum(1) - 1).clamp(0, max(formats.shape[1] - 1, 0))
        chosen = states[formats.long()].to(torch.uint8).gather(1, rank)
        return torch.where(free, chosen, out)

    # --- what is done -----------------------------------------------------------------------------------------------------

    def _apply(self, seen: Seen, ids: list[int]) -> None:
        planner = self._cache.policy.planner
        assert planner is not None
        self._cache._charges.plan()
        plan: Plan = planner.plan(seen)
        self.counts["plans"] += 1
        if plan.tier is not None or plan.group is not None or plan.set is not None:
            raise Unsupported("plan: only the state column can be applied in this release")
        if plan.state is None:
            return
        if plan.state.dtype != torch.uint8 or plan.state.shape != seen.positions.shape:
            raise ValueError(
                f"plan: state is {plan.state.dtype} {list(plan.state.shape)}, expected torch.uint8"
                f" {list(seen.positions.shape)}"
            )
        state = self._capped(seen, plan.state)  # it is brought into the order of the tables as they change
        self._store.check_plan(seen.layer, ids, state.data_ptr(), state.shape[1], True)
        changed = (state != seen.state) & seen.stored
        self.counts["evicted"] += int((changed & (state == 0)).sum())
        self.counts["quantized"] += int((changed & (state > FULL)).sum())
        self.apply(seen.layer, ids, state, torch.nonzero(changed.any(1)).flatten().tolist())

    def _capped(self, seen: Seen, state: Tensor) -> Tensor:
        """A copy of the planned states, within the tokens that a row may hold where the budget counts them."""
        most = self._cache._limit.most(self._cache.policy)
        if most is not None:
            score = seen.positions.to(torch.float32) if seen.score is None else seen.score
            state = at_most(state, score, seen.positions, seen.protected, most)
        return state.contiguous().clone()

    def apply(self, layer: int, ids: list[int], state: Tensor, rows: list[int]) -> None:
        """Changes the given rows to state u8 [R, N], which was checked, one after another: each whole, or where memory is short
        piece by piece, each piece whole. Rows of ``state`` follow their tables' new order."""
        heads = self._cache.shape.layers[layer].kv_heads
        try:
            for r in rows:
                seq, head, address = ids[r // heads], r % heads, state[r].data_ptr()
                more = True
                while more:
                    most = self._cache._slabs.reserve_plan(layer, seq, head, address)
                    more = self._store.apply_plan(layer, seq, head, address, most)
        finally:
            self._cache._slabs.settle()
