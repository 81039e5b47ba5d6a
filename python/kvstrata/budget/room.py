"""What a byte limit leaves for tokens beside the protected ones, and how a policy is made to fit a small limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvstrata.budget.allocate import Uniform
from kvstrata.budget.books import SLAB, books, workspace
from kvstrata.budget.costs import far_books, page_costs
from kvstrata.budget.protect import LEAST_CHUNK, concretise, least_limit, limit_bytes, pages
from kvstrata.budget.units import Budget
from kvstrata.config import SLOTS, Shape, Unsupported
from kvstrata.policy.base import FULL, Policy

PIECE = 64
"""A limit's share (one part in so many) that is kept free for the plan that rewrites a row: less than a row takes where rows
are few. At the least two pages of each format, into which one page with its part-filled neighbours goes."""
SLACK = 32
"""A limit's share (one part in so many) that free pages of part-filled slabs may take: two slabs of a 64th."""

_SLABS = PIECE + 16
"""Slabs of a cache that is full, with those that are made and emptied by a plan."""

LEAST_RING = 8
LEAST_QUERIES = 8
REFERENCE = 2048


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
    beside = books(policy, shape, limit, batch).of(0, _slabs(limit, smallest))
    ring, copies = _recalled(policy, shape, batch)
    content = limit - limit // SLACK - batch * (whole * held + sliding + unplanned) - beside - ring - copies
    if falls is not None:
        content -= _of_more(policy, shape, limit, batch, *falls)
    if content <= 0:  # copies give way: what a step reads goes through the ring
        content += copies
    rows = max(1, batch * sum(s.kv_heads for _, s in planned))
    piece = max(limit // PIECE, 2 * max(sum(cost.values()) for cost in costs.values()))
    return Room(limit, batch, content - min(piece, content // (rows + 1)))


def _recalled(policy: Policy, shape: Shape, batch: int) -> tuple[int, int]:
    """What a Far tier has Near: a ring of each head dimension, and of each row the copies of what a step reads, which may go
    where the ring holds as many."""
    if not policy.archives or policy.selector is None:
        return 0, 0
    reading = policy.selector.native(policy.sinks, policy.window or SLOTS)
    copies = reading.widest if reading.near_pages else 0
    state = getattr(policy.planner, "native_state", FULL)
    indexed = [(i, s) for i, s in enumerate(shape.layers) if s.window is None and i not in policy.dense_layers]
    ring = {s.head_dim: policy.ring * page_costs(shape, i, policy)[state] for i, s in indexed}
    near = batch * copies * sum(s.kv_heads * page_costs(shape, i, policy)[state] for i, s in indexed)
    fixed = sum(ring.values())
    return (fixed, near) if copies <= policy.ring else (fixed + near, 0)


def _slabs(limit: int, page: int) -> int:
    """Slabs of a cache that is full; its smallest pages have so many bytes, small slabs one or two of them."""
    return min(_SLABS, limit // (2 * page))


def _of_more(policy: Policy, shape: Shape, limit: int, batch: int, first: int, last: int) -> int:
    """What a limit that falls keeps of the first one: its workspace, and the books of its slabs, which are small ones as they
    have to fit the last."""
    smallest = min(min(page_costs(shape, i, policy).values()) for i, _ in shape.kinds)
    slabs = first // smallest // max(1, last // PIECE // smallest) - _slabs(limit, smallest)
    grown = workspace(policy, shape, max(first, limit), batch) - workspace(policy, shape, limit, batch)
    return max(0, slabs) * SLAB + grown


def fit(
    policy: Policy, shape: Shape, budget: Budget | None, lengths: Sequence[int], falls: tuple[int, int] | None = None
) -> Policy:
    """The policy as it runs under a budget with sequences of so many tokens. ValueError where the budget is too small.

    falls: the first and the last bytes of a schedule; it has to fit into the last, Unsupported for one that cannot fall.

    Without an allocator: :func:`kvstrata.budget.protect.concretise`. A share is taken of at least REFERENCE tokens: it
    grows with the sequences, sinks and tail do not.
    """
    if policy.allocator is None and policy.formats and budget is not None and not (policy.archives or policy.episodic):
        policy = replace(policy, allocator=Uniform())  # what quantizes all keeps to a limit in equal shares
    if getattr(policy.planner, "counts", False) and not (budget is not None and budget.count):
        raise ValueError(f"budget: {budget}, policy {policy.name!r} expects one in tokens with count=True")
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
    own = policy.window is None and budget.unit == "tokens"
    if own:
        share = int(budget.value * policy.window_share) // SLOTS * SLOTS
        policy = replace(policy, window=max(SLOTS, share))
    limit = limit_bytes(budget, shape, lengths) if falls is None else falls[1]
    return fitted(policy, shape, limit, len(lengths), falls, own)


def _far_books(policy: Policy, shape: Shape, tokens: int) -> int:
    """Near bytes that so many tokens of a sequence take once they are Far."""
    return pages(tokens) * sum(s.kv_heads * far_books(shape, i, policy) for i, s in enumerate(shape.layers))


def limit_now(policy: Policy, shape: Shape, budget: Budget, lengths: Sequence[int]) -> int:
    """Bytes that a cache of sequences of so many tokens may hold.

    A share of few tokens is less than sinks and tail: until it passes what those need, that is the limit.
    """
    limit = limit_bytes(budget, shape, lengths)
    if budget.unit == "share" and budget.at is None:
        least = room(policy, shape, limit, len(lengths)).least() * SLACK // (SLACK - 1)
        if policy.archives:
            least += sum(_far_books(policy, shape, n) for n in lengths)
        limit = max(limit, least + len(lengths) * shape.rows * max(page_costs(shape, 0, policy).values()))
    return limit


def fitted(
    policy: Policy,
    shape: Shape,
    limit: int,
    batch: int,
    falls: tuple[int, int] | None = None,
    own: bool = False,
) -> Policy:
    """The policy with ring, chunk, interval, queries and window made smaller, in this order, until three quarters of the limit
    are left for content, or they are at their least; where that leaves less than five eighths, queries that only statistics
    read go. An eighth and the books of REFERENCE tokens are enough where what is not held Near is not lost. ValueError where
    even then nothing is left.

    A large tail is worth little under a small limit; under a large one nothing changes. A tail that is a share of the limit
    is what the policy wants: three quarters of the rest are left then. own: it is a share already, of the limit that each
    sequence has, and gives way only as long as it holds more than its share of what tail and content hold; one of a limit that
    sequences yet to come share leaves them more.
    """
    shared = own or policy.window is None
    if policy.window is None:
        policy = replace(policy, window=_share_of_tail(policy, shape, limit, batch))
    while True:
        tail = _tail_bytes(policy, shape, batch) if shared else 0
        content = room(policy, shape, limit, batch, falls).content
        smaller = _smaller(policy)
        if policy.archives and content >= limit // 8 + batch * _far_books(policy, shape, REFERENCE):
            break  # what is not held Near is not lost
        enough = 5 if smaller is not None and smaller.queries == 0 < policy.queries else 6
        if smaller is None or content >= enough * (limit - tail) // 8:
            break
        if (
            own
            and smaller.window != policy.window
            and content * policy.window_share >= tail * (1 - policy.window_share)
        ):
            break  # the tail gives way only until the others have their part beside it
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


def _reads(policy: Policy) -> int:
    """Pages that a row reads in a step of one token."""
    return 0 if policy.selector is None else policy.selector.native(policy.sinks, policy.window or SLOTS).widest


def _smaller(policy: Policy) -> Policy | None:
    assert policy.window is not None
    if policy.archives and policy.ring >= 2 * max(LEAST_RING, _reads(policy)):
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
