"""Everything that depends on the installed transformers release. No other module compares versions."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import transformers
from transformers import cache_utils

from kvstrata.config import Unsupported

OLDEST = (5, 17)
NEWEST = (5, 23)

ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})
RECURRENT_TYPES = frozenset({"linear_attention", "conv"})
IDLE_TYPES = frozenset({"dummy", "moe", "mlp"})

logger = logging.getLogger("kvstrata")


@cache
def warn_once(message: str) -> None:
    """Log `message` as a warning, once per process."""
    logger.warning(message)


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version string such as "5.23.0" or "5.24.0.dev0"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def version_reason(version: str = transformers.__version__) -> str | None:
    """Why this transformers release is refused, or None. A newer release than tested warns once."""
    found = release(version)
    if found < OLDEST:
        return f"kvstrata needs transformers 5.17 to 5.23, found {version}"
    if found > NEWEST:
        warn_once(f"kvstrata is tested with transformers 5.17 to 5.23, found {version}")
    return None


def layer_types(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """(layer type, constructor arguments of the stock cache layer) for every layer of a decoder's text config.

    5.17 returns one dict of arguments for all layers, 5.23 a list of them; layers without attention are "dummy" in
    5.23 and keep their own name ("moe", "mlp") in 5.17. Layers that share another's keys and values are the caller's
    to refuse: 5.17 trims them from the list.
    """
    types, kwargs = cache_utils.get_layer_types_and_kwargs(config)
    if isinstance(kwargs, dict):
        picks = {
            "sliding_attention": ("sliding_window",),
            "linear_attention": ("number_of_states",),
            "conv": ("number_of_states",),
        }
        return [(name, {k: kwargs[k] for k in picks.get(name, ()) if k in kwargs}) for name in types]
    return list(zip(types, kwargs, strict=True))


def idle_layer() -> Any:
    """The stock cache layer of a layer that has no attention: DummyLayer, or an empty recurrent layer in 5.17."""
    dummy = getattr(cache_utils, "DummyLayer", None)
    return dummy() if dummy is not None else cache_utils.LinearAttentionLayer()


def text_config(config: Any) -> Any:
    """The decoder's own config out of a composite one."""
    return config.get_text_config(decoder=True)


def mask_function(name: str) -> Any:
    """The mask function registered under an attention implementation's name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[name]


def raise_first(reasons: list[str]) -> None:
    """Raise Unsupported with the first reason, if there is one."""
    if reasons:
        raise Unsupported(reasons[0])
