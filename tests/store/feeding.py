"""Random tokens for the sequences of a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvstrata import Cache


def feed(cache: Cache, seqs: list, lengths: list[int], generator: torch.Generator) -> None:  # type: ignore[type-arg]
    """One step: so many random tokens for each sequence, packed."""
    with cache.step(seqs, lengths) as step:
        for layer, (q, k, v) in enumerate(drawn(cache, sum(lengths), generator)):
            step.attend(layer, q, k, v)


def drawn(cache: Cache, tokens: int, generator: torch.Generator) -> Iterator[list[torch.Tensor]]:
    """q, k, v of each layer: [tokens, heads, D]."""
    for spec in cache.shape.layers:
        yield [
            torch.randn(tokens, heads, spec.head_dim, generator=generator).to(cache.shape.dtype)
            for heads in (spec.q_heads, spec.kv_heads, spec.kv_heads)
        ]


def check_pages(cache: Cache) -> None:
    """Pages in use are those that tables name, with the Far copies of Near ones, and the ring."""
    store, named = cache._store, set[int]()
    for i in cache._live:
        for layer, spec in enumerate(cache.shape.layers):
            for h in range(spec.kv_heads):
                named |= {*store.row(i, layer, h)[0], *store.row_sets(i, layer, h)[2]} - {-1}
    assert sum(store.pool(p)["used"] for p in range(store.n_pools)) == len(named) + sum(store.ring_pages())
