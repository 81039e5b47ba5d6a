"""What a byte limit leaves for tokens beside the protected ones, and how a policy is made to fit a small limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvstrata import pools
from kvstrata.budget.allocate import Uniform
from kvstrata.budget.protect import ENTRY_BYTES, LEAST_CHUNK, PAGE_BOOKS, concretise, least_limit, limit_bytes, pages
from kvstrata.budget.units import Budget
from kvstrata.config import DTYPES, SLOTS, Shape, Unsupported
from kvstrata.ops import summary_bytes
from kvstrata.policy.base import FULL, STATES, Policy

FORMATS = {DTYPES[dtype]: name for name, dtype in pools.FORMATS.items()}
PIECE = 64
"""A limit's share (one part in so many) that is kept free for the plan that rewrites a row: less than a row takes where rows
are few. At the least two pages of each format, into which one page with its part-filled neighbours goes."""
SLACK = 32
"""A limit's share (one part in so many) that free pages of part-filled slabs may take: two slabs of a 64th."""

_SCORES = 68
"""Bytes of a page's scores, with their part of the room to grow."""
_SUMMARY, _NEAR_SLOT, _CHECKSUM = 12, 16, 8
"""Bytes of a summary's part of a block's head and of room to grow; of a Near copy's place; of a Far page's checksum."""
_SLAB, _SLABS = 128, PIECE + 16
"""Bytes that the books of a slab take; slabs of a cache that is full, with those that are made and emptied by a plan."""
_ROW, _ROW_SCORES = 280, 512
"""Bytes that the tables of a row, and its scores, take however few entries it has."""

LEAST_RING = 8
LEAST_QUERIES = 8
REFERENCE = 2048


def page_costs(shape: Shape, layer: int, policy: Policy) -> Mapping[int, int]:
    """Bytes of one page of a layer by state: payload, positions, table entry, scores where the policy keeps them."""
    dim = shape.layers[layer].head_dim
    beside = PAGE_BOOKS + (_SCORES if keeps_scores(policy) else 0) + _summary_bytes(policy, dim)
    full = pools.page_bytes(FORMATS[DTYPES[shape.dtype]], dim)
    return {FULL: full + beside} | {STATES[f]: pools.page_bytes(f, dim) + beside for f in policy.formats}


def far_books(shape: Shape, layer: int, policy: Policy) -> int:
    """Near bytes that a Far page of a layer takes: its positions, entry, summary and checksum."""
    return PAGE_BOOKS + _CHECKSUM + _summary_bytes(policy, shape.layers[layer].head_dim)


def _summary_bytes(policy: Policy, head_dim: int) -> int:
    """Of one page's summary, with its part of a block's head and of room to grow."""
    if policy.selector is None:
        return 0
    return summary_bytes(head_dim, policy.selector.kind) // SLOTS + _SUMMARY


def keeps_scores(policy: Policy) -> bool:
    """Whether scores outlive a plan: they join new ones, or are mass that adds up."""
    return policy.scorer is not None and (policy.combine != "replace" or "mass" in policy.scorer.needs)


@dataclass(frozen=True)
class Room:
    """Bytes of a cache of ``batch`` sequences under a limit, beside what is not divided.

    content: for unprotected tokens, all rows together, without what a plan needs to rewrite a row piece by piece.
    """

    limit: int
    batch: int
    content: int

    def least(self) -> int:
        """The limit at which the content would be empty."""
        return self.limit - self.content


def room(policy: Policy, shape: Shape, limit: int, batch: int, falls: tuple[int, int] | None = None) -> Room:
    """What the limit leaves. May be negative. falls: the first and the last bytes of a schedule.

    Between plans either a prompt chunk stands in one layer, or the tokens of an interval in all: no step begins with more
    unplanned tokens than it may add to (``Step.open``).
    """
    planned = [(i, s) for i, s in enumerate(shape.layers) if s.window is None]
    costs = {i: page_costs(shape, i, policy) for i, _ in enumerate(shape.layers)}
    window = policy.window or SLOTS
    held = pages(policy.sinks) + window // SLOTS + 1
    whole = sum(s.kv_heads * costs[i][FULL] for i, s in planned)
    sliding = sum(
        s.kv_heads * costs[i][FULL] * (pages(s.window + 64) + 2)
        for i, s in enumerate(shape.layers)
        if s.window is not None
    )
    widest = max(s.kv_heads * costs[i][FULL] for i, s in shape.kinds)
    unplanned = max(widest * (policy.chunk // SLOTS + 1), whole * (policy.interval // SLOTS))
    smallest = min(min(cost.values()) for cost in costs.values())
    beside = books(policy, shape, limit, batch).of(0, _slabs(limit, smallest)) + _recalled(policy, shape, batch)
    content = limit - limit // SLACK - batch * (whole * held + sliding + unplanned) - beside
    if falls is not None:
        content -= _of_more(policy, shape, limit, batch, *falls)
    rows = max(1, batch * sum(s.kv_heads for _, s in planned))
    piece = max(limit // PIECE, 2 * max(sum(cost.values()) for cost in costs.values()))
    return Room(limit, batch, content - min(piece, content // (rows + 1)))


def _recalled(policy: Policy, shape: Shape, batch: int) -> int:
    """What a Far tier has Near: a ring of each head dimension, and of each row the copies of what a step reads."""
    if not policy.archives or policy.selector is None:
        return 0
    copies = policy.selector.native(policy.sinks, policy.window or SLOTS).widest
    state = getattr(policy.planner, "native_state", FULL)
    indexed = [(i, s) for i, s in enumerate(shape.layers) if s.window is None and i not in policy.dense_layers]
    ring = {s.head_dim: policy.ring * page_costs(shape, i, policy)[state] for i, s in indexed}
    return sum(ring.values()) + batch * copies * sum(
        s.kv_heads * page_costs(shape, i, policy)[state] for i, s in indexed
    )


@dataclass(frozen=True)
class Books:
    """What tables, scores, rings, centres and the workspace of decoding take at the most, in bytes. fixed: however few pages
    there are; page, slab: for each of these."""

    fixed: int = 0
    page: int = 0
    slab: int = 0

    def of(self, pages: int, slabs: int) -> int:
        """Bytes with so many pages and slabs in all."""
        return self.fixed + pages * self.page + slabs * self.slab


def books(policy: Policy, shape: Shape, limit: int, batch: int) -> Books:
    """The books of ``batch`` sequences that hold so many bytes at the most."""
    each = (_ROW + (_ROW_SCORES if keeps_scores(policy) else 0)) * shape.rows
    planned = [s for s in shape.layers if s.window is None]
    each += (
        2 * policy.queries * sum(s.q_heads * s.head_dim * shape.dtype.itemsize for s in planned)
    )  # a step's own, too
    each += sum(s.kv_heads * (4 * s.head_dim + 64) for s in planned) if policy.formats else 0
    beside = ENTRY_BYTES + (_SCORES if keeps_scores(policy) else 0)
    if policy.selector is not None:
        beside += max(_summary_bytes(policy, s.head_dim) for s in shape.layers)
        near_pages = policy.selector.native(policy.sinks, policy.window or SLOTS).near_pages
        each += near_pages * _NEAR_SLOT * shape.rows
    return Books(batch * each + _workspace(policy, shape, limit, batch), beside, _SLAB)


def _slabs(limit: int, page: int) -> int:
    """Slabs of a cache that is full; its smallest pages have so many bytes, small slabs one or two of them."""
    return min(_SLABS, limit // (2 * page))


def _of_more(policy: Policy, shape: Shape, limit: int, batch: int, first: int, last: int) -> int:
    """What a limit that falls keeps of the first one: its workspace, and the books of its slabs, which are small ones as they
    have to fit the last."""
    smallest = min(min(page_costs(shape, i, policy).values()) for i, _ in shape.kinds)
    slabs = first // smallest // max(1, last // PIECE // smallest) - _slabs(limit, smallest)
    grown = _workspace(policy, shape, max(first, limit), batch) - _workspace(policy, shape, limit, batch)
    return max(0, slabs) * _SLAB + grown


def _workspace(policy: Policy, shape: Shape, limit: int, batch: int) -> int:
    """Of decoding: partial results of each row's chunks of 8 pages, as many pages as the limit may buy; by thread, queries,
    logits of a block of pages and half a decoded page (``csrc/cpu/attend_plan.cpp``)."""
    rows = batch * shape.rows
    most = 0
    for i, s in shape.kinds:
        group, entries = s.q_heads // s.kv_heads, limit // (rows * min(page_costs(shape, i, policy).values())) + 1
        dim = -(-s.head_dim // 16) * 16
        partial = max(-(-entries // 64), min(128, -(-entries // 8))) * (group * (dim + 1) * 4 + 64)
        mass = group * (entries * SLOTS + 1) * 4 if policy.massed else 0
        scratch = (group * (4 * dim + 288) + SLOTS * dim) * 4 + 512
        most = max(most, batch * s.kv_heads * (32 + partial + mass) + torch.get_num_threads() * scratch)
    return most


def fit(
    policy: Policy, shape: Shape, budget: Budget | None, lengths: Sequence[int], falls: tuple[int, int] | None = None
) -> Policy:
    """The policy as it runs under a budget with sequences of so many tokens. ValueError where the budget is too small.

    falls: the first and the last bytes of a schedule; it has to fit into the last, Unsupported for one that cannot fall.

    Without an allocator: :func:`kvstrata.budget.protect.concretise`. A share is taken of at least REFERENCE tokens: it
    grows with the sequences, sinks and tail do not.
    """
    if policy.allocator is None and policy.formats and budget is not None and not policy.archives:
        policy = replace(policy, allocator=Uniform())  # what quantizes all keeps to a limit in equal shares
    if policy.allocator is None:
        if falls is not None:
            raise Unsupported(
                f"budget: schedule: what policy {policy.name!r} holds cannot fall, expected a policy with an allocator"
            )
        return concretise(policy, shape, budget, batch=len(lengths))
    if budget is None:
        raise ValueError(f"budget: policy {policy.name!r} needs one, got None")
    heads = sorted({s.kv_heads for s in shape.layers if s.window is None})
    if len(heads) > 1:
        raise Unsupported(
            f"policy {policy.name!r}: layers have {heads} KV heads, a division over layers needs them equal"
        )
    if budget.unit == "share" and budget.at is None:
        lengths = [max(n, REFERENCE) for n in lengths]
    if policy.window is None and budget.unit == "tokens":
        share = int(budget.value * policy.window_share) // SLOTS * SLOTS
        policy = replace(policy, window=max(SLOTS, share))
    limit = limit_bytes(budget, shape, lengths) if falls is None else falls[1]
    return fitted(policy, shape, limit, len(lengths), falls)


def limit_now(policy: Policy, shape: Shape, budget: Budget, lengths: Sequence[int]) -> int:
    """Bytes that a cache of sequences of so many tokens may hold.

    A share of few tokens is less than sinks and tail: until it passes what those need, that is the limit.
    """
    limit = limit_bytes(budget, shape, lengths)
    if budget.unit == "share" and budget.at is None:
        least = room(policy, shape, limit, len(lengths)).least() * SLACK // (SLACK - 1)
        if policy.archives:
            each = sum(s.kv_heads * far_books(shape, i, policy) for i, s in enumerate(shape.layers))
            least += sum(pages(n) for n in lengths) * each
        limit = max(limit, least + len(lengths) * shape.rows * max(page_costs(shape, 0, policy).values()))
    return limit


def fitted(policy: Policy, shape: Shape, limit: int, batch: int, falls: tuple[int, int] | None = None) -> Policy:
    """The policy with ring, chunk, interval, queries and window made smaller, in this order, until three quarters of the limit
    are left for content, or they are at their least; where that leaves less than five eighths, queries that only statistics read
    go. An eighth is enough where what is not held Near is not lost. ValueError where even then nothing is left.

    A large tail is worth little under a small limit; under a large one nothing changes. A tail that is a share of the limit is
    what the policy wants: three quarters of the rest are left then.
    """
    shared = policy.window is None
    if shared:
        policy = replace(policy, window=_share_of_tail(policy, shape, limit, batch))
    while True:
        tail = _tail_bytes(policy, shape, batch) if shared else 0
        content = room(policy, shape, limit, batch, falls).content
        smaller = _smaller(policy)
        if policy.archives and content >= limit // 8:  # what is not held Near is not lost
            break
        enough = 5 if smaller is not None and smaller.queries == 0 < policy.queries else 6
        if smaller is None or content >= enough * (limit - tail) // 8:
            break
        policy = smaller
    if content <= 0:
        smallest = policy

        def fits(n: int) -> bool:
            return room(smallest, shape, n, batch, None if falls is None else (falls[0], n)).content > 0

        raise ValueError(f"budget: {limit} bytes for {batch} sequence(s), expected at least {least_limit(fits, limit)}")
    return policy


def _share_of_tail(policy: Policy, shape: Shape, limit: int, batch: int) -> int:
    """The window that takes its share of what the limit holds in Full pages."""
    per_page = batch * sum(s.kv_heads * page_costs(shape, i, policy)[FULL] for i, s in enumerate(shape.layers))
    return max(SLOTS, int(limit * policy.window_share) // per_page * SLOTS)


def _tail_bytes(policy: Policy, shape: Shape, batch: int) -> int:
    """Full pages of the window in the layers that are planned."""
    assert policy.window is not None
    planned = [(i, s) for i, s in enumerate(shape.layers) if s.window is None]
    return policy.window // SLOTS * batch * sum(s.kv_heads * page_costs(shape, i, policy)[FULL] for i, s in planned)


def _smaller(policy: Policy) -> Policy | None:
    assert policy.window is not None
    if policy.archives and policy.ring >= 2 * LEAST_RING:
        return replace(policy, ring=policy.ring // 2)
    if policy.chunk >= 4 * LEAST_CHUNK:
        return replace(policy, chunk=policy.chunk // 2 // SLOTS * SLOTS)
    if policy.interval > SLOTS:
        return replace(policy, interval=policy.interval // 2 // SLOTS * SLOTS or SLOTS)
    if policy.window > 2 * SLOTS and policy.window >= 2 * policy.queries:
        return replace(policy, window=policy.window // 2 // SLOTS * SLOTS)
    if policy.queries > LEAST_QUERIES:
        return policy.with_queries(max(LEAST_QUERIES, policy.queries // 2))
    if policy.window > SLOTS:
        return replace(policy, window=policy.window // 2 // SLOTS * SLOTS)
    if policy.chunk > LEAST_CHUNK:
        return replace(policy, chunk=LEAST_CHUNK)
    if policy.queries > 0 and int(getattr(policy.scorer, "queries", 0)) == 0:
        return policy.with_queries(0)
    return None
