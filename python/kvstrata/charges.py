"""What a cache holds and consumes, charged to its scope in a ledger."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from kvstrata.budget import Hold, Ledger, Scope
from kvstrata.scopes import Scopes

if TYPE_CHECKING:
    from kvstrata.cache import Cache


class Charges:
    """The scope of one cache. Without a ledger nothing is counted.

    near_bytes: slabs, charged before they are lent and freed as they return, and the tables and the workspace, for whose
    growth a step reserves beforehand; after each verb of the cache they are what ``Cache.nbytes`` says. far_bytes: the Far
    tier's files, charged before they are made and freed as they go. decode_tokens,
    prefill_tokens, plans: reserved before a step, charged when it commits; a plan is one of one layer. Where other scopes of
    the ledger leave no room to rewrite pages, the plan after a step is put off to the next one that is due, and counted.
    ``sequences``: the scopes of the cache's sequences, which pages and tokens are charged to, with limits of their own.

    A limit of near_bytes that is set with ``shrink`` is planned for first, all sequences alike; then it divides their shares as
    the cache's own limit does.
    """

    def __init__(self, cache: Cache, ledger: Ledger | None) -> None:
        self._ledger = ledger
        self._used = 0
        self._hold: Hold | None = None
        self._spare: Hold | None = None  # pages with which the plan after a step begins
        self._apart = False
        self.scope: Scope | None = None
        self.sequences: Scopes | None = None
        if ledger is not None:
            self.scope = ledger.open(name=f"{cache.policy.name} {id(cache):x}")
            self.sequences = Scopes(cache, ledger, self.scope)
            ledger.on_shrink(self.scope, partial(_shrink, weakref.ref(cache)))
            weakref.finalize(cache, ledger.abandon, self.scope).atexit = False

    # --- bytes ------------------------------------------------------------------------------------------------------------

    def left(self, nbytes: int) -> int | None:
        """Bytes that a cache of ``nbytes`` may still lend; None: no limit."""
        if self._ledger is None or self.scope is None:
            return None
        left = self._ledger.left(self.scope, "near_bytes")
        return None if left is None else left - max(0, nbytes - self._used - self._held())

    def limit(self) -> int | None:
        """Near bytes of the cache's own scope at the most; None: no limit."""
        if self._ledger is None or self.scope is None:
            return None
        return self._ledger.report(self.scope).near_bytes.limit

    def far_left(self) -> int | None:
        """Bytes that the Far tier's files may still take; None: no limit."""
        return None if self._ledger is None or self.scope is None else self._ledger.left(self.scope, "far_bytes")

    def lend(self, nbytes: int, far_bytes: int) -> Hold | None:
        """Before a slab is made of so much memory, and of a file. BudgetExceeded with nothing changed."""
        if self._ledger is None or self.scope is None:
            return None
        return self._ledger.reserve(self.scope, near_bytes=nbytes, far_bytes=far_bytes)

    def lent(self, hold: Hold | None, nbytes: int) -> None:
        """The slab is made."""
        if hold is not None:
            hold.commit()
            self._used += nbytes

    def returned(self, nbytes: int, far_bytes: int) -> None:
        """A slab went back."""
        if self._ledger is not None and self.scope is not None:
            self._ledger.free(self.scope, near_bytes=nbytes, far_bytes=far_bytes)
            self._used -= nbytes

    def settle(self, nbytes: int) -> None:
        """The cache holds so many bytes now. BudgetExceeded where tables grew beyond what was reserved and is left."""
        if self.sequences is not None:
            self.sequences.settle()
        if self._ledger is None or self.scope is None or nbytes == self._used:
            return
        if nbytes < self._used:
            self._ledger.free(self.scope, near_bytes=self._used - nbytes)
            self._used = nbytes
            return
        held = min(nbytes - self._used, self._held())
        if held and self._hold is not None:
            self._hold.draw(near_bytes=held)
            self._used += held
        if nbytes > self._used:
            self._ledger.reserve(self.scope, near_bytes=nbytes - self._used).commit()
            self._used = nbytes

    def _held(self) -> int:
        return 0 if self._hold is None else self._hold.left("near_bytes")

    # --- steps ------------------------------------------------------------------------------------------------------------

    def begin(self, near_bytes: int, spare: int, counts: dict[int, int], plans: int) -> None:
        """A step that brings so many tokens to its sequences. BudgetExceeded with nothing changed.

        near_bytes: by which tables and workspace may grow; spare: that a plan after the step needs to rewrite pages.
        """
        if self._ledger is None or self.scope is None or self.sequences is None:
            return
        self._hold = self._ledger.reserve(self.scope, near_bytes=near_bytes, plans=plans)
        self._spare = self._ledger.reserve(self.scope, near_bytes=spare if plans else 0)
        self.sequences.reserve_tokens(counts)

    def commit(self) -> None:
        """The step's tokens are there; plans follow."""
        self._end_spare()
        if self.sequences is not None:
            self.sequences.commit_tokens()

    def plan(self) -> None:
        """One layer is planned: of what the step reserved, or BudgetExceeded."""
        if self._ledger is None or self.scope is None:
            return
        if self._hold is not None and not self._apart and self._hold.left("plans"):
            self._hold.draw(plans=1)
        else:
            self._ledger.reserve(self.scope, plans=1).commit()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Plans inside are none of those that a step reserved for itself."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def finish(self) -> None:
        """The step has ended; what it did not need is free."""
        self._end_spare()
        if self.sequences is not None:
            self.sequences.finish()
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.rollback()

    def _end_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.rollback()


def _shrink(cache: weakref.ref[Cache], scope: Scope, resource: str, limit: int) -> None:
    """Before a lower limit of a cache's scope is set: what can be dropped or quantized for it is."""
    del scope
    found = cache()
    if found is not None and resource == "near_bytes":
        found.shrink(limit)
