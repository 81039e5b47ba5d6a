"""What a model must be like for the paged attention to serve it, told from its class and config alone."""

from __future__ import annotations

from typing import Any

from kvstrata.config import Unsupported
from kvstrata.hf import compat
from kvstrata.hf.attention import name_of
from kvstrata.hf.decoder import decoder_of, unwrap


def reasons(model: Any) -> list[str]:
    """Every reason why `model` is refused before it is even run; empty when nothing is seen."""
    found: list[str | None] = [compat.version_reason()]
    model = unwrap(model)
    if getattr(model.config, "is_encoder_decoder", False):
        found.append(f"{type(model).__name__}: encoder-decoder models are not supported")
        return [r for r in found if r]
    try:
        decoder = decoder_of(model)
    except Unsupported as error:
        return [r for r in (*found, str(error)) if r]
    found += [_implementation(decoder), _shared(decoder), _latent(decoder), *_types(decoder)]
    return [r for r in found if r]


def _implementation(decoder: Any) -> str | None:
    if not decoder._can_set_attn_implementation():
        return (
            f"{type(decoder).__name__}: its attention is not dispatched through AttentionInterface, or its source "
            "cannot be read, so no attention function can be set"
        )
    try:
        name_of(decoder.config._attn_implementation)
    except Unsupported as error:
        return f"{type(decoder).__name__}: {error}"
    return None


def _shared(decoder: Any) -> str | None:
    config = compat.text_config(decoder.config)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if shared > 0 or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        return f"{type(decoder).__name__}: layers share keys and values (num_kv_shared_layers = {shared})"
    return None


def _latent(decoder: Any) -> str | None:
    rank = getattr(compat.text_config(decoder.config), "kv_lora_rank", None)
    if rank:
        return f"{type(decoder).__name__}: multi-head latent attention (kv_lora_rank = {rank}) caches a latent"
    return None


def _types(decoder: Any) -> list[str]:
    try:
        types = compat.layer_types(compat.text_config(decoder.config))
    except Exception as error:  # a config that cannot tell its layers, whatever it raises
        return [f"{type(decoder).__name__}: the config does not tell its layer types ({type(error).__name__}: {error})"]
    known = compat.ATTENTION_TYPES | compat.RECURRENT_TYPES | compat.IDLE_TYPES
    out = [
        f"{type(decoder).__name__}: layer type {kind!r}"
        for kind in dict.fromkeys(k for k, _ in types)
        if kind not in known
    ]
    if not out and not any(kind in compat.ATTENTION_TYPES for kind, _ in types):
        out.append(f"{type(decoder).__name__}: no attention layer, so there is no KV cache to keep")
    return out
