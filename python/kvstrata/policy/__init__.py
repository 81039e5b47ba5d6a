"""Named policies and the roles they are made of."""

from __future__ import annotations

from collections.abc import Callable

from kvstrata.ops import choose_states
from kvstrata.policy.adakv import adakv
from kvstrata.policy.arkv import MeanSpread, arkv
from kvstrata.policy.backbone import Backbone
from kvstrata.policy.base import Allowance, Plan, Planner, Policy, Reader, Scorer, Seen
from kvstrata.policy.epicache import epicache
from kvstrata.policy.full import full
from kvstrata.policy.h2o import AccumulatedMass, h2o
from kvstrata.policy.icecache import icecache
from kvstrata.policy.keep_top import KeepTop
from kvstrata.policy.keydiff import KeyDiversity, keydiff
from kvstrata.policy.keynorm import KeyNorm, keynorm
from kvstrata.policy.kivi import QuantizeAll, kivi
from kvstrata.policy.patched import PatchedPrompt
from kvstrata.policy.pyramidkv import pyramidkv
from kvstrata.policy.quest import quest
from kvstrata.policy.snapkv import WindowVote, snapkv
from kvstrata.policy.strata import strata
from kvstrata.policy.streaming import SinksAndTail, streaming
from kvstrata.policy.three_states import ThreeStates

NAMED: dict[str, Callable[[], Policy]] = {
    "full": full,
    "streaming": streaming,
    "h2o": h2o,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "adakv": adakv,
    "kivi": kivi,
    "keynorm": keynorm,
    "keydiff": keydiff,
    "arkv": arkv,
    "quest": quest,
    "icecache": icecache,
    "strata": strata,
}
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


__all__ = [
    "NAMED",
    "AccumulatedMass",
    "Allowance",
    "Backbone",
    "KeepTop",
    "KeyDiversity",
    "KeyNorm",
    "MeanSpread",
    "PatchedPrompt",
    "Plan",
    "Planner",
    "Policy",
    "QuantizeAll",
    "Reader",
    "Scorer",
    "Seen",
    "SinksAndTail",
    "ThreeStates",
    "WindowVote",
    "adakv",
    "arkv",
    "choose_states",
    "epicache",
    "full",
    "h2o",
    "icecache",
    "keydiff",
    "keynorm",
    "kivi",
    "pyramidkv",
    "quest",
    "resolve",
    "snapkv",
    "strata",
    "streaming",
]
