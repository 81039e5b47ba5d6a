"""Caches filled directly with random tokens: no prompt is computed, so that long contexts take seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvstrata.hf.load import WatchedDynamicCache

CHUNK = 2048
"""Tokens that are put into a cache of ours at a time, as a chunked prompt would be."""


class RandomTokens:
    """Random queries, keys and values of a model's layers, bfloat16 or what it computes in, where it computes.

    One draw of CHUNK tokens serves all chunks and layers, turned by another number of tokens for each.
    """

    def __init__(self, model: Any, seed: int) -> None:
        config = model.config
        self.layers: int = config.num_hidden_layers
        generator = torch.Generator().manual_seed(seed)
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self._drawn = [
            torch.randn(1, heads, CHUNK, config.head_dim, generator=generator).to(model.device, model.dtype)
            for heads in sizes
        ]

    def dense_bytes(self, tokens: int) -> int:
        """Of the keys and values of so many tokens, as a dense cache holds them."""
        k, v = self._drawn[1:]
        return tokens * self.layers * (k[:, :, :1].nbytes + v[:, :, :1].nbytes)

    def chunks(self, tokens: int) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """queries, keys, values of each chunk: one [1, heads, T, D] per layer, T at most CHUNK."""
        for number, first in enumerate(range(0, tokens, CHUNK)):
            size = min(CHUNK, tokens - first)
            turned = [
                [x.roll(97 * number + 31 * layer, 2)[:, :, :size] for x in self._drawn] for layer in range(self.layers)
            ]
            yield [t[0] for t in turned], [t[1] for t in turned], [t[2] for t in turned]


def fill(cache: Any, random: RandomTokens, tokens: int, after: Callable[[int], None] = lambda stored: None) -> None:
    """Puts so many tokens into an empty cache: ours chunk by chunk and planned, transformers' dense one likewise, its
    quantized one at once, for it packs only what its first call brings. after: called with the tokens put so far."""
    if hasattr(cache, "append"):
        stored = 0
        for q, k, v in random.chunks(tokens):
            cache.append(k, v, q)
            after(stored := stored + k[0].shape[2])
        cache.end_prefill()
    elif isinstance(cache, WatchedDynamicCache):
        stored = 0
        for _, k, v in random.chunks(tokens):
            for layer in range(random.layers):
                cache.update(k[layer], v[layer], layer)
            after(stored := stored + k[0].shape[2])
    else:
        every = [(k, v) for _, k, v in random.chunks(tokens)]
        for layer in range(random.layers):
            cache.update(*(torch.cat([c[i][layer] for c in every], 2) for i in (0, 1)), layer)
        after(tokens)
