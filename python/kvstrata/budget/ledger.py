"""Who holds how much: a tree of scopes, each with limits, and reservations made before the work.

One lock guards all counters. A cache charges its own scope, and those of its sequences (:mod:`kvstrata.scopes`); other scopes
are there for callers, who charge them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from kvstrata.budget.account import CONSUMED, LEVELS, RECLAIMABLE, Account, Node, Scope, ScopeReport
from kvstrata.budget.amounts import amounts_of, checked, fits_above, may_set, title
from kvstrata.budget.regime import Regime
from kvstrata.budget.sizes import size
from kvstrata.config import BudgetExceeded, Unsupported

log = logging.getLogger("kvstrata")

OnRegime = Callable[[Scope, Regime, Regime], None]
OnShrink = Callable[[Scope, str, int], None]


class Ledger:
    """Counts what scopes hold and consume, and refuses what would pass a limit. Safe from any thread.

    near, far, disk: limits of the global scope in bytes (int, "6GiB", None: none); further limits by resource. Reclaimable
    resources (near_bytes, far_bytes, disk_bytes) return on :meth:`free`; consumed ones (h2d_bytes, d2h_bytes,
    prefill_tokens, cached_tokens, decode_tokens, plans, wall_ns) never fall. All amounts are ints >= 0.
    """

    def __init__(
        self,
        near: int | str | None = None,
        far: int | str | None = None,
        disk: int | str | None = None,
        **limits: int | None,
    ) -> None:
        self._lock = threading.Lock()
        self._nodes: dict[int, Node] = {}
        self._next = 0
        self._on_regime: dict[int, list[OnRegime]] = {}
        self._on_shrink: dict[int, OnShrink] = {}
        self._events: deque[tuple[OnRegime, Scope, Regime, Regime]] = deque()
        self._delivering = False
        self._abandoned: deque[Scope] = deque()  # ended by a finalizer, which may run while the lock is held
        named = {"near_bytes": near, "far_bytes": far, "disk_bytes": disk}
        sizes = {name: size(f"Ledger: {name}", value) for name, value in named.items()}
        self.root = self._add(None, "global", "global", sizes | checked("Ledger", limits))

    # --- scopes ---------------------------------------------------------------------------------------------------------

    def open(
        self,
        parent: Scope | None = None,
        name: str = "",
        *,
        grant: bool = False,
        apart: Sequence[str] = (),
        **limits: int | str | None,
    ) -> Scope:
        """A new scope under ``parent`` (None: the global one), one level below it; branches nest.

        limits: by resource, ints (near_bytes, far_bytes, disk_bytes also as "6GiB"); absent or None: none. grant: each
        limit is reserved in the parent whole, so that nobody else can take it. apart: resources that count up to this scope
        and not above it, where they are counted otherwise. ValueError where a limit is above what an ancestor has left.
        """
        above = self.root if parent is None else parent
        level = LEVELS[min(LEVELS.index(above.level) + 1, len(LEVELS) - 1)]
        amounts = checked("open", limits)
        amounts_of("open", dict.fromkeys(apart, 0))
        if grant and set(apart) & set(amounts):
            raise ValueError(f"open: apart is {tuple(apart)}, expected none of the resources that are granted")
        with self._lock:
            node = self._node(above)
            for resource, limit in amounts.items():
                if limit is not None and resource not in apart:
                    fits_above(node, resource, limit, 0)
            scope = self._add(node, level, name, amounts)
            self._nodes[scope.id].apart = frozenset(apart)
            if grant:
                for resource, limit in amounts.items():
                    if limit is not None:
                        self._nodes[scope.id].counters[resource].granted = limit
                        for payer in node.paying(resource):
                            payer.counters[resource].reserved += limit
            self._note(node)
        self._deliver()
        return scope

    def close(self, scope: Scope) -> None:
        """Ends a scope; what it consumed stays counted above it. ValueError while it holds bytes, reservations or scopes."""
        with self._lock:
            node = self._node(scope)
            if node.parent is None:
                raise ValueError("close: the global scope cannot end")
            held = {r: node.counters[r].used for r in RECLAIMABLE if node.counters[r].used}
            if node.children or node.holds or held:
                raise ValueError(
                    f"close: {title(node)} has {node.children} scopes, {node.holds} reservations and holds {held or 'nothing'}"
                )
            for resource, counter in node.counters.items():
                if counter.granted is not None:
                    for payer in node.parent.paying(resource):
                        payer.counters[resource].reserved -= counter.granted - counter.used
            node.parent.children -= 1
            del self._nodes[scope.id]
            self._on_regime.pop(scope.id, None)
            self._on_shrink.pop(scope.id, None)
            self._note(node.parent)
        self._deliver()

    def abandon(self, scope: Scope) -> None:
        """For finalizers: the scope's owner is gone. What it holds itself returns and it ends at the next call."""
        self._abandoned.append(scope)

    def set_limit(self, scope: Scope, *, shrink: bool = False, **limits: int | str | None) -> None:
        """Sets limits by resource; None switches one off, and counting goes on.

        ValueError, with nothing changed, where a limit is under used + reserved or above what an ancestor has left.
        shrink: the scope's ``on_shrink`` is first asked to free what is too much; Unsupported if there is none.
        """
        amounts = checked("set_limit", limits)
        if shrink:
            self._ask_to_shrink(scope, amounts)
        with self._lock:
            node = self._node(scope)
            for resource, limit in amounts.items():
                may_set(node, resource, limit)
            for resource, limit in amounts.items():
                counter = node.counters[resource]
                node.set_limit(resource, limit)
                if counter.granted is not None and node.parent is not None:
                    assert limit is not None
                    for payer in node.parent.paying(resource):
                        payer.counters[resource].reserved += limit - counter.granted
                    counter.granted = limit
            self._note(node)
        self._deliver()

    # --- reserving ------------------------------------------------------------------------------------------------------

    def reserve(self, scope: Scope, **amounts: int) -> Hold:
        """A hold on the amounts, by resource, before the work that needs them.

        BudgetExceeded if used + reserved + amount would pass the limit of the scope or an ancestor, with the scope,
        resource, limit, used, reserved and asked; nothing has changed then.
        """
        asked = amounts_of("reserve", amounts)
        with self._lock:
            node = self._node(scope)
            for resource, n in asked.items():
                for payer in node.paying(resource):
                    c = payer.counters[resource]
                    if c.limit is not None and c.taken + n > c.limit:
                        raise BudgetExceeded(
                            f"budget: {title(payer)}, {resource}: limit is {c.limit}, used {c.used}, "
                            f"reserved {c.reserved}, asked {n}"
                        )
            for resource, n in asked.items():
                for payer in node.paying(resource):
                    payer.counters[resource].reserved += n
            node.holds += 1
            self._note(node)
            hold = Hold(self, node, asked)
        self._deliver()
        return hold

    def free(self, scope: Scope, **amounts: int) -> None:
        """Returns amounts of reclaimable resources that were charged to this scope itself.

        ValueError, with nothing changed, for more than it holds or for a consumed resource.
        """
        given = amounts_of("free", amounts)
        with self._lock:
            node = self._node(scope)
            for resource, n in given.items():
                if resource in CONSUMED:
                    raise ValueError(f"free: {resource} is consumed and never returns")
                if n > node.counters[resource].own:
                    raise ValueError(
                        f"free: {title(node)} holds {node.counters[resource].own} of {resource}, asked to free {n}"
                    )
            for resource, n in given.items():
                node.counters[resource].own -= n
                paying = node.paying(resource)
                for payer in node.chain(resource):
                    payer.counters[resource].used -= n
                    if payer not in paying:  # above a grant, what returns is the grant's again
                        payer.counters[resource].reserved += n
            self._note(node)
        self._deliver()

    def _settle(self, hold: Hold, draw: dict[str, int], end: bool) -> None:
        """Makes ``draw`` of a hold used, and where it ends, gives the rest back."""
        with self._lock:
            if hold._ended:
                raise ValueError("hold: it has ended")
            for resource, n in draw.items():
                if n > hold._left.get(resource, 0):
                    raise ValueError(f"hold: {hold._left.get(resource, 0)} of {resource} are left, asked {n}")
            node = hold._node
            for resource, n in draw.items():
                if n == 0:
                    continue
                hold._left[resource] -= n
                node.counters[resource].own += n
                for payer in node.chain(resource):  # above a grant, it was reserved with the grant
                    payer.counters[resource].reserved -= n
                    payer.counters[resource].use(n)
            if end:
                for resource, n in hold._left.items():
                    for payer in node.paying(resource):
                        payer.counters[resource].reserved -= n
                hold._left.clear()
                hold._ended = True
                node.holds -= 1
            self._note(node)
        self._deliver()

    def left(self, scope: Scope, resource: str) -> int | None:
        """What may still be reserved of one resource, by the tightest limit of the scope and its ancestors; None: no limit."""
        with self._lock:
            counters = [node.counters[resource] for node in self._node(scope).paying(resource)]
            return min((c.limit - c.taken for c in counters if c.limit is not None), default=None)

    # --- looking --------------------------------------------------------------------------------------------------------

    def report(self, scope: Scope | None = None) -> ScopeReport:
        """A consistent snapshot of one scope (None: the global one), from any thread."""
        with self._lock:
            node = self._node(self.root if scope is None else scope)
            accounts = {
                name: Account(c.limit, c.used, c.reserved, c.high_water, c.own) for name, c in node.counters.items()
            }
            found = ScopeReport(node.scope, node.regime, accounts)
        self._deliver()
        return found

    def on_regime(self, scope: Scope, callback: OnRegime) -> None:
        """Calls ``callback(scope, old, new)`` once per crossing and direction, in order, outside the lock.

        It may call the ledger. An error it raises is logged, and stops nothing.
        """
        with self._lock:
            self._node(scope)
            self._on_regime.setdefault(scope.id, []).append(callback)

    def on_shrink(self, scope: Scope, callback: OnShrink) -> None:
        """``callback(scope, resource, limit)`` shall free until used + reserved fits the limit to come."""
        with self._lock:
            self._node(scope)
            self._on_shrink[scope.id] = callback

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _add(self, parent: Node | None, level: str, name: str, limits: dict[str, int | None]) -> Scope:
        scope = Scope(self._next, level, name or f"{level} {self._next}")
        self._next += 1
        node = Node(scope, parent)
        for resource, limit in limits.items():
            node.set_limit(resource, limit)
        if parent is not None:
            parent.children += 1
        node.crossing()
        self._nodes[scope.id] = node
        return scope

    def _sweep(self) -> None:
        """Ends what was abandoned. Under the lock."""
        while self._abandoned:
            scope = self._abandoned.popleft()
            node = self._nodes.pop(scope.id, None)
            if node is None or node.parent is None:
                continue
            below = [n for n in self._nodes.values() if node in n.chain()]
            for each in [*below, node]:
                for resource in RECLAIMABLE:
                    for payer in each.chain(resource):
                        payer.counters[resource].used -= each.counters[resource].own
                self._nodes.pop(each.scope.id, None)
            node.parent.children -= 1
            self._note(node.parent)

    def _node(self, scope: Scope) -> Node:
        self._sweep()
        node = self._nodes.get(scope.id)
        if node is None or node.scope is not scope:
            raise ValueError(f"ledger: scope {scope.name!r} is unknown here, or has ended")
        return node

    def _note(self, node: Node) -> None:
        """Queues the crossings of a scope and its ancestors. Under the lock."""
        for each in node.chain():
            if crossed := each.crossing():
                self._events += [(call, each.scope, *crossed) for call in self._on_regime.get(each.scope.id, ())]

    def _deliver(self) -> None:
        """Calls what is queued, in order: one thread at a time, which takes over what others queue meanwhile."""
        if not self._events:
            return
        with self._lock:
            if self._delivering:
                return
            self._delivering = True
        while True:
            with self._lock:
                if not self._events:
                    self._delivering = False
                    return
                call, scope, old, new = self._events.popleft()
            try:
                call(scope, old, new)
            except Exception:
                log.exception("on_regime: the callback of %s raised at %s -> %s", scope.name, old.name, new.name)
            except BaseException:
                self._delivering = False  # the next call goes on
                raise

    def _ask_to_shrink(self, scope: Scope, limits: dict[str, int | None]) -> None:
        with self._lock:
            node = self._node(scope)
            above = [(r, n) for r, n in limits.items() if n is not None and n < node.counters[r].taken]
            callback = self._on_shrink.get(scope.id)
        if above and callback is None:
            raise Unsupported(f"set_limit: shrink asks {scope.name!r} to free, and it has no on_shrink")
        for resource, limit in above:
            assert callback is not None
            callback(scope, resource, limit)


class Hold:
    """A reservation that is drawn, committed or rolled back. As a context manager it is rolled back unless committed."""

    def __init__(self, ledger: Ledger, node: Node, amounts: dict[str, int]) -> None:
        self._ledger = ledger
        self._node = node
        self._left = dict(amounts)
        self._ended = False

    def commit(self, **amounts: int) -> None:
        """Makes the amounts used (a resource not named: all that is left of it), gives the rest back, and ends the hold.

        ValueError above the hold or after its end; then nothing has changed.
        """
        asked = amounts_of("commit", amounts)
        self._ledger._settle(self, dict(self._left) | asked, end=True)

    def draw(self, **amounts: int) -> None:
        """Makes the amounts used; the hold goes on with what is left. ValueError as for :meth:`commit`."""
        self._ledger._settle(self, amounts_of("draw", amounts), end=False)

    def rollback(self) -> None:
        """Gives back what was not drawn, and ends the hold. ValueError after its end."""
        self._ledger._settle(self, {}, end=True)

    def left(self, resource: str) -> int:
        """What may still be drawn."""
        return self._left.get(resource, 0)

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            self.rollback()
