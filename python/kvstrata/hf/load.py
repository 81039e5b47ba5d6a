"""Models and dense caches for the command line and the quality harness."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging


def load(name: str, dtype: str = "auto") -> tuple[Any, Any | None]:
    """(model in eval mode, its tokenizer or None) of a folder, else of a hub id.

    dtype: "auto" as it was saved, or "float32", "bfloat16", "float16". A folder never needs a network. OSError if there
    is no such model.
    """
    logging.disable_progress_bar()  # the command line shows its own
    local = os.path.isdir(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=local)
    model.eval()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return model, None  # each tokenizer class has its own way to say that its files are missing
    return model, tokenizer


def random_llama(seed: int, **config: Any) -> Any:
    """A Llama with random weights, the same for the same seed: it stores and reads a cache like any other model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.eval()
    return model


class WatchedDynamicCache(DynamicCache):  # type: ignore[misc]
    """transformers' DynamicCache, counting its tensors' bytes, and their peak while one of them grows."""

    peak_bytes = 0

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As stock. A layer grows by concatenation: its old keys live until its new keys are whole."""
        before = self.nbytes()
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.peak_bytes = max(self.peak_bytes, before + k.nbytes, self.nbytes())
        return k, v

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        tensors = [t for layer in self.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def dense_cache(model: Any) -> WatchedDynamicCache:
    """An empty dense cache for a model."""
    return WatchedDynamicCache(config=model.config)
