"""The mask function: none while a step is open, for the paged attention knows positions, windows and pads itself."""

from __future__ import annotations

from typing import Any

from kvstrata.config import Unsupported
from kvstrata.hf.step import current


class Mask:
    """The mask function of one fallback: `mask_interface(batch_size=..., ...)` of transformers.

    Without an open call it is the fallback's own function. With one: None, or Unsupported when the model wants more
    than causal, window and padding.
    """

    def __init__(self, fallback: Any) -> None:
        self.fallback = fallback

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = current.get()
        if call is None:
            return self.fallback(*args, **kwargs)
        if kwargs.get("use_vmap", False) or not kwargs.get("allow_is_causal_skip", True):
            raise Unsupported(
                "the model asks for more than a causal, windowed and padded mask (image spans, a prefix, packed "
                f"sequences or bidirectional attention): use_vmap={kwargs.get('use_vmap', False)}, "
                f"allow_is_causal_skip={kwargs.get('allow_is_causal_skip', True)}"
            )
        record = getattr(call.cache, "record_mask", None)  # the probe's cache wants to see the mask
        return None if record is None else record(self.fallback, args, kwargs)
