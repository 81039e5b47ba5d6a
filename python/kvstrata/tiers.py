"""The store of a cache, with or without a Far tier."""

from __future__ import annotations

from dataclasses import replace

from kvstrata import holdings
from kvstrata._C import Store
from kvstrata.budget import Budget
from kvstrata.budget.room import keeps_scores
from kvstrata.config import DTYPES, Shape, Unsupported
from kvstrata.policy import Policy, resolve
from kvstrata.policy.base import FULL
from kvstrata.recall import Far

RING = 64
"""Near pages of each format in which Far pages are put together, and read through by steps of several tokens."""


def read_tokens(budget: Budget | str | int | None, policy: Policy | str | None) -> tuple[Budget | None, Policy]:
    """A budget in tokens says what a policy that selects reads in a step; it holds everything, so no limit is left."""
    asked, found = Budget.parse(budget), resolve(policy)
    if asked is None or asked.unit != "tokens" or found.selector is None:
        return asked, found
    return None, replace(found, selector=found.selector.reading(int(asked.value)))


def resolve_far(far: Far | str | int | None, policy: Policy) -> Far | None:
    """The Far tier that a cache gets: "auto" is one without a limit exactly when the policy archives. ValueError for a size
    that is none; Unsupported for a tier that the policy would not use."""
    if far is None:
        return None
    if far == "auto":
        return Far() if policy.archives else None
    tier = far if isinstance(far, Far) else Far(far)
    if not policy.archives:
        raise Unsupported(f"Cache: far is {far!r}, policy {policy.name!r} archives nothing; expected 'auto' or None")
    return tier


def make_store(shape: Shape, policy: Policy, hold: int, far: Far | None) -> Store:
    """A store for the policy as it runs."""
    assert policy.window is not None
    selector = policy.selector
    store = Store(
        [(s.kv_heads, s.q_heads, s.head_dim, s.window or 0) for s in shape.layers],
        DTYPES[shape.dtype],
        policy.window,
        hold,
        policy.sinks,
        [holdings.FORMATS.index(name) for name in policy.formats],
        policy.queries,
        keeps_scores(policy),
        policy.massed,
        (0, 0, 1.0, 0) if selector is None else selector.native(policy.sinks, policy.window),
        list(policy.dense_layers),
        [] if far is None else [getattr(policy.planner, "native_state", FULL)],
        0 if far is None else RING,
    )
    if selector is not None:
        store.set_mass_floor(selector.mass_floor)
    return store
