"""transformers' QuantizedCache as a peer: its own code and settings, and the bytes that it really takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import QuantizedCache

PACKAGES = {"hqq": "hqq", "quanto": "optimum-quanto"}
"""Backend -> the package that it needs."""
BITS = (2, 4)
GROUP = 64
"""Values that share a scale: transformers' default."""


class WatchedQuantizedCache(QuantizedCache):  # type: ignore[misc]
    """A QuantizedCache that counts the bytes of every tensor it holds, and their peak in an update.

    An update reads the whole layer back: ``peak_bytes`` takes in the dequantized keys and values, and those that are
    returned to attention, which are copies of the former with the residual and the new tokens behind. What a backend
    allocates for itself while it packs and unpacks is not seen, so the true peak is higher.
    """

    peak_bytes = 0

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As stock: (B, H, T, D) in, (B, H, N + T, D) out."""
        layer = self.layers[layer_idx]
        before = self.nbytes()
        seen = layer.get_seq_length()
        residual = layer.keys.shape[-2] if seen and layer.keys.dim() == 4 else 0
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        held = max(before, self.nbytes())
        if seen:  # the first update only packs: it returns the tensors that it was given, which are not the cache's
            returned = k.nbytes + v.nbytes
            held += returned + returned * (seen - residual) // k.shape[-2]
        self.peak_bytes = max(self.peak_bytes, held)
        return k, v

    def nbytes(self) -> int:
        """Bytes of the storages of packed keys and values, scales, zeros, shifts, and the residual."""
        storages = (t.untyped_storage() for layer in self.layers for t in tensors(vars(layer)))
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors inside containers, and inside tensors that wrap others, as quanto's do."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            yield from tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        else:
            yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


def quantized_cache(model: Any, backend: str, bits: int) -> WatchedQuantizedCache:
    """An empty quantized cache for a model: backend "hqq" or "quanto", 2 or 4 bits.

    Everything else is as transformers has it: 128 residual tokens, groups of 64 values (of what divides the head
    dimension, where 64 does not), axis 0. For hqq the documents of transformers recommend axis 1, which cannot pack
    every length at 2 bits.

    ImportError where the backend's package is missing; ValueError for other backends, bits, and for models with layers
    that are no full attention.
    """
    if backend not in PACKAGES:
        raise ValueError(f"backend: one of {sorted(PACKAGES)} expected, got {backend!r}")
    if bits not in BITS:
        raise ValueError(f"bits: one of {BITS} expected, got {bits!r}")
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = math.gcd(GROUP, head_dim)
    try:
        return WatchedQuantizedCache(backend, model.config, nbits=bits, q_group_size=group)
    except ImportError as e:
        raise ImportError(
            f"QuantizedCache with {backend} needs {PACKAGES[backend]}: pip install {PACKAGES[backend]}"
        ) from e
