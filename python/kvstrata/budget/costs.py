"""What a page costs by state, with what is kept beside it."""

from __future__ import annotations

from collections.abc import Mapping

from kvstrata import pools
from kvstrata.budget.protect import PAGE_BOOKS
from kvstrata.config import DTYPES, Shape
from kvstrata.policy.base import FULL, STATES, Policy

FORMATS = {DTYPES[dtype]: name for name, dtype in pools.FORMATS.items()}
SCORES = 68
"""Bytes of a page's scores, with their part of the room to grow."""


def page_costs(shape: Shape, layer: int, policy: Policy) -> Mapping[int, int]:
    """Bytes of one page of a layer by state: payload, positions, table entry, scores where the policy keeps them."""
    beside = PAGE_BOOKS + (SCORES if keeps_scores(policy) else 0)
    dim = shape.layers[layer].head_dim
    full = pools.page_bytes(FORMATS[DTYPES[shape.dtype]], dim)
    return {FULL: full + beside} | {STATES[f]: pools.page_bytes(f, dim) + beside for f in policy.formats}


def keeps_scores(policy: Policy) -> bool:
    """Whether scores outlive a plan: they join new ones, or are mass that adds up."""
    return policy.scorer is not None and (policy.combine != "replace" or "mass" in policy.scorer.needs)
