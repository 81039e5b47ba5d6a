"""The attention functions kvstrata registers: one name per fallback, registered once per process at the first patch."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch

from kvstrata.config import Unsupported
from kvstrata.hf import compat
from kvstrata.hf.mask import Mask
from kvstrata.hf.step import Recorder, find

NAMES = {
    "sdpa": "kvstrata",
    "eager": "kvstrata_eager",
    "flash_attention_2": "kvstrata_fa2",
    "flash_attention_3": "kvstrata_fa3",
    "flash_attention_4": "kvstrata_fa4",
    "flex_attention": "kvstrata_flex",
}
_lock = threading.Lock()


def eager_of(module: torch.nn.Module) -> Any:
    """The `eager_attention_forward` of the file that defines this module's forward; Unsupported if there is none."""
    forward = inspect.unwrap(type(module).forward)
    eager = forward.__globals__.get("eager_attention_forward")
    if eager is None:
        raise Unsupported(
            f"{type(module).__name__}: {forward.__module__} has no eager_attention_forward to fall back on"
        )
    return eager


def _eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return eager_of(module)(module, *args, **kwargs)


class Attention:
    """`fn(module, q [B,Hq,T,D], k [B,H,T,D], v, mask, **kw) -> (out [B,T,Hq,D], None)`.

    With a step: paged attention. Without one: `fallback`, the implementation the model had, arguments untouched.
    """

    def __init__(self, fallback: Any) -> None:
        self.fallback = fallback

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        step = find(module, kwargs)
        if step is None:
            return self.fallback(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
        if isinstance(step, Recorder):
            step.record(module, query, key, value, attention_mask, kwargs)
            return self.fallback(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
        return step.attend(module, query, key, value, attention_mask, kwargs), None


def name_of(implementation: str | None) -> str:
    """Our name for a model that had `implementation`; Unsupported for one without a registered fallback."""
    implementation = implementation or "eager"
    if implementation in NAMES.values():
        return implementation
    if implementation not in NAMES:
        raise Unsupported(f"attention implementation {implementation!r}: expected one of {sorted(NAMES)}")
    return NAMES[implementation]


def original(name: str | None) -> str | None:
    """The implementation behind one of our names (another model with this config is patched); others as they are."""
    return next((implementation for implementation, ours in NAMES.items() if ours == name), name)


def register() -> None:
    """Register our names with transformers; the second call does nothing."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    with _lock:
        for implementation, name in NAMES.items():
            if name in ALL_ATTENTION_FUNCTIONS:
                continue
            fallback = _eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
            AttentionMaskInterface.register(name, Mask(compat.mask_function(implementation)))
            AttentionInterface.register(name, Attention(fallback))
