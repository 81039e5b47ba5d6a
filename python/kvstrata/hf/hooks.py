"""The hooks of a patched model. Module-level functions, found again by identity, so that models copy and pickle."""

from __future__ import annotations

from typing import Any

import torch

from kvstrata.config import Unsupported
from kvstrata.hf.attention import NAMES
from kvstrata.hf.decoder import argument, parameters_of, record_of
from kvstrata.hf.facts import ProbeCache
from kvstrata.hf.layers import FedCache
from kvstrata.hf.step import STEP, Forward, current, enter, leave


def _plain_mask(module: torch.nn.Module, mask: Any) -> torch.Tensor | None:
    """The 2-D mask [B, columns + T] a module was given; None for none or for a dict of empty masks."""
    if isinstance(mask, dict):
        for kind, made in mask.items():
            if made is not None and not (isinstance(made, torch.Tensor) and made.dim() == 2):
                raise Unsupported(f"{type(module).__name__}: a ready-made {kind} mask {_seen(made)}; pass the 2-D mask")
        return None
    if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return mask
    raise Unsupported(f"{type(module).__name__}: a ready-made attention mask {_seen(mask)}; pass the 2-D mask")


def _seen(mask: Any) -> str:
    return str(list(mask.shape)) if hasattr(mask, "shape") else type(mask).__name__


@torch.compiler.disable  # type: ignore[untyped-decorator]
def outer_pre(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Outermost module: keep the 2-D mask, for a wrapper may hand its decoder another one."""
    cache = argument(module, args, kwargs, "past_key_values")
    if isinstance(cache, FedCache):
        mask = _plain_mask(module, argument(module, args, kwargs, "attention_mask"))
        enter(id(module), cache, mask)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def outer_post(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """End the call, also after a fault before the decoder was reached."""
    leave(id(module))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def decoder_pre(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Check the inputs, reserve the pages, open the step and put it into both channels. Another cache: nothing."""
    cache = argument(module, args, kwargs, "past_key_values")
    if not isinstance(cache, (FedCache, ProbeCache)):
        return None
    _check_config(module)
    mask = _plain_mask(module, argument(module, args, kwargs, "attention_mask"))
    call = enter(id(module), cache, mask)
    if isinstance(cache, ProbeCache):
        call.forward = cache.recorder
    else:
        if argument(module, args, kwargs, "output_attentions"):
            raise Unsupported(f"{type(module).__name__}: output_attentions=True: no attention matrix is ever made")
        call.forward = _open(module, args, kwargs, cache, call.mask if mask is None else mask)
    if parameters_of(module)[1]:
        kwargs = {**kwargs, STEP: call.forward}
    return args, kwargs


def _check_config(module: Any) -> None:
    name = module.config._attn_implementation
    if name not in NAMES.values():
        raise Unsupported(
            f"{type(module).__name__}: the attention implementation was changed to {name!r} after patch: call "
            "kvstrata.patch(model) again"
        )
    if getattr(module.config, "output_attentions", False):
        raise Unsupported(f"{type(module).__name__}: config.output_attentions: no attention matrix is ever made")


def _open(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cache: FedCache, mask: Any) -> Forward:
    tokens = argument(module, args, kwargs, "input_ids")
    tokens = argument(module, args, kwargs, "inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ValueError(f"{type(module).__name__}: neither input_ids nor inputs_embeds were given")
    record = record_of(module)
    assert record is not None and record.facts is not None
    positions = argument(module, args, kwargs, "position_ids")
    return cache.intake.open(record.facts, record.modules(module), mask, tokens.shape[0], tokens.shape[1], positions)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def decoder_post(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Audit and commit; after a fault in the forward (output is None) roll back."""
    call = current.get()
    if call is None or call.forward is None or id(module) not in call.forward.modules:
        leave(id(module))
        return
    forward, call.forward = call.forward, None
    leave(id(module))
    if isinstance(forward, Forward):
        forward.batch.close(forward, failed=output is None)


HOOKS = (outer_pre, outer_post, decoder_pre, decoder_post)


def add(module: torch.nn.Module, pre: Any, post: Any) -> None:
    """Register a pair of hooks, once."""
    if pre not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(pre, with_kwargs=True)
    if post not in module._forward_hooks.values():
        module.register_forward_hook(post, always_call=True)


def remove(module: torch.nn.Module) -> None:
    """Take our hooks away again, and every trace of them."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    for key in [k for k, hook in before.items() if hook in HOOKS]:
        del before[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [k for k, hook in after.items() if hook in HOOKS]:
        del after[key]
        module._forward_hooks_with_kwargs.pop(key, None)
        module._forward_hooks_always_called.pop(key, None)
