"""The cache and the cache layers transformers sees: they hold no keys and no values."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache as StockCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from kvstrata.config import Unsupported
from kvstrata.hf import compat
from kvstrata.hf.feed import Feed
from kvstrata.hf.intake import Intake

_TOGETHER = "the lengths of all layers move together: call {name} on the cache, not on a layer"


class StrataLayer(CacheLayerMixin):  # type: ignore[misc]
    """A full or sliding attention layer of a KVCache. `keys` and `values` stay None; the pages are the cache's."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    _layer_type = None

    def __init__(self, feed: Feed, index: int, window: int | None) -> None:
        super().__init__()
        self._feed, self._index = feed, index
        self.sliding_window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: pages are reserved when a step opens."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note k, v [B, H, T, D] in the open step and return them unchanged: the new tokens only."""
        return self._feed.note(self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        """Columns fed, padding included; the open step's too once this layer was updated in it."""
        return self._feed.columns_of(self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns + query_length, 0)."""
        return self._feed.columns + int(query_length), 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    @property
    def record_past(self) -> bool:
        """Whether the last tokens are kept as they are until crop confirms them."""
        return self._feed.recording

    @record_past.setter
    def record_past(self, on: bool) -> None:
        self._feed.record(on)

    def activate_past_recording(self) -> None:
        """As on the cache: one switch for all layers."""
        self._feed.record(True)

    def offload(self) -> None:
        """Nothing: tiers are the policy's."""

    def prefetch(self) -> None:
        """Nothing: tiers are the policy's."""

    def reset(self) -> NoReturn:
        raise ValueError(_TOGETHER.format(name="reset"))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ValueError(_TOGETHER.format(name="crop"))

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        raise ValueError(_TOGETHER.format(name="reorder_cache"))

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise ValueError(_TOGETHER.format(name="batch_repeat_interleave"))

    def batch_select_indices(self, indices: torch.Tensor) -> NoReturn:
        raise ValueError(_TOGETHER.format(name="batch_select_indices"))


class RecurrentLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A stock linear-attention layer that also selects and repeats rows, and tells the feed when it changes."""

    _layer_type = None

    def __init__(self, feed: Feed, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._feed = feed

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As stock. A step that fails after this cannot be rolled back."""
        self._feed.touch()
        states: torch.Tensor = super().update_conv_state(*args, **kwargs)
        return states

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As stock. A step that fails after this cannot be rolled back."""
        self._feed.touch()
        states: torch.Tensor = super().update_recurrent_state(*args, **kwargs)
        return states

    def _tensors(self) -> list[tuple[dict[int, torch.Tensor | None], int, torch.Tensor]]:
        states = (self.conv_states, self.recurrent_states)
        return [(d, i, t) for d in states for i, t in d.items() if t is not None]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep rows `indices` (i64 [n])."""
        for states, i, tensor in self._tensors():
            states[i] = tensor.index_select(0, indices.to(tensor.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        for states, i, tensor in self._tensors():
            states[i] = tensor.repeat_interleave(repeats, dim=0)

    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(tensor.nbytes for _, _, tensor in self._tensors())

    def clone(self, feed: Feed) -> RecurrentLayer:
        """A copy of the states, bound to another cache's feed."""
        memo: dict[int, Any] = {id(self._feed): feed}
        return copy.deepcopy(self, memo)


def refuse_early_initialization() -> NoReturn:
    """KVCache.early_initialization: pages are reserved step by step."""
    raise Unsupported("early_initialization: a KVCache reserves pages when a step opens, it has no static tensors")


def layer_of(intake: Intake, index: int) -> Any:
    """The cache layer of a decoder's layer."""
    kind, kwargs = intake.facts.types[index]
    if kind in compat.ATTENTION_TYPES:
        return StrataLayer(intake.feed, index, intake.layer_facts(index)[1])
    if kind in compat.RECURRENT_TYPES:
        return RecurrentLayer(intake.feed, **dict(kwargs))
    return compat.idle_layer()


class FedCache(StockCache):  # type: ignore[misc]
    """What a patched decoder takes as `past_key_values`: hands what it is fed to an intake."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        super().__init__(layers=[layer_of(intake, i) for i in range(len(intake.facts.types))])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note k, v [B, H, T, D] of a layer in the open step; returns them unchanged, the new tokens only.

        RuntimeError without an open step: the model is not patched.
        """
        return self.intake.feed.note(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed, padding included; those of the open step too once the layer was updated in it."""
        index = self.intake.index
        return self.intake.feed.columns_of(layer_idx if layer_idx in index else min(index))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As get_seq_length."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns + query_length, 0)."""
        return self.intake.feed.columns + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything was fed."""
        return self.intake.feed.columns > 0
