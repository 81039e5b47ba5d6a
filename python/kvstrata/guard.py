"""What binds a cache: its limit for the sequences that it has now, and its policy as it fits them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kvstrata.config import BudgetExceeded, MachineError
from kvstrata.tiers import read_by

if TYPE_CHECKING:
    from kvstrata.cache import Cache


class Guard:
    """Keeps the limit of one cache's slabs, and its policy, to the sequences that share them."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._fitted: object = None  # what the policy was last fitted to
        self._admitted = 0  # sequences for which it was last found that the limit leaves them something

    def open(self) -> None:
        """Before the first sequence: what archives takes memory at once, under the limit of one."""
        cache = self._cache
        if cache.policy.archives and cache._limit.budget is not None:
            self._bind(cache._limit.now(cache.policy, [0]))
        cache._slabs.open_far()

    def admit(self, ids: list[int], lengths: list[int]) -> None:
        """Checks of the whole step that need its sizes. lengths: tokens that each of ``ids`` will have after it."""
        cache = self._cache
        budget, policy = cache._limit.budget, cache.policy
        if budget is None:
            return
        if policy.allocator is not None or budget.unit == "bytes":
            self._fit(dict(zip(ids, lengths, strict=True)))
            if cache._limit.each and policy.planner is None:
                cache._limit.admit_whole(lengths)
        elif policy.planner is None and budget.unit == "tokens" and max(lengths) > budget.value:
            raise BudgetExceeded(f"budget: limit is {budget.value} tokens per row, the step needs {max(lengths)}")

    def admit_queries(self, queries: int) -> None:
        """What the open step works in as it reads its sequences with so many queries each. As :meth:`reserve`."""
        self._pressed(lambda: self._cache._slabs.admit(queries), {})

    def reserve(self, layers: tuple[int, int], tokens: tuple[int, int], ends: dict[int, int] | None = None) -> None:
        """The pages of a range of the open step's tokens in a range of layers. BudgetExceeded with nothing changed but what has
        left the Near tier for it; from what kept it there, if something did. ends: of sequences that are cut in the step."""
        if (sequences := self._cache._charges.sequences) is not None:
            sequences.reserve_pages(self._pages_of_step(layers, tokens))
        self._pressed(lambda: self._cache._slabs.reserve(*layers, *tokens), ends or {})

    def _pages_of_step(self, layers: tuple[int, int], tokens: tuple[int, int]) -> dict[int, list[int]]:
        """By sequence of the open step, the pages of each pool that a range of tokens takes in a range of layers."""
        store = self._cache._store
        needed, pools = store.needed_each(*layers, *tokens), store.n_pools
        assert self._cache._step is not None
        return {seq: needed[b * pools : (b + 1) * pools] for b, seq in enumerate(self._cache._step._ids)}

    def _pressed(self, need: Callable[[], None], ends: dict[int, int]) -> None:
        """Once more where what can leave the Near tier has left it."""
        plans, kept = self._cache._plans, None
        try:
            return need()
        except BudgetExceeded:
            if not plans.gives_way:
                raise
        try:
            plans.give_way(ends)
        except (BudgetExceeded, MachineError) as error:
            kept = error
        try:
            need()
        except BudgetExceeded as refusal:
            raise refusal from kept

    def _fit(self, after: dict[int, int]) -> None:
        """A budget is shared by all sequences: with their number known, and none begun, the policy is fitted anew; the limit
        of a share follows their lengths."""
        cache = self._cache
        budget = cache._limit.budget
        assert budget is not None
        lengths = [after.get(i, n) for i, n in zip(cache._live, self._lengths(), strict=True)]
        begun = any(self._lengths())
        to = (len(lengths), max(lengths) if budget.unit == "share" else 0)
        if self._fitted != to and not begun:
            policy = cache._limit.fit(lengths)
            policy = replace(policy, ring=min(policy.ring, cache.policy.ring))  # what is held may go, no more is taken
            if policy != cache.policy:
                assert policy.window is not None
                cache._store.refit(policy.window, policy.queries)
                if cache._slabs.has_far:
                    cache._store.shrink_ring(policy.ring)
                if policy.selector is not None:  # beside another window it reads as many pages as its budget leaves
                    read_by(cache._store, policy.selector, policy)
                cache.policy = policy
            self._fitted = to
        if self._follows:
            self._bind(cache._limit.now(cache.policy, lengths))
        if cache.policy.allocator is not None and begun and self._admitted != len(lengths):
            cache._limit.admit(cache.policy, lengths)  # what each needs is fixed: more of them may be too many
            self._admitted = len(lengths)

    def settle(self) -> None:
        """After the sequences are others: what each may hold is theirs, and their tables are within it."""
        cache = self._cache
        if cache._limit.each or cache._slabs.books.apart:
            self._bind(cache._limit.now(cache.policy, self._lengths() or [0]))
        cache._slabs.settle()

    def share(self, ids: list[int]) -> None:
        """Before the limit is shared by ``ids``, more sequences than now: what has begun is planned for its smaller share, as
        pages that forks hold together are free only once all of them have let them go. BudgetExceeded with nothing changed
        where the share would be too small."""
        cache = self._cache
        lengths, before = [cache._store.length(i) for i in ids], self._lengths()
        if cache.policy.allocator is None or len(ids) <= len(before) or not any(lengths):
            return
        cache._limit.admit(cache.policy, lengths)
        limit = cache._limit.now(cache.policy, lengths)
        if limit * len(before) < cache._limit.now(cache.policy, before) * len(ids):
            cache._plans.ahead(cache._live, limit, len(ids))

    def falls(self) -> bool:
        """Follows the schedule: a limit that falls is planned for, then binds. Whether all was planned."""
        cache = self._cache
        if cache._limit.schedule is None:
            return False
        limit = cache._limit.now(cache.policy, self._lengths())
        falls = cache._slabs.limit is None or limit < cache._slabs.limit
        if falls:
            cache._plans.ahead(cache._live, limit, len(cache._live))
            cache.trim()
        self._bind(limit)
        return falls

    @property
    def _follows(self) -> bool:
        """Whether slabs keep to what the budget means for the present sequences, with a place for their books."""
        policy = self._cache.policy
        return policy.allocator is not None or policy.selector is not None or policy.archives

    def _bind(self, limit: int) -> None:
        cache = self._cache
        cache._slabs.bind(limit, cache.policy, cache.shape, max(1, len(cache._live)))

    def _lengths(self) -> list[int]:
        """Tokens of each live sequence."""
        return [self._cache._store.length(i) for i in self._cache._live]
