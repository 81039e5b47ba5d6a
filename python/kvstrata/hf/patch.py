"""patch, unpatch, patched: put kvstrata's attention and hooks into a model and take them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from kvstrata.config import Unsupported
from kvstrata.hf import attention, compat, hooks
from kvstrata.hf.capability import reasons
from kvstrata.hf.decoder import ATTRIBUTE, Record, decoder_of, record_of, unwrap
from kvstrata.hf.facts import moved, probe

M = TypeVar("M")


def patch(model: M) -> M:
    """Let `model` generate with a KVCache; returns it. A second call does nothing.

    Sets the attention implementation of the decoder (towers keep theirs), adds hooks, and runs two tiny forwards to
    see what the layers do. With any other cache, and without one, the model does as before.

    Raises Unsupported, with the reason and the model unchanged, for a model that a KVCache cannot serve.
    """
    compat.raise_first(reasons(model))
    base = unwrap(model)
    decoder = decoder_of(base)
    attention.register()
    record = record_of(decoder)
    fresh = record is None
    record = _remember(decoder) if record is None else record
    _name(decoder)
    _hook(base, decoder)
    if record.facts is not None and not moved(record.facts, decoder):
        return model
    try:
        record.facts = _probe(decoder)
    except BaseException:
        if fresh:
            unpatch(model)
        raise
    return model


def _probe(decoder: Any) -> Any:
    try:
        return probe(decoder)
    except Unsupported:
        raise
    except Exception as error:  # whatever a forward of a foreign model raises
        raise Unsupported(
            f"{type(decoder).__name__}: the probe forward failed: {type(error).__name__}: {error}"
        ) from error


def _remember(decoder: Any) -> Record:
    """The decoder's attribute: the attention implementation of each of its configs."""
    configs = {id(m.config): m.config for m in decoder.modules() if isinstance(m, PreTrainedModel)}
    for config in list(configs.values()):
        for key in config.sub_configs:
            sub = getattr(config, key, None)
            if sub is not None:
                configs[id(sub)] = sub
    names = [(config, attention.original(config._attn_implementation_internal)) for config in configs.values()]
    record = Record(names)
    setattr(decoder, ATTRIBUTE, record)
    return record


def _name(decoder: Any) -> None:
    decoder.set_attn_implementation(attention.name_of(decoder.config._attn_implementation))


def _path(model: torch.nn.Module, decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """Every PreTrainedModel from `model` down to the decoder, the decoder excluded."""
    return [
        m
        for m in model.modules()
        if isinstance(m, PreTrainedModel) and m is not decoder and any(sub is decoder for sub in m.modules())
    ]


def _hook(model: torch.nn.Module, decoder: torch.nn.Module) -> None:
    for module in _path(model, decoder):
        hooks.add(module, hooks.outer_pre, hooks.outer_post)
    hooks.add(decoder, hooks.decoder_pre, hooks.decoder_post)


def unpatch(model: M) -> M:
    """Undo `patch`: hooks, attention implementation and the decoder's attribute; returns the model.

    A no-op on an unpatched model. Caches made for it stay readable, but a forward with one raises.
    """
    base: Any = unwrap(model)
    for module in base.modules():
        hooks.remove(module)
    try:
        decoder = decoder_of(base)
    except Unsupported:
        return model  # never patched
    record = record_of(decoder)
    if record is not None:
        for config, name in record.implementations:
            config._attn_implementation_internal = name
        delattr(decoder, ATTRIBUTE)
    return model


@contextlib.contextmanager
def patched(model: M) -> Iterator[M]:
    """`with patched(model):` patches for the block and leaves the model as it was at entry; nests."""
    was = False
    with contextlib.suppress(Unsupported):
        was = record_of(decoder_of(model)) is not None
    try:
        yield patch(model)
    finally:
        if not was:
            unpatch(model)
