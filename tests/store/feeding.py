"""Random tokens for the sequences of a cache."""

from __future__ import annotations

import torch

from kvstrata import Cache


def feed(cache: Cache, seqs: list, lengths: list[int], generator: torch.Generator) -> None:  # type: ignore[type-arg]
    """One step: so many random tokens for each sequence, packed."""
    total = sum(lengths)
    with cache.step(seqs, lengths) as step:
        for layer, spec in enumerate(cache.shape.layers):
            q, k, v = (
                torch.randn(total, heads, spec.head_dim, generator=generator).to(cache.shape.dtype)
                for heads in (spec.q_heads, spec.kv_heads, spec.kv_heads)
            )
            step.attend(layer, q, k, v)
