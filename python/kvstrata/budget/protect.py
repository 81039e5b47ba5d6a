"""What a budget means for a policy's window, and what it can never go below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from kvstrata.budget.units import Budget
from kvstrata.config import SLOTS, Shape, Unsupported
from kvstrata.policy.base import Policy

ENTRY_BYTES = 20
"""What a page's refcount and free bit, and its table entry with room to grow, may take."""
PAGE_BOOKS = 4 * SLOTS + ENTRY_BYTES
"""Bytes beside a page's payload: its slots' positions and its entry."""

LEAST_CHUNK = 64


def pages(tokens: int) -> int:
    return -(-tokens // SLOTS)


def page_bytes(shape: Shape, layer: int) -> int:
    """Bytes of one page of a layer, metadata included."""
    padded = pages(shape.layers[layer].head_dim) * SLOTS
    return 2 * SLOTS * padded * shape.dtype.itemsize + PAGE_BOOKS


def limit_bytes(budget: Budget, shape: Shape, lengths: Sequence[int]) -> int:
    """What a budget means in bytes for sequences of so many logical tokens.

    bytes: as they are, or for each; tokens: Full pages for n tokens of every row with their metadata, for each sequence;
    share: of K and V alone of a dense cache of these lengths, or of ``budget.at`` tokens per sequence, rounded down.
    """
    if budget.unit == "bytes":
        return int(budget.value) * (len(lengths) if budget.per == "sequence" else 1)
    if budget.unit == "tokens":
        row = sum(spec.kv_heads * page_bytes(shape, i) for i, spec in enumerate(shape.layers))
        return row * pages(int(budget.value)) * len(lengths)
    tokens = sum(lengths) if budget.at is None else budget.at * len(lengths)
    return int(Fraction(str(budget.value)) * tokens * shape.token_bytes())


def concretise(policy: Policy, shape: Shape, budget: Budget | None, batch: int) -> Policy:
    """The policy with its window fixed by the budget for ``batch`` sequences.

    Raises ValueError where the budget cannot hold sinks and window, with the least that can.
    """
    if policy.planner is None:
        if budget is not None and budget.unit == "share":
            raise Unsupported(
                f"budget: policy {policy.name!r} drops nothing and cannot keep to a share of the dense cache"
            )
        return policy
    if budget is None:
        if policy.window is None:
            raise ValueError(f"budget: policy {policy.name!r} needs one, got None")
        return policy
    if budget.unit == "share":
        raise Unsupported(f"budget: policy {policy.name!r} takes tokens or bytes, a share is not built yet")
    if budget.unit == "tokens":
        return _window_from_tokens(policy, int(budget.value), policy.interval if budget.count else SLOTS)
    return _window_from_bytes(policy, shape, int(budget.value), batch)


def _window_from_tokens(policy: Policy, tokens: int, interval: int) -> Policy:
    """interval: tokens that may come before the next plan; one less stands beside sinks and window."""
    room = (tokens - policy.sinks - (interval - 1)) // SLOTS * SLOTS
    least = (policy.window or SLOTS) + policy.sinks + interval - 1
    if room < (policy.window or SLOTS):
        raise ValueError(
            f"budget: {tokens} tokens per row, expected at least {least} "
            f"(sinks {policy.sinks} + window {policy.window or SLOTS} + {interval - 1} in the open page)"
        )
    return policy if policy.window else replace(policy, window=room)


def least_limit(fits: Callable[[int], bool], refused: int) -> int:
    """The smallest limit that fits, above one that does not: what fits goes on to fit."""
    low, high = refused, 2 * refused + 1
    while not fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _window_from_bytes(policy: Policy, shape: Shape, limit: int, batch: int) -> Policy:
    wanted = (policy.window or SLOTS) // SLOTS
    chunk, room = _chunk_and_window(policy, shape, limit, batch)
    if room < wanted:
        least = least_limit(lambda n: _chunk_and_window(policy, shape, n, batch)[1] >= wanted, limit)
        raise ValueError(f"budget: {limit} bytes for {batch} sequence(s), expected at least {least}")
    policy = replace(policy, chunk=chunk)
    return policy if policy.window else replace(policy, window=int(room) * SLOTS)


def _chunk_and_window(policy: Policy, shape: Shape, limit: int, batch: int) -> tuple[int, int]:
    """Tokens of a chunk and pages of a window under a limit.

    Pages per row: sinks, window, one open, one that a short step may add; scratch: one layer's prompt chunk, which is
    shortened, to 64 tokens at the least, where it would take more than an eighth of the limit.
    """
    row = batch * sum(spec.kv_heads * page_bytes(shape, i) for i, spec in enumerate(shape.layers))
    widest = batch * max(spec.kv_heads * page_bytes(shape, i) for i, spec in enumerate(shape.layers))
    wanted = (policy.window or SLOTS) // SLOTS
    chunk = policy.chunk
    while True:
        scratch = widest * (chunk // SLOTS + 1)  # a chunk that begins inside a page ends inside one more
        room = (limit - limit // 64 - scratch) // row - pages(policy.sinks) - 2
        if chunk < 2 * LEAST_CHUNK or (scratch <= limit // 8 and room >= wanted):
            return chunk, room
        chunk = chunk // 2 // SLOTS * SLOTS
