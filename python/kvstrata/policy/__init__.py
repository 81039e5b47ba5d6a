"""Named policies and the roles they are made of."""

from __future__ import annotations

from collections.abc import Callable

from kvstrata.policy.base import Plan, Planner, Policy, Seen
from kvstrata.policy.full import full
from kvstrata.policy.streaming import SinksAndTail, streaming

NAMED: dict[str, Callable[[], Policy]] = {"full": full, "streaming": streaming}
"""Policies that a name stands for, each with its defaults."""


def resolve(spec: Policy | str | None) -> Policy:
    """A policy from itself, its name, or None (``full``)."""
    if spec is None:
        return full()
    if isinstance(spec, Policy):
        return spec
    if isinstance(spec, str) and spec in NAMED:
        return NAMED[spec]()
    raise ValueError(f"policy: {spec!r} is unknown, expected a Policy or one of {', '.join(NAMED)}")


__all__ = ["NAMED", "Plan", "Planner", "Policy", "Seen", "SinksAndTail", "full", "resolve", "streaming"]
