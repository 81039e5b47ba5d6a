"""What a cache is shaped like, and the errors of the whole package."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvstrata._C import MachineError as MachineError
from kvstrata._C import Unsupported as Unsupported

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Data types of q, k, v and of Full pages, with their native numbers (``csrc/common/types.h``)."""

MAX_HEAD_DIM = 512
SLOTS = 16
"""Slots in a page."""


class BudgetExceeded(ValueError):
    """A limit would be passed. Raised before a page is taken; nothing has changed."""


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer.

    kv_heads, q_heads: heads of K and V, and of Q (a multiple of kv_heads); head_dim: 1 to 512, the same for K and V;
    window: sliding window in tokens (a query at position p reads positions > p - window), None for full attention.
    """

    kv_heads: int
    q_heads: int
    head_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_heads", "q_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"LayerSpec: {name} is {value!r}, expected an int >= 1")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"LayerSpec: q_heads is {self.q_heads}, expected a multiple of kv_heads={self.kv_heads}")
        if self.q_heads // self.kv_heads > 16:
            raise Unsupported(f"LayerSpec: {self.q_heads // self.kv_heads} query heads per KV head, at most 16 work")
        if self.head_dim > MAX_HEAD_DIM:
            raise Unsupported(f"LayerSpec: head_dim is {self.head_dim}, at most {MAX_HEAD_DIM} works")
        if self.window is not None and self.window < 1:
            raise ValueError(f"LayerSpec: window is {self.window}, expected None or an int >= 1")


@dataclass(frozen=True)
class Shape:
    """The layers of a cache, the dtype of its Full pages (float32, bfloat16, float16) and its device."""

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    device: torch.device

    def __init__(self, layers: Iterable[LayerSpec], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "device", _numbered(torch.device(device)))
        if not self.layers:
            raise ValueError("Shape: layers is empty, expected at least one LayerSpec")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, LayerSpec):
                raise ValueError(f"Shape: layers[{i}] is {type(layer).__name__}, expected LayerSpec")
        if dtype not in DTYPES:
            raise Unsupported(f"Shape: dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if self.device.type not in ("cpu", "cuda"):
            raise Unsupported(f"Shape: device is {self.device}, expected cpu or cuda")

    @property
    def rows(self) -> int:
        """(layer, KV head) pairs of one sequence."""
        return sum(layer.kv_heads for layer in self.layers)

    @property
    def kinds(self) -> list[tuple[int, LayerSpec]]:
        """Each different layer once, with the index of its first."""
        first = {spec: i for i, spec in reversed(list(enumerate(self.layers)))}
        return [(i, spec) for spec, i in first.items()]

    def token_bytes(self) -> int:
        """Bytes of K and V of one token in a dense cache."""
        return 2 * self.dtype.itemsize * sum(layer.kv_heads * layer.head_dim for layer in self.layers)


def _numbered(device: torch.device) -> torch.device:
    """As tensors that lie there say it: "cuda" is the current device."""
    index: int | None = device.index
    if device.type != "cuda" or index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
