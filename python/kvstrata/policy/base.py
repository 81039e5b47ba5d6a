"""Roles and the plan. A policy reads, a plan says, ``apply_plan`` acts.

A policy is a composition of roles, each a small frozen dataclass with one method; per-sequence state lives in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

EVICTED, FULL = 0, 1
"""Values of a plan's state column (``csrc/common/types.h``)."""


@dataclass(frozen=True)
class Seen:
    """What a planner sees of one layer.

    positions: i32 [R, N], the stored tokens of each row in table order, -1 beyond a row's last;
    lengths: i64 [R], real tokens seen by the row's sequence; open: bool [R, N], tokens of the open tail.
    """

    layer: int
    positions: torch.Tensor
    lengths: torch.Tensor
    open: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """State, tier, group and set for every stored token of one layer: data. An absent column means "as it is".

    Each column is [R, N], aligned with ``Seen.positions``; state: u8, 0 Evicted, 1 Full.
    """

    state: torch.Tensor | None = None
    tier: torch.Tensor | None = None
    group: torch.Tensor | None = None
    set: torch.Tensor | None = None


class Planner(Protocol):
    """Which state and tier does each token take?"""

    def plan(self, seen: Seen) -> Plan: ...


@dataclass(frozen=True)
class Policy:
    """A composition of roles.

    sinks: first tokens that are always kept; window: tokens of the open tail, a multiple of 16 (None: taken from the
    budget); interval: decoded tokens between plans; chunk: prompt tokens between cuts. Policies with a planner need a
    budget unless their window is given.
    """

    name: str
    planner: Planner | None = None
    sinks: int = 0
    window: int | None = 64
    interval: int = 64
    chunk: int = 2048

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"policy {self.name}: sinks is {self.sinks}, expected >= 0")
        if self.window is not None and (self.window < 16 or self.window % 16):
            raise ValueError(f"policy {self.name}: window is {self.window}, expected a positive multiple of 16")
        for field in ("interval", "chunk"):
            value = getattr(self, field)
            if value < 16 or value % 16:
                raise ValueError(f"policy {self.name}: {field} is {value}, expected a positive multiple of 16")
