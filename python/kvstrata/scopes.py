"""The scopes of a cache's sequences: pages are charged to the sequence that took them, tokens to the one that fed them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstrata.budget import Hold, Ledger, Scope
from kvstrata.config import SLOTS
from kvstrata.limit import TURN_ABOVE

if TYPE_CHECKING:
    from kvstrata.cache import Cache

PAGES = ("near_bytes", "far_bytes")
"""What pages take. Counted up to the sequence whose fork took them: at the cache and above, slabs and files count."""
_POSITION_BYTES = 4 * SLOTS


@dataclass(eq=False)
class Account:
    """The scope of one sequence, and what is charged to it. It outlives the sequence while a page is, or a fork lives."""

    scope: Scope
    above: Account | None
    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PAGES, 0))
    pages: Hold | None = None  # for those that are about to be taken
    tokens: Hold | None = None  # of the open step
    forks: int = 0


class Scopes:
    """The accounts of one cache's sequences, by who natively owns the pages that they take."""

    def __init__(self, cache: Cache, ledger: Ledger, scope: Scope) -> None:
        self._cache = cache
        self._ledger = ledger
        self._scope = scope
        self._known: dict[int, Account] = {}

    def of(self, seq: int) -> Account:
        """The account of a live sequence."""
        return self._known[self._cache._store.owner(seq)]

    def begin(self, ids: Iterable[int], sources: Iterable[int | None]) -> None:
        """Opens the scopes of new sequences, those of forks under their source's (owners). One that continues a sequence that
        ends keeps its scope."""
        for seq, source in zip(ids, sources, strict=True):
            owner = self._cache._store.owner(seq)
            if owner in self._known:
                continue
            above = None if source is None else self._known[source]
            parent = self._scope if above is None else above.scope
            scope = self._ledger.open(parent, f"sequence {seq}", apart=() if above else PAGES)
            self._known[owner] = Account(scope, above)
            if above is not None:
                above.forks += 1

    # --- a step -----------------------------------------------------------------------------------------------------------

    def reserve_tokens(self, counts: dict[int, int]) -> None:
        """A step that brings so many tokens to its sequences. BudgetExceeded with nothing changed."""
        try:
            for seq, n in counts.items():
                kind = "decode_tokens" if n <= TURN_ABOVE else "prefill_tokens"
                self.of(seq).tokens = self._ledger.reserve(self.of(seq).scope, **{kind: n})
        except BaseException:
            self._end_tokens()
            raise

    def commit_tokens(self) -> None:
        """The step's tokens are there."""
        for account in self._known.values():
            hold, account.tokens = account.tokens, None
            if hold is not None:
                hold.commit()

    def reserve_pages(self, needed: Mapping[int, list[int]]) -> None:
        """By sequence, the pages of each pool that are about to be taken. BudgetExceeded with nothing changed."""
        self.settle()
        try:
            for seq, pages in needed.items():
                amounts = self._bytes(enumerate(pages))
                if any(amounts.values()):
                    self.of(seq).pages = self._ledger.reserve(self.of(seq).scope, **amounts)
        except BaseException:
            self._end_pages()
            raise

    def left(self, seq: int) -> int | None:
        """Near bytes that a sequence may still take, beside what it has taken by now; None: no limit."""
        self.settle()
        return self._ledger.left(self.of(seq).scope, "near_bytes")

    def settle(self) -> None:
        """What pages took, and let go, is charged; nothing more is reserved. Scopes of what ended and holds nothing end."""
        now: dict[int, list[tuple[int, int]]] = {owner: [] for owner in self._known}
        for owner, pool, pages in self._cache._store.charges():
            if owner:
                now[owner].append((pool, pages))
        for owner, account in self._known.items():
            self._charge(account, self._bytes(now[owner]))
        self._end_pages()
        self._end_scopes()

    def finish(self) -> None:
        """The step has ended; what it did not need is free."""
        self._end_pages()
        self._end_tokens()

    # --- inside -----------------------------------------------------------------------------------------------------------

    def _bytes(self, pages: Iterable[tuple[int, int]]) -> dict[str, int]:
        """Bytes of so many pages of pools."""
        found = dict.fromkeys(PAGES, 0)
        for pool, n in pages:
            if n:
                near, far = self._cache._slabs.page_bytes(pool)
                found["near_bytes"] += n * near
                found["far_bytes"] += n * far
        return found

    def _charge(self, account: Account, now: dict[str, int]) -> None:
        """Draws what was reserved. What was not, as of a set that came Near, has to find room."""
        for name, n in now.items():
            more = n - account.used[name]
            if more < 0:
                self._ledger.free(account.scope, **{name: -more})
            elif more > 0:
                held = 0 if account.pages is None else min(more, account.pages.left(name))
                if account.pages is not None and held:
                    account.pages.draw(**{name: held})
                if more > held:
                    self._ledger.reserve(account.scope, **{name: more - held}).commit()
            account.used[name] = n

    def _end_pages(self) -> None:
        for account in self._known.values():
            hold, account.pages = account.pages, None
            if hold is not None:
                hold.rollback()

    def _end_tokens(self) -> None:
        for account in self._known.values():
            hold, account.tokens = account.tokens, None
            if hold is not None:
                hold.rollback()

    def _end_scopes(self) -> None:
        live = {self._cache._store.owner(seq) for seq in self._cache._live}
        for owner in sorted(self._known, reverse=True):  # forks before what they were forked from
            account = self._known[owner]
            if owner in live or account.forks or any(account.used.values()):
                continue
            self._ledger.close(account.scope)
            del self._known[owner]
            if account.above is not None:
                account.above.forks -= 1
