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
