"""One forward of a decoder: the step it runs in, how attention finds it, and the audit that it reached every layer."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from kvstrata.config import Unsupported
from kvstrata.hf.compat import warn_once

if TYPE_CHECKING:
    from kvstrata.hf.intake import Intake
    from kvstrata.hf.passage import PackedStep
    from kvstrata.step import Step

STEP = "kvstrata_step"  # channel 1: the keyword argument that carries the step to the attention function
_PLAIN_TENSORS = frozenset({"position_ids", "s_aux"})


class Call:
    """A call of a patched model with one of our caches, from its outermost module to its return.

    mask: the 2-D attention_mask [B, columns + T] the outermost module was given, or None. The decoder may be handed a
    dict of masks instead. forward: set while the decoder runs.
    """

    __slots__ = ("cache", "forward", "mask", "owner", "previous")

    def __init__(self, owner: int, cache: Any, mask: Any, previous: Call | None) -> None:
        self.owner, self.cache, self.mask, self.previous = owner, cache, mask, previous
        self.forward: Forward | Recorder | None = None


current: ContextVar[Call | None] = ContextVar("kvstrata_call", default=None)  # channel 2


def enter(owner: int, cache: Any, mask: Any) -> Call:
    """Start a call at module id `owner`, unless one of an outer module with this cache is under way."""
    call = current.get()
    if call is not None and call.owner == owner:  # left behind by a fault in compiled code
        call = call.previous
    if call is None or call.cache is not cache:
        call = Call(owner, cache, mask, call)
        current.set(call)
    return call


def leave(owner: int) -> None:
    """End the call that module id `owner` started."""
    call = current.get()
    if call is not None and call.owner == owner:
        current.set(call.previous)


class Recorder:
    """A step that only watches: what the probe puts in the place of a Forward (facts.py)."""

    def __init__(self, modules: frozenset[int]) -> None:
        self.modules = modules

    def record(self, module: Any, q: Any, k: Any, v: Any, mask: Any, kwargs: dict[str, Any]) -> None:
        """Note one attention call: q [B, Hq, T, D], k, v [B, H, N, D]."""
        raise NotImplementedError


def find(module: torch.nn.Module, kwargs: dict[str, Any]) -> Forward | Recorder | None:
    """The step of this attention call: from its keyword arguments, else from the context if `module` belongs to it."""
    step: Forward | Recorder | None = kwargs.pop(STEP, None)
    return _from_context(module) if step is None else step


def _from_context(module: torch.nn.Module) -> Forward | Recorder | None:
    call = current.get()
    if call is None or call.forward is None or id(module) not in call.forward.modules:
        return None
    return call.forward


class Forward:
    """One open step of a KVCache's rows. Opaque on purpose: no mapping, no tuple, no `.to`, so accelerate passes it on.

    modules: ids of the decoder's modules. length: columns T of this forward. noted: per layer the k, v [B, H, T, D]
    that `update` returned. irreversible: a recurrent state has changed. fresh: the rows came into being with this
    step; lengths: real tokens of each row before it.
    """

    def __init__(
        self,
        batch: Intake,
        step: Step | PadStep | PackedStep,
        name: str,
        modules: frozenset[int],
        new: torch.Tensor | None,
        length: int,
    ) -> None:
        self.batch, self.step, self.name, self.modules = batch, step, name, modules
        self.new, self.length = new, length
        self.thread = threading.get_ident()
        self.noted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.attended: set[int] = set()
        self.irreversible = False
        self.fresh = False
        self.lengths: list[int] = []
        self._last = -1

    def note(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Record the new k, v [B, H, T, D] of `layer`; returns them unchanged."""
        if self.thread != threading.get_ident():
            raise RuntimeError("this cache has a step open in another thread: one cache serves one thread at a time")
        if layer in self.noted:
            raise Unsupported(f"{self.name}: layer {layer} updated the cache twice in one forward")
        self.batch.check_keys(layer, k, v)
        self.noted[layer] = (k, v)
        self._last = layer
        return k, v

    def attend(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Attention of q [B, Hq, T, D] over what is stored and over k, v [B, H, T, D], which are appended.

        Returns [B, T, Hq, D], contiguous. Unsupported, naming it: an argument the paged attention does not know, or
        k, v that are not what `update` returned in this step.
        """
        layer = self._layer_of(module, k, v)
        index, window = self.batch.layer_facts(layer)
        audit_arguments(module, mask, kwargs, window)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            warn_once("gradients do not flow through a KVCache: the attention output is detached")
        q, k, v = (_rows(x) for x in (q, k, v))
        sinks = kwargs.get("s_aux")
        sinks = None if sinks is None else sinks.detach()
        out = self.step.attend(index, q, k, v, scale=kwargs.get("scaling"), softcap=kwargs.get("softcap"), sinks=sinks)
        self.attended.add(layer)
        return out

    def _layer_of(self, module: Any, k: torch.Tensor, v: torch.Tensor) -> int:
        layer = self._last
        noted = self.noted.get(layer)
        where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
        if noted is None or layer in self.attended:
            raise Unsupported(f"{where}: attention ran without an update of the cache in this step")
        if noted[0] is not k or noted[1] is not v:
            raise Unsupported(
                f"{where}: keys and values are reworked after the cache: update of layer {layer} returned "
                f"{list(noted[0].shape)}, attention got {list(k.shape)}, another tensor"
            )
        return layer

    def audit(self) -> None:
        """Unsupported unless every layer was updated and attended in this step."""
        expected = self.batch.attention_layers
        missing = sorted(expected - self.attended)
        if missing or self.noted.keys() != self.attended:
            raise Unsupported(
                f"{self.name}: the step did not reach every layer: expected {sorted(expected)}, updated "
                f"{sorted(self.noted)}, attended {sorted(self.attended)}"
            )


class PadStep:
    """A step of columns that are padding in every row: nothing is stored, attention gives zeros."""

    closed = False

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Zeros like q [B, T, Hq, D]."""
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)

    def commit(self) -> None:
        """Nothing to keep."""
        self.closed = True

    def rollback(self) -> None:
        """Nothing to withdraw."""
        self.closed = True


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, heads, T, D] as [B, T, heads, D] with the last dimension contiguous; copies only where it is not."""
    x = x.detach().transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def audit_arguments(module: Any, mask: Any, kwargs: dict[str, Any], window: int | None) -> None:
    """Unsupported or ValueError for an argument of the attention call that the paged attention would not honour."""
    where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
    if module.training:
        raise Unsupported(f"{where}: a KVCache in training mode: call model.eval() or leave the cache out")
    if mask is not None:
        raise Unsupported(
            f"{where}: attention got its own mask or bias {list(mask.shape)}; only causal, windowed and padded"
        )
    if kwargs.get("dropout"):
        raise Unsupported(f"{where}: dropout = {kwargs['dropout']} with a KVCache")
    if kwargs.get("output_attentions"):
        raise Unsupported(f"{where}: output_attentions=True: no attention matrix exists; use the eager cache for that")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise Unsupported(f"{where}: is_causal=False")
    given = kwargs.get("sliding_window")
    if given is not None and given != window:
        raise ValueError(f"{where}: sliding_window: expected {window}, as the cache was built, got {given}")
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in _PLAIN_TENSORS:
            raise Unsupported(f"{where}: tensor argument {name} {list(value.shape)} of attention")
