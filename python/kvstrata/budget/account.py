"""What the ledger counts: resources, accounts of one scope, and their frozen snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstrata.budget.regime import Regime, regime

RECLAIMABLE = ("near_bytes", "far_bytes", "disk_bytes")
"""Returned when freed."""
CONSUMED = ("h2d_bytes", "d2h_bytes", "prefill_tokens", "cached_tokens", "decode_tokens", "plans", "wall_ns")
"""Never returned."""
RESOURCES = RECLAIMABLE + CONSUMED
LEVELS = ("global", "cache", "sequence", "branch")


@dataclass
class Counter:
    """One resource of one scope, its descendants included. ``granted``: what its whole limit holds in the parent."""

    limit: int | None = None
    used: int = 0
    reserved: int = 0
    high_water: int = 0
    own: int = 0  # used by the scope itself, not by its descendants
    granted: int | None = None

    @property
    def taken(self) -> int:
        return self.used + self.reserved

    def use(self, n: int) -> None:
        self.used += n
        self.high_water = max(self.high_water, self.used)


@dataclass(frozen=True)
class Scope:
    """A handle of one owner in a ledger's tree: global, cache, sequence or branch."""

    id: int
    level: str
    name: str


@dataclass
class Node:
    """A scope's place in the tree and its counters."""

    scope: Scope
    parent: Node | None
    counters: dict[str, Counter] = field(default_factory=lambda: {name: Counter() for name in RESOURCES})
    children: int = 0
    holds: int = 0
    regime: Regime = Regime.HIGH
    apart: frozenset[str] = frozenset()  # resources that do not count above it
    limited: list[Counter] = field(default_factory=list)  # those of its counters that have a limit

    def set_limit(self, resource: str, limit: int | None) -> None:
        """The only way to one: what is limited is looked at with every reservation."""
        self.counters[resource].limit = limit
        self.limited = [c for c in self.counters.values() if c.limit is not None]

    def chain(self, resource: str | None = None) -> list[Node]:
        """This scope and every ancestor, upwards: those in which a resource counts, or all."""
        nodes, node = [], self
        while True:
            nodes.append(node)
            if node.parent is None or resource in node.apart:
                return nodes
            node = node.parent

    def paying(self, resource: str) -> list[Node]:
        """The scopes that a reservation counts in: up to the first whose limit is held in its parent whole."""
        nodes = []
        for node in self.chain(resource):
            nodes.append(node)
            if node.counters[resource].granted is not None:
                break
        return nodes

    def crossing(self) -> tuple[Regime, Regime] | None:
        """(old, new) if the scope's worst limited resource has crossed a cut; the new regime is then taken."""
        if not self.limited and self.regime is Regime.HIGH:
            return None
        left = [(c.limit - c.taken) / c.limit if c.limit else 0.0 for c in self.limited]
        old, new = self.regime, regime(min(left, default=1.0), self.regime)
        self.regime = new
        return None if old == new else (old, new)


@dataclass(frozen=True)
class Account:
    """One resource of one scope at one moment, the scope's descendants included; int64.

    limit: None where there is none; used; reserved: held for work that is under way; high_water: most ever used;
    own: used by the scope itself, without its descendants.
    """

    limit: int | None
    used: int
    reserved: int
    high_water: int
    own: int

    @property
    def remaining(self) -> int | None:
        """limit - used - reserved; None where there is no limit."""
        return None if self.limit is None else self.limit - self.used - self.reserved


@dataclass(frozen=True)
class ScopeReport:
    """All accounts of one scope at one moment, as attributes: ``report.near_bytes.remaining``.

    Charged bytes are the used ones (``own``: charged to the scope itself). A cache charges its slabs, tables and workspace to
    its own scope, and to those of its sequences the pages that they took, which count again there and nowhere above. Fair
    shares are the cache's to tell (:meth:`kvstrata.Cache.share`).
    """

    scope: Scope
    regime: Regime
    accounts: Mapping[str, Account]

    def __getattr__(self, name: str) -> Account:
        accounts: Mapping[str, Account] = self.__dict__.get("accounts", {})
        if name in accounts:
            return accounts[name]
        raise AttributeError(f"ScopeReport has no resource {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: level, name, regime, and each account's numbers."""
        return {"level": self.scope.level, "name": self.scope.name, "regime": self.regime.name} | {
            name: {**vars(account), "remaining": account.remaining} for name, account in self.accounts.items()
        }
