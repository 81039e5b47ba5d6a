"""What a cache holds, counted: rows, slots, states, bytes by kind."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from kvstrata.config import SLOTS
from kvstrata.policy.base import FULL, STATES
from kvstrata.report import Recall, Report, Share

if TYPE_CHECKING:
    from kvstrata.cache import Cache

FORMATS = ("f32", "bf16", "f16", "int8", "int4", "int2")
"""Names of page formats by their native numbers."""


def report(cache: Cache) -> Report:
    """A snapshot of the cache."""
    store, slabs, shape, live = cache._store, cache._slabs, cache.shape, cache._live
    most, slots = store.most_stored(live, [spec.kv_heads for spec in shape.layers])
    tallies = [store.tally(layer, live) for layer in range(len(shape.layers))]
    logical = tuple(store.length(i) for i in live)
    pools = [store.pool(p) for p in range(store.n_pools) if p not in slabs.far_pools]
    used = sum(p["used"] * p["page_bytes"] for p in pools)
    free = sum((p["total"] - p["used"]) * p["page_bytes"] for p in pools)
    kinds = {
        **_bytes_by_format(pools),
        "free pages": free,
        "positions": slabs.held - used - free,
        "tables": store.metadata_bytes,
        "workspace": store.workspace_bytes,
    }
    assert cache.policy.window is not None
    return Report(
        policy=cache.policy.name,
        budget=_asked(cache),
        window=cache.policy.window,
        sinks=cache.policy.sinks,
        logical_tokens=logical,
        stored_tokens=slots,
        states=_states(cache, [held for held, _, _ in tallies]) | {"evicted": sum(logical) * shape.rows - slots},
        stored=tuple(map(tuple, most)),
        bytes_by_kind=kinds,
        nbytes=cache.nbytes(),
        allocator_bytes=slabs.allocator_bytes(),
        peak_bytes=slabs.note_peak(),
        dense_bytes=sum(logical) * shape.token_bytes(),
        limit_bytes=slabs.limit,
        lost_slots=sum(entries for _, entries, _ in tallies) * SLOTS - slots,
        counts=cache._plans.counts | cache._counts,
        far_bytes=slabs.far_bytes,
        loan_bytes=slabs.loans.nbytes,
        far_tokens=sum(n for _, _, n in tallies),
        recall=_recall(cache),
    )


def _asked(cache: Cache) -> str | None:
    """The budget as it was asked for; of tokens that a step reads, as the present selector reads them."""
    budget, selector = cache.budget, cache.policy.selector
    if budget is None or selector is None or budget.unit != "tokens":
        return None if budget is None else str(budget)
    return f"{int(getattr(selector, 'budget', budget.value))}tok read per row and step"


def _recall(cache: Cache) -> Recall | None:
    if cache.policy.selector is None:
        return None
    total, least, count, below = cache._store.captured()
    hits, misses = cache._store.fetched()
    estimated, exact, audited = cache._store.audited()
    late, waited, _ = cache._store.late()
    return Recall(
        captured=total / count if count else 1.0,
        least_captured=least,
        below_floor=below,
        selections=count,
        hits=hits,
        misses=misses,
        audited=audited,
        audited_estimate=estimated / audited if audited else 1.0,
        audited_exact=exact / audited if audited else 1.0,
        late=late,
        waited=waited,
    )


def _bytes_by_format(pools: list[dict[str, int]]) -> dict[str, int]:
    """Bytes of used pages by format."""
    names = dict.fromkeys(f"pages {FORMATS[p['format']]}" for p in pools)
    return {
        name: sum(p["used"] * p["page_bytes"] for p in pools if name == f"pages {FORMATS[p['format']]}")
        for name in names
    }


def _states(cache: Cache, held: list[list[int]]) -> dict[str, int]:
    """Stored tokens by state, summed over rows; held: slots of each layer by native state."""
    named = {"full": FULL} | {name: STATES[name] for name in cache.policy.formats}
    return {name: sum(slots[state] for slots in held) for name, state in named.items()}


def share(cache: Cache, seq: int) -> Share:
    """:meth:`Cache.share`."""
    store, shape = cache._store, cache.shape
    near, far = Fraction(), Fraction()
    for pool, holders, pages in store.holdings(seq):
        sizes = cache._slabs.page_bytes(pool)
        near += Fraction(pages * sizes[0], holders)
        far += Fraction(pages * sizes[1], holders)
    rows = [store.stored(seq, i, h) for i, spec in enumerate(shape.layers) for h in range(spec.kv_heads)]
    charged = cache._charges.sequences and cache._charges.sequences.of(seq).used
    return Share(
        charged_bytes=charged["near_bytes"] if charged else None,
        charged_far_bytes=charged["far_bytes"] if charged else None,
        fair_bytes=near,
        fair_far_bytes=far,
        logical_tokens=store.length(seq),
        stored_tokens=(min(rows), sum(rows) / len(rows), max(rows)),
    )


def statistics(cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """:meth:`Cache.statistics`."""
    heads = {spec.kv_heads for spec in cache.shape.layers}
    if len(heads) > 1:
        raise ValueError(f"statistics: layers have {sorted(heads)} KV heads, expected one number")
    known, layers, (n,) = cache._plans.statistics, range(len(cache.shape.layers)), heads
    if not cache._live:
        return torch.zeros(len(layers), 0, 3), torch.ones(len(layers), 0)
    values = torch.stack([known.values(layer, cache._live, n) for layer in layers])
    return values, torch.stack([known.oq(layer, cache._live, n) for layer in layers])


def materialize(cache: Cache, layer: int, seq: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:meth:`Cache.materialize`."""
    spec = cache.shape.layers[layer]
    n = cache._store.columns(layer, [seq])
    k = torch.zeros(spec.kv_heads, n, spec.head_dim)
    v = torch.zeros_like(k)
    positions = torch.full((spec.kv_heads, n), -1, dtype=torch.int32)
    for h in range(spec.kv_heads):
        cache._store.read(seq, layer, h, k[h].data_ptr(), v[h].data_ptr())
        cache._store.positions(seq, layer, h, positions[h].data_ptr())
    return k.to(cache.shape.dtype), v.to(cache.shape.dtype), positions
