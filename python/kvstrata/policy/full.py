"""``full``: everything stays, at full precision. What every other policy is compared with."""

from __future__ import annotations

from kvstrata.policy.base import Policy


def full() -> Policy:
    """Keeps every token Full. A budget is a hard limit: a step that does not fit raises."""
    return Policy("full")
