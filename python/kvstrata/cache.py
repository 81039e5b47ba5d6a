"""The cache: sequences of tokens, stored by layer and KV head under a policy and a budget. Knows no model library."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch

from kvstrata import holdings
from kvstrata.budget import Budget, Ledger, Scope
from kvstrata.charges import Charges
from kvstrata.config import BudgetExceeded, Shape
from kvstrata.guard import Guard
from kvstrata.limit import Limit
from kvstrata.plans import Plans
from kvstrata.policy import Policy, resolve
from kvstrata.policy.base import LESSER_HALF, PENDING, Selector
from kvstrata.recall import Far
from kvstrata.report import Report, Share
from kvstrata.slabs import Slabs
from kvstrata.spans import SpanStep
from kvstrata.step import Step, packed, padded
from kvstrata.tiers import make_store, read_by, read_tokens, resolve_far
from kvstrata.views import Views


@dataclass(frozen=True)
class Sequence:
    """A handle of one sequence of a cache."""

    id: int


class Cache:
    """Keys and values of any number of sequences of one model.

    shape: the layers; budget: None, a :class:`Budget` or one of its spellings; policy: None (``full``), a name or a
    :class:`Policy`; far: "auto", a Far tier exactly when the policy archives, None, none, its size ("64GiB", bytes) or a
    :class:`kvstrata.recall.Far`; ledger: a :class:`Ledger`, in which
    the cache opens a :attr:`scope`, or None; hold: tokens that stay unsealed until confirmed while recording. One thread at
    a time. ValueError where the budget cannot hold the policy's sinks and window; Unsupported where this build cannot.
    """

    def __init__(
        self,
        shape: Shape,
        budget: Budget | str | int | None = None,
        policy: Policy | str | None = None,
        *,
        far: Far | str | int | None = "auto",
        ledger: Ledger | None = None,
        hold: int = 64,
    ) -> None:
        if ledger is not None and not isinstance(ledger, Ledger):
            raise ValueError(f"Cache: ledger is {type(ledger).__name__}, expected None or a Ledger")
        if hold < 0:
            raise ValueError(f"Cache: hold is {hold}, expected >= 0")
        self.shape = shape
        self.hold = hold
        self.budget = Budget.parse(budget)
        self._limit = Limit(shape, *read_tokens(self.budget, resolve(policy)))
        self.policy = self._limit.fit([0])
        tier = resolve_far(far, self.budget, self.policy)
        self._store = make_store(shape, self.policy, hold, tier, ledger is not None)
        self._charges = Charges(self, ledger)
        self._slabs = Slabs(
            self._store, shape.device, self._limit.fixed(), self._limit.expected(self.policy), self._charges, tier
        )
        self._live: list[int] = []
        self._step: Step | None = None
        self._plans = Plans(self)
        self._views = Views(self)
        self._guard = Guard(self)
        self._counts = dict.fromkeys(("crops", "forks"), 0)
        self._guard.open()

    @property
    def scope(self) -> Scope | None:
        """The cache's scope in its ledger: ``ledger.report(cache.scope)``."""
        return self._charges.scope

    def scope_of(self, seq: Sequence) -> Scope:
        """The scope of a sequence in the cache's ledger, below the cache's; of a fork, below that of its source. near_bytes and
        far_bytes: of pages that it took, whoever shares them. ValueError without a ledger."""
        if self._charges.sequences is None:
            raise ValueError("scope_of: the cache has no ledger, expected one")
        return self._charges.sequences.of(seq.id).scope

    def share(self, seq: Sequence) -> Share:
        """What a sequence holds: charged, in fair shares, visible."""
        return holdings.share(self, seq.id)

    # --- sequences --------------------------------------------------------------------------------------------------------

    def new(self, n: int = 1) -> list[Sequence]:
        """n empty sequences."""
        return self._begun(self._store.create(n), [None] * n)

    def free(self, seqs: Items[Sequence]) -> None:
        """Ends the sequences; pages that nobody else holds are free at once."""
        self._store.free([s.id for s in seqs])
        self._end(seqs)
        self._guard.settle()

    def fork(self, seq: Sequence, n: int = 1) -> list[Sequence]:
        """n more sequences that share every page with ``seq``; a shared open page is copied at its next append."""
        self._guard.share([*self._live, *[seq.id] * n])
        ids = self._store.fork(seq.id, n)
        self._follow(ids, [seq.id] * n)
        found = self._begun(ids, [self._store.owner(seq.id)] * n)
        self._counts["forks"] += n
        return found

    def select(self, seqs: Items[Sequence], index: Items[int]) -> list[Sequence]:
        """Result i continues seqs[index[i]]; the given handles end. Reordering, selecting and repeating are all this."""
        gone = {s.id for s in seqs}
        self._guard.share([i for i in self._live if i not in gone] + [seqs[i].id for i in index if 0 <= i < len(seqs)])
        owners = [self._store.owner(seqs[i].id) for i in index if 0 <= i < len(seqs)]
        ids = self._store.select([s.id for s in seqs], list(index))
        self._follow(ids, [seqs[i].id for i in index])
        self._end(seqs)
        self._live += ids
        if self._charges.sequences is not None:
            self._charges.sequences.begin(ids, owners)
        self._guard.settle()
        return [Sequence(i) for i in ids]

    def crop(self, seqs: Items[Sequence], lengths: Items[int]) -> None:
        """Shortens each sequence to its length in tokens. ValueError below :meth:`crop_floor`; then nothing changed.

        What was sealed stays so: cut below its tail, a sequence under a policy that selects has its last tokens in pages that a
        step of one token reads if they are selected, until as many new ones are its tail.
        """
        pairs = list(zip(seqs, lengths, strict=True))
        for seq, length in pairs:
            low, high = self._store.floor(seq.id), self._store.length(seq.id)
            if not low <= length <= high:
                raise ValueError(f"crop: length is {length}, expected {low}..{high} (tokens below {low} were dropped)")
        for seq, length in pairs:
            self._limit.cropped(seq.id, self._store.length(seq.id) - length)
            self._store.crop(seq.id, length)
            self._plans.cropped(seq.id, length)
        self._counts["crops"] += 1
        self._slabs.settle()

    def crop_floor(self, seq: Sequence) -> int:
        """The shortest length that :meth:`crop` can restore exactly."""
        return self._store.floor(seq.id)

    def set_recording(self, on: bool) -> None:
        """While on, the last ``hold`` tokens are neither sealed nor planned until ``crop`` or ``confirm`` settles them."""
        self._store.set_recording(on)
        if not on:
            for i in self._live:
                self._store.confirm(i)
            self._slabs.settle()

    def confirm(self, seqs: Items[Sequence]) -> None:
        """Makes every token of the sequences final."""
        for seq in seqs:
            self._store.confirm(seq.id)
        self._slabs.settle()

    def clear(self, seqs: Items[Sequence]) -> None:
        """Empties the sequences; the handles stay."""
        for seq in seqs:
            self._store.clear(seq.id)
        self._forget([s.id for s in seqs])
        self._slabs.settle()

    def reset(self) -> None:
        """Empties every sequence; pages go back to the pools."""
        for i in self._live:
            self._store.clear(i)
        self._forget(self._live)
        self._slabs.settle()

    def logical_length(self, seq: Sequence) -> int:
        """Real tokens seen, whatever was dropped."""
        return self._store.length(seq.id)

    def stored_length(self, layer: int, seq: Sequence, head: int) -> int:
        """Slots that one row holds."""
        return self._store.stored(seq.id, layer, head)

    def _follow(self, ids: list[int], sources: list[int]) -> None:
        self._plans.follow(ids, sources)
        self._limit.follow(ids, sources)

    def _forget(self, ids: list[int]) -> None:
        self._plans.forget(ids)
        self._limit.forget(ids)

    def _end(self, seqs: Items[Sequence]) -> None:
        gone = [s.id for s in seqs]
        self._forget(gone)
        self._live = [i for i in self._live if i not in gone]

    def _begun(self, ids: list[int], sources: Items[int | None]) -> list[Sequence]:
        """Handles of new sequences, which end again where the limit or a ledger has no room for their tables. sources: owners
        of what they were forked from."""
        self._live += ids
        found = [Sequence(i) for i in ids]
        try:
            if self._charges.sequences is not None:
                self._charges.sequences.begin(ids, sources)
            self._guard.settle()
            self._slabs.check()
        except BudgetExceeded:
            self.free(found)
            raise
        return found

    # --- steps ------------------------------------------------------------------------------------------------------------

    def step(
        self,
        seqs: Items[Sequence],
        lengths: Items[int] | None = None,
        *,
        valid: torch.Tensor | None = None,
        columns: int | None = None,
    ) -> Step:
        """A step over ``seqs``, to be used as a context manager.

        Packed layout: lengths[b] tokens of each sequence, side by side. Padded layout: ``valid`` bool [B, T] marks real
        tokens, or ``columns`` = T if all are. ValueError on a step without a token.
        """
        seqs = list(seqs)
        if lengths is not None:
            if valid is not None or columns is not None:
                raise ValueError("step: lengths excludes valid and columns")
            return packed(self, seqs, list(lengths))
        if valid is None:
            if columns is None:
                raise ValueError("step: give lengths, valid or columns")
            if columns < 1:
                raise ValueError(f"step: columns is {columns}, expected >= 1")
            starts = list(range(0, len(seqs) * columns + 1, columns))
            return Step(self, seqs, starts, list(range(columns)) * len(seqs), columns)
        return padded(self, seqs, valid)

    def read(
        self, seq: Sequence, tokens: int, spans: Items[int], *, compact: bool = True, score: int | None = None
    ) -> SpanStep:
        """A step over one sequence under an episodic policy, to be used as a context manager.

        tokens: that it feeds, may be 0; spans: queries of each prompt beside them, which leave nothing behind; compact:
        whether each layer is planned by what they see, before the next; score: the first token whose score that joins, where
        the policy keeps scores, for :meth:`regroup`. ValueError for another policy, and a step of nothing.
        """
        return SpanStep(self, seq, tokens, list(spans), compact, score)

    def regroup(self, seq: Sequence, of: torch.Tensor, count: int) -> None:
        """Plans every layer of a sequence by the scores that its policy keeps.

        of: i32 [tokens seen], the episode of each token, 0..count-1. ValueError for another policy or column. After an error
        layers that were planned stay so.
        """
        self._plans.regroup(seq.id, of, count)
        self._slabs.settle()

    def view(self, seq: Sequence, sets: Items[int] | None, *, halves: bool = False, ahead: bool = False) -> None:
        """What steps of a sequence read from now on: backbone, pending tokens, and the private sets named (1..E), or their
        better halves alone; None: every set. Others are in the Far tier, if there is one, and Near while the limit has room.
        BudgetExceeded or RuntimeError, the view as it was, where they cannot move. ahead: the next step waits for them."""
        self._views.turn(seq.id, sets is None, list(sets or ()), halves, ahead)

    @property
    def moved_bytes(self) -> int:
        """Bytes of the pages of sets that have gone Far or come Near, so far."""
        return self._store.moved_bytes

    def sets(self, layer: int, seq: Sequence, head: int) -> list[tuple[int, int]]:
        """The set of each page of one row, in table order, and its slots that hold a token: BACKBONE, 1..E, whichever half it
        is of, or PENDING (:mod:`kvstrata.policy.base`)."""
        tags, _, _ = self._store.row_sets(seq.id, layer, head)
        _, alive, _, _ = self._store.row(seq.id, layer, head)
        own = (t if t == PENDING else t & ~LESSER_HALF for t in tags)
        return [(tag, mask.bit_count()) for tag, mask in zip(own, alive, strict=True)]

    def _enter(self, step: Step) -> None:
        if self._step is not None:
            raise RuntimeError("step: another step of this cache is open; a cache serves one thread at a time")
        self._step = step

    def _leave(self, step: Step) -> None:
        assert self._step is step
        self._step = None
        self._views.after_step()

    def set_selector(self, selector: Selector, *, summarize: bool = False) -> None:
        """Another selector for the live cache, from the next step on.

        summarize: every stored page is read once and summarized anew, where the selector ranks by summaries of another kind;
        a byte limit counts them from the next step on. ValueError where the policy has no selector, as no page is summarized
        then; for one that does not go with its sinks and window; and for another kind without ``summarize``.
        """
        if self.policy.selector is None:
            raise ValueError(f"set_selector: policy {self.policy.name!r} selects nothing, expected one with a selector")
        if self._step is not None:
            raise RuntimeError("set_selector: a step is open, its pages are reserved for the present selector")
        replace(self.policy, selector=selector)  # refuses what does not go with it
        if selector.kind != self.policy.selector.kind and not summarize:
            raise ValueError(
                f"set_selector: {type(selector).__name__} ranks by {selector.kind}, pages have summaries of kind"
                f" {self.policy.selector.kind}; expected summarize=True, which reads them all once"
            )
        read_by(self._store, selector, self.policy)
        self.policy = replace(self.policy, selector=selector)
        self._limit.select(selector)

    # --- plans ------------------------------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Plans every layer now, unless the policy is episodic, and returns what memory that frees."""
        self._plan(self._live)

    def end_prefill(self, seqs: Items[Sequence]) -> None:
        """For own loops: the prompt of ``seqs`` is complete. Plans them, and returns what memory that frees."""
        self._plan([s.id for s in seqs])

    def _plan(self, ids: list[int]) -> None:
        if self.policy.planner is not None and not self.policy.episodic and ids:
            self._plans.run(ids)
        self.trim()

    def drop(self, layer: int, seq: Sequence, keep: torch.Tensor) -> None:
        """Evicts stored tokens of one layer, protected ones too.

        keep: bool [H, N], in table order; columns past a row's last token are ignored.
        """
        self._plans.drop(layer, seq.id, keep)
        self._slabs.settle()

    def _charge(self, counts: dict[int, int], cut: list[int]) -> None:
        """Reserves in the ledger what a step may consume and by how much tables may grow."""
        if self.scope is None:
            return
        layers, policy = len(self.shape.layers), self.policy
        needed = self._store.needed(0, layers, 0, self._store.longest)
        near = self._slabs.growth(policy, self.shape, len(self._live), needed)
        self._charges.begin(near, self._slabs.piece(), counts, self._plans.coming(counts, cut))

    def _after_commit(self, before: dict[int, int], longest: int, cut: list[int]) -> None:
        """before: lengths of the step's sequences before it; longest: the most tokens it fed one; cut: those cut inside it."""
        self._slabs.settle()
        if self.policy.planner is None or self.policy.episodic:
            return
        self._plans.note(cut)
        self._limit.count({i: self._store.length(i) - n for i, n in before.items()})
        try:
            self._plans.seal(before)
            if not self._guard.falls():
                self._plans.after(before)
        except BudgetExceeded:
            if self.scope is None:
                raise
            self._plans.counts["plans put off"] += 1  # others took what is left; limits bind until it is made up
        if longest > self.policy.interval:
            self.trim()

    # --- memory -----------------------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes held: slabs as lent, page tables and refcounts, kernel workspace."""
        return self._slabs.nbytes()

    def shrink(self, limit: int) -> None:
        """Plans for fewer bytes than the limit, if the policy divides it, and trims. BudgetExceeded where they are too few."""
        if self.policy.allocator is not None and self._live and self._slabs.limit is not None:
            self._limit.admit_within(self.policy, limit, len(self._live))
            self._plans.ahead(self._live, limit, len(self._live))
        self.trim()

    def trim(self) -> int:
        """Packs pages into fewer slabs and returns the empty ones to torch. Returns the bytes given back."""
        freed = self._slabs.trim()
        self._slabs.settle()
        return freed

    def report(self) -> Report:
        """What is held now."""
        return holdings.report(self)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """ARKV's entropy, variance and kurtosis of each row as they were measured last, f32 [L, R, 3], and OQ, f32 [L, R].

        R: KV heads of the sequences, in order; 0 and 1 where nothing was measured. ValueError where layers differ in KV heads.
        """
        return holdings.statistics(self)

    def materialize(self, layer: int, seq: Sequence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Dense copies for debugging, in table order.

        k, v [H, N, D] in the cache's dtype (zeros past a row's last token) and positions i32 [H, N] (-1 there).
        """
        return holdings.materialize(self, layer, seq.id)
