"""The store of a cache, with or without a Far tier."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, inf
from typing import Literal

from kvstrata import holdings, pools
from kvstrata._C import Store
from kvstrata.budget import Budget
from kvstrata.budget.costs import keeps_scores
from kvstrata.config import DTYPES, Shape, Unsupported
from kvstrata.policy import Policy
from kvstrata.policy.base import FULL, Reading, Selector
from kvstrata.recall import Far


def read_tokens(budget: Budget | None, policy: Policy) -> tuple[Budget | None, Policy]:
    """What is left of a budget as a limit, and the policy. One in tokens says what a policy that selects reads in a step; it
    holds everything, so no limit is left. Unsupported where the budget counts what is stored, or falls."""
    if budget is None or budget.unit != "tokens" or policy.selector is None:
        return budget, policy
    stores = f"policy {policy.name!r} stores every token, the budget is what a step reads"
    if budget.count:
        raise Unsupported(f"budget: count: {stores}; expected count=False")
    if budget.schedule is not None and not budget.schedule.constant:
        raise Unsupported(f"budget: schedule: {stores}, which does not fall; expected None or a constant one")
    policy = replace(policy, selector=policy.selector.reading(int(budget.value)))
    if policy.archives:
        policy = replace(policy, scorer=None, allocator=None)  # all of it goes Far: nothing is to be divided
    return None, policy


def resolve_far(far: Far | str | int | None, budget: Budget | None, policy: Policy) -> Far | None:
    """The Far tier that a cache gets, of its own argument or of its budget's: "auto" is one without a limit exactly when the
    policy archives. ValueError for a size that is none, and for two tiers that differ; Unsupported for a tier that the policy
    would not use."""
    given, asked = _tier(far), "auto" if budget is None else _tier(budget.far)
    if given == "auto":
        found = asked
    elif asked == "auto" or _limits(given) == _limits(asked):
        found = given
    else:
        assert budget is not None
        raise ValueError(
            f"Cache: far is {far!r}, that of the budget is {budget.far!r}, expected one of them, or both equal"
        )
    if found == "auto":
        return Far() if policy.archives or policy.episodic else None
    if found is not None and not (policy.archives or policy.episodic):
        said = far if given != "auto" else budget and budget.far
        raise Unsupported(f"Cache: far is {said!r}, policy {policy.name!r} archives nothing; expected 'auto' or None")
    return found


def _tier(far: Far | float | str | None) -> Far | Literal["auto"] | None:
    """A tier from its spellings."""
    if far is None or isinstance(far, Far):
        return far
    if far == "auto":
        return "auto"
    return Far() if far == inf else Far(far)  # type: ignore[arg-type]


def _limits(tier: Far | str | None) -> object:
    """Whether there is a tier, and its bytes."""
    return tier is not None, tier.bytes if isinstance(tier, Far) else None


def native_reading(
    reading: Reading,
) -> tuple[int, int, float, int, int, int, float, int, float, int, int, int, float, int]:
    """As the binding takes it."""
    kind = ("mean", "bounds", "mean_value", "halves", "quarters").index(reading.kind)
    return (*reading[:4], kind, *reading[5:])


def make_store(shape: Shape, policy: Policy, hold: int, far: Far | None, charged: bool) -> Store:
    """A store for the policy as it runs. charged: its pages know who took them."""
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
        native_reading(Reading(0, 0) if selector is None else selector.native(policy.sinks, policy.window)),
        list(policy.dense_layers),
        [] if far is None else [getattr(policy.planner, "native_state", FULL)],
        0 if far is None else policy.ring,
        policy.episodic,
        pools.device_code("Shape: device", shape.device),
        charged,
        policy.centre,
    )
    if selector is not None:
        store.set_choose(getattr(selector, "ask", None))
        store.set_mass_floor(selector.mass_floor)
    if far is not None:
        store.set_ahead(True, ceil(far.timeout * 1000))
    return store


def read_by(store: Store, selector: Selector, policy: Policy) -> None:
    """Steps of one token read by another selector from now on. ValueError or Unsupported with nothing changed."""
    store.set_recall(native_reading(selector.native(policy.sinks, policy.window or 0)))
    store.set_choose(getattr(selector, "ask", None))
    store.set_mass_floor(selector.mass_floor)
