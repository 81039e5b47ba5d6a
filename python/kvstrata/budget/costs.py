"""What a page costs by state, with what is kept beside it."""

from __future__ import annotations

from collections.abc import Mapping

from kvstrata import pools
from kvstrata.budget.protect import PAGE_BOOKS
from kvstrata.config import DTYPES, SLOTS, Shape
from kvstrata.ops import GROUP_PAGES, summary_bytes
from kvstrata.policy.base import FULL, STATES, Policy

FORMATS = {DTYPES[dtype]: name for name, dtype in pools.FORMATS.items()}
SCORES = 68
"""Bytes of a page's scores, with their part of the room to grow."""
FAR_PAGE = 12
"""Bytes of a Far page's checksum and of the number of its Near copy."""
_BLOCK_PART = 5
"""Bytes of a block of summaries beside them, for each page: its head, and room to grow in the list of blocks."""


def page_costs(shape: Shape, layer: int, policy: Policy) -> Mapping[int, int]:
    """Bytes of one page of a layer by state: payload, positions, table entry, scores where the policy keeps them."""
    dim = shape.layers[layer].head_dim
    beside = PAGE_BOOKS + (SCORES if keeps_scores(policy) else 0) + summary(policy, dim)
    full = pools.page_bytes(FORMATS[DTYPES[shape.dtype]], dim)
    return {FULL: full + beside} | {STATES[f]: pools.page_bytes(f, dim) + beside for f in policy.formats}


def far_books(shape: Shape, layer: int, policy: Policy) -> int:
    """Near bytes that a Far page of a layer takes: its positions, entry, summary, checksum and the number of its Near copy."""
    return PAGE_BOOKS + FAR_PAGE + summary(policy, shape.layers[layer].head_dim)


def summary(policy: Policy, head_dim: int) -> int:
    """Bytes of a page's summary, with its part of a block's head and of room to grow, and of its group's, where a selector has
    groups; 0 where none is made."""
    if policy.selector is None:
        return 0
    grouped = -(-group_block(head_dim) // (SLOTS * GROUP_PAGES)) if hasattr(policy.selector, "flat_pages") else 0
    return summary_bytes(head_dim, policy.selector.kind) // SLOTS + _BLOCK_PART + grouped


def group_block(head_dim: int) -> int:
    """Bytes of a block of summaries of groups, with its head and its places in a list that grows."""
    return summary_bytes(head_dim) + SLOTS * _BLOCK_PART


def keeps_scores(policy: Policy) -> bool:
    """Whether scores outlive a plan: they join new ones, or are mass that adds up."""
    return policy.scorer is not None and (policy.combine != "replace" or "mass" in policy.scorer.needs)
