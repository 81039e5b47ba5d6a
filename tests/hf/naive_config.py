"""The part of kvstrata.config that the stand-in core needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


class Unsupported(ValueError):
    """What cannot work, with the reason."""


class BudgetExceeded(ValueError):
    """A step that does not fit."""


@dataclass(frozen=True)
class LayerSpec:
    kv_heads: int
    q_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True)
class Shape:
    layers: Sequence[LayerSpec]
    dtype: torch.dtype
    device: torch.device | str = "cpu"
