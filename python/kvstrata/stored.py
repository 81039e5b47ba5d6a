"""Rows of a cache as they are kept elsewhere: read out page by page, and put back into a sequence without a token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstrata.adopted import PageFile, lend
from kvstrata.budget.costs import keeps_scores
from kvstrata.config import SLOTS
from kvstrata.holdings import FORMATS
from kvstrata.policy.base import BACKBONE, FULL, LESSER_HALF, PENDING, STATES
from kvstrata.slabs import MAX_PAGES_PER_SLAB

if TYPE_CHECKING:
    from kvstrata.cache import Cache

NO_PAGE = -1


@dataclass(frozen=True)
class StoredRow:
    """The page table of one row, without its pages. Lists have one element for each entry.

    pools: of its page, in this cache, or the Near one of the same kind; alive: u16 masks of the slots that hold a token;
    sets: u16 tags, none in a cache without sets; sealed: entries that are; frozen, mean: whether it is set what its quantized
    keys are relative to, and what it is, [D], or zeros ([]).
    """

    pools: list[int]
    alive: list[int]
    sets: list[int]
    sealed: int
    frozen: bool = False
    mean: tuple[float, ...] = ()


def places(cache: Cache) -> list[tuple[int, int]]:
    """(layer, KV head) of each row of a sequence, in order."""
    return [(i, h) for i, spec in enumerate(cache.shape.layers) for h in range(spec.kv_heads)]


def kinds(cache: Cache) -> list[str]:
    """Of each pool, format and head dimension of its pages: "bf16x128". The first of one kind is of the Near tier."""
    pools = (cache._store.pool(p) for p in range(cache._store.n_pools))
    return [f"{FORMATS[pool['format']]}x{pool['head_dim']}" for pool in pools]


def page_bytes(cache: Cache, pool: int) -> int:
    """Bytes of the payload of one page."""
    return cache._store.pool(pool)["page_bytes"]


def row_of(cache: Cache, seq: int, layer: int, head: int) -> StoredRow:
    """The table of one row. ValueError where tokens of it are folded."""
    store, names = cache._store, kinds(cache)
    pages, alive, hidden, sealed = store.row(seq, layer, head)
    if any(hidden):
        raise ValueError(f"row_of: layer {layer}, head {head} has folded tokens, expected none")
    pools = [names.index(names[page >> 28]) for page in pages]
    tags, _, _ = store.row_sets(seq, layer, head)
    frozen, mean = store.centre(seq, layer, head)
    return StoredRow(pools, alive, tags, sealed, frozen, tuple(mean))


def pages_of(cache: Cache, seq: int, layer: int, head: int, entries: Sequence[int], pool: int) -> tuple[Tensor, Tensor]:
    """Pages of one row and kind: payload u8 [n, page bytes] and positions i32 [n, 16]. Slots that hold no token are zeros, at
    position -1."""
    payload = torch.empty(len(entries), page_bytes(cache, pool), dtype=torch.uint8)
    positions = torch.empty(len(entries), SLOTS, dtype=torch.int32)
    cache._store.copy_out(seq, layer, head, list(entries), payload.data_ptr(), positions.data_ptr())
    return payload, positions


def restore(
    cache: Cache,
    seq: int,
    rows: Sequence[StoredRow],
    pages: Callable[[int, Sequence[int]], tuple[Tensor, Tensor]],
    length: int,
    floor: int,
    lies: Callable[[int, int], tuple[PageFile, int]] | None = None,
) -> None:
    """Puts rows back into a sequence without a token, in the order of :func:`places`, under the cache's limit. Private sets
    that its view leaves out are Far, if there is such a tier.

    pages(number of the row, some of its entries): their payload u8, page behind page, and the row's positions i32 [entries,
    16]; one row's at a time is held beside the cache. lies(number, entry): the file that holds a page, and its place there:
    given, pages that would be Far stay where they are until they are read. length: tokens seen; floor:
    :meth:`Cache.crop_floor`. BudgetExceeded where there is no room, ValueError for what is no row; then the sequence is as it
    was.
    """
    where, store = places(cache), cache._store
    if len(rows) != len(where):
        raise ValueError(f"restore: {len(rows)} rows, expected {len(where)}")
    pools = [_tiered(cache, seq, layer, row) for (layer, _), row in zip(where, rows, strict=True)]
    view = store.view(seq)
    try:
        there = _adopted(cache, pools, lies)
        needed = [0] * store.n_pools
        for of_row, lying in zip(pools, there, strict=True):
            for pool, page in zip(of_row, lying, strict=True):
                needed[pool] += page == NO_PAGE
        cache._slabs.make_room(lambda: needed)
        for number, (row, (layer, head)) in enumerate(zip(rows, where, strict=True)):
            payload, positions = pages(number, [e for e, page in enumerate(there[number]) if page == NO_PAGE])
            if positions.dtype != torch.int32 or positions.shape != (len(row.pools), SLOTS):
                raise ValueError(
                    f"restore: positions is {positions.dtype} {list(positions.shape)}, expected torch.int32"
                    f" {[len(row.pools), SLOTS]}"
                )
            payload, positions = payload.contiguous(), positions.contiguous()
            table = (pools[number], row.alive, row.sets, row.sealed)
            content = (payload.data_ptr(), payload.nbytes, positions.data_ptr())
            store.restore_row(seq, layer, head, *table, *content, (row.frozen, list(row.mean)), there[number])
        store.restore_length(seq, length, floor)
    except BaseException:
        store.clear(seq)
        store.set_view(seq, *view)
        cache.trim()
        raise
    cache._slabs.settle()


def _adopted(
    cache: Cache, pools: Sequence[Sequence[int]], lies: Callable[[int, int], tuple[PageFile, int]] | None
) -> list[list[int]]:
    """Of each row's entries the page that lies in a file, lent for it, or NO_PAGE."""
    found = [[NO_PAGE] * len(of_row) for of_row in pools]
    some: dict[tuple[PageFile, int], list[tuple[int, int, int]]] = defaultdict(list)
    for number, of_row in enumerate(pools) if lies else ():
        for entry, pool in enumerate(of_row):
            if pool in cache._slabs.far_pools:
                assert lies is not None
                file, place = lies(number, entry)
                some[file, pool].append((number, entry, place))
    for (file, pool), entries in some.items():
        for first in range(0, len(entries), MAX_PAGES_PER_SLAB):
            part = entries[first : first + MAX_PAGES_PER_SLAB]
            pages = lend(cache._slabs, pool, file, [place for *_, place in part])
            for (number, entry, _), page in zip(part, pages, strict=True):
                found[number][entry] = page
    return found


def _tiered(cache: Cache, seq: int, layer: int, row: StoredRow) -> list[int]:
    """The pool of each page: the Far one of its kind, if its layer has one, for a private set that the view leaves out."""
    every, sets, halves = cache._store.view(seq)
    if every or not cache._slabs.has_far:
        return row.pools
    states = (FULL, *(STATES[name] for name in cache.policy.formats))
    far = {cache._store.pool_of(layer, state, 0): cache._store.pool_of(layer, state, 1) for state in states}

    def shown(tag: int) -> bool:
        return tag in (BACKBONE, PENDING) or (tag & ~LESSER_HALF in sets and not (halves and tag & LESSER_HALF))

    found = zip(row.pools, row.sets, strict=True)
    return [pool if shown(tag) or far.get(pool, -1) < 0 else far[pool] for pool, tag in found]


def scores_of(cache: Cache, seq: int) -> Tensor | None:
    """The scores that the policy keeps of a sequence's tokens, f32, layer by layer [H, N] in table order; None where it keeps
    none."""
    if not keeps_scores(cache.policy):
        return None
    found = [torch.empty(0)]
    for layer, size in _scored(cache, seq):
        scores = torch.zeros(size)
        cache._store.look(layer, [seq], 0, 0, 0, scores.data_ptr(), 0, 0, 0, size[1])
        found.append(scores.flatten())
    return torch.cat(found)


def restore_scores(cache: Cache, seq: int, scores: Tensor) -> None:
    """As :func:`scores_of` gave them, of a sequence that was restored. ValueError for another number of them."""
    sizes = _scored(cache, seq)
    if len(scores) != (expected := sum(h * n for _, (h, n) in sizes)):
        raise ValueError(f"restore_scores: {len(scores)} scores, expected {expected}")
    first, scores = 0, scores.contiguous()
    for layer, (heads, columns) in sizes:
        cache._store.set_scores(layer, [seq], scores[first:].data_ptr(), columns)
        first += heads * columns


def _scored(cache: Cache, seq: int) -> list[tuple[int, tuple[int, int]]]:
    """Layers that are planned, with heads and the most tokens of a row."""
    sizes = ((i, (cache.shape.layers[i].kv_heads, cache._store.columns(i, [seq]))) for i in cache._plans.layers)
    return [(i, size) for i, size in sizes if size[1]]
