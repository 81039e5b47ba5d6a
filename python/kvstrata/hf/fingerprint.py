"""What tells one model, and one way to write a conversation, from another: SHA-256 in 64 hex digits."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from kvstrata.config import Unsupported
from kvstrata.episodes.segment import Turn
from kvstrata.hf import compat
from kvstrata.hf.decoder import decoder_of
from kvstrata.hf.spelling import Spelling
from kvstrata.hf.writers import Writer

SAMPLES = 4096
"""Values of a projection, evenly spread over it."""
VOLATILE = frozenset({"_name_or_path", "transformers_version", "use_cache", "architectures"})
"""Fields of a config that say nothing of what the model computes; nor do those that begin with an underscore."""
KEYS = frozenset({"k_proj", "key_proj", "key", "wk", "qkv_proj", "query_key_value", "c_attn", "qkv", "Wqkv", "W_pack"})
"""Names of projections that make keys, alone or with queries and values."""
PROBES = (Turn("user", "Where was it? 12.5 % in Zürich, 東京!"), Turn("assistant", "def f(x): return x"))


def of_model(model: Any) -> str:
    """Of the decoder's config and 4,096 values of the first and of the last layer's key projection, as they are stored.

    Where attention names its projections otherwise, of each of them. Unsupported where the weights are not in memory.
    """
    decoder = decoder_of(model)
    fields = compat.text_config(decoder.config).to_dict()
    said = {k: v for k, v in fields.items() if k not in VOLATILE and not k.startswith("_")}
    found = hashlib.sha256(json.dumps([type(decoder).__name__, said], sort_keys=True, default=str).encode())
    for weight in projections(decoder):
        if weight.device.type == "meta":
            raise Unsupported(f"{type(decoder).__name__}: its weights are offloaded, no fingerprint can be taken")
        flat = weight.detach().reshape(-1)
        picks = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        found.update(str(weight.dtype).encode())
        found.update(flat[picks.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def projections(decoder: torch.nn.Module) -> list[Tensor]:
    """The weights that make the keys of the first and the last layer with attention, in order."""
    layers = [m for m in decoder.modules() if "attention" in type(m).__name__.lower() and _matrices(m)]
    if not layers:
        raise Unsupported(
            f"{type(decoder).__name__}: no attention with weights of its own, no fingerprint can be taken"
        )
    found = []
    for layer in (layers[0], layers[-1]):
        matrices = _matrices(layer)
        keys = [w for name, w in matrices.items() if KEYS & set(name.split("."))]
        found += keys or list(matrices.values())
    return found


def _matrices(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.dim() > 1}


def of_writing(spelling: Spelling, writer: Writer) -> str:
    """Of the vocabulary, and of the tokens of two probe turns with all that stands around them."""
    tokenizer = spelling.tokenizer
    words = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else tokenizer.vocab_size
    ids, offsets = writer.tokens(PROBES, first=True, answer=True)
    said = [type(writer).__name__, words, ids.tolist(), offsets.tolist(), writer.closing, sorted(writer.stops)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
