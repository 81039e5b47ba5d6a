"""A cache on the verge of plans that put pages for the time being together for good, and what must survive their failure."""

from __future__ import annotations

import os
from typing import Any

from archived import SHAPE, Fed, fed, ruled, small

from kvstrata import Sequence

LATE = 4096
"""An interval that no test reaches: plans are made when asked for."""


def tables(pair: Fed) -> list[Any]:
    """Every row's table and, of every pool, its pages."""
    store = pair.cache._store
    rows = [
        store.row(s.id, layer, h)
        for s in pair.pieces
        for layer, spec in enumerate(SHAPE.layers)
        for h in range(spec.kv_heads)
    ]
    return [rows, [store.pool(p)["used"] for p in range(store.n_pools)], store.captured()[2]]


def waiting(pages: int = 4, seed: int = 0, **settings: Any) -> tuple[Fed, list[Sequence]]:
    """A cache of two sequences: of each row 512 tokens are together for good, 80 for the time being, and 320 wait for a plan,
    which makes 16 pages for good and 9 for the time being of both."""
    state, near = settings.pop("state", "full"), settings.pop("near_pages", None)
    pair = fed(small(pages, interval=LATE, state=state, near_pages=near), seed=seed, **settings)
    seqs = pair.new(2)
    pair.feed(seqs, [640, 650])
    for _ in range(20):
        pair.feed(seqs, [16, 16])
    for s in seqs:
        for layer, rule in enumerate(ruled([640], interval=LATE)):
            assert (rule.good, rule.provisional) == (512, 80)
            pair.check_rule(s, layer, rule)
    return pair, seqs


def check_planned(pair: Fed, seqs: list[Sequence]) -> None:
    """As :func:`waiting` says."""
    for s in seqs:
        for layer, rule in enumerate(ruled([640], interval=LATE)):
            rule.plan(960)
            assert (rule.good, rule.provisional) == (768, 144)
            pair.check_rule(s, layer, rule)


def file_of(pair: Fed, seq: Sequence) -> list[tuple[int, int]]:
    """(descriptor, offset) of every Far page of a sequence."""
    store, found = pair.cache._store, []
    for layer, spec in enumerate(SHAPE.layers):
        for h in range(spec.kv_heads):
            for page in store.row(seq.id, layer, h)[0]:
                pool, slab, index = page >> 28, page >> 16 & 0xFFF, page & 0xFFFF
                if store.pool(pool)["far"]:
                    found.append((pair.cache._slabs._files[pool, slab][0], index * store.pool(pool)["page_bytes"]))
    return found


def payloads(pair: Fed) -> list[bytes]:
    """The bytes of every Far page."""
    (size,) = {
        pool["page_bytes"] for p in range(pair.cache._store.n_pools) if (pool := pair.cache._store.pool(p))["far"]
    }
    return [os.pread(file, size, at) for s in pair.pieces for file, at in file_of(pair, s)]


def put_off(pair: Fed) -> tuple[int, int]:
    """Plans that were put off, and those of them that failed."""
    counts = pair.cache.report().counts
    return counts["plans put off"], counts["plans failed"]


def go_on(pair: Fed, seq: Sequence) -> int:
    """Decodes a token, which stands. Plans of a layer that were put off after it."""
    length, before = pair.cache.logical_length(seq), put_off(pair)[0]
    pair.feed([seq], [1])
    assert pair.cache.logical_length(seq) == length + 1
    return put_off(pair)[0] - before
