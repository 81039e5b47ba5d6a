"""Where the forwards of a decoder go: its attention layers, what was fed to them, who opens and closes a step."""

from __future__ import annotations

from typing import Any

import torch

from kvstrata.config import Unsupported
from kvstrata.hf.facts import Facts
from kvstrata.hf.feed import Feed
from kvstrata.hf.step import Forward


class Intake:
    """facts: the layers. feed: what was fed to them. width: rows of a forward."""

    def __init__(self, facts: Facts, feed: Feed) -> None:
        self.facts, self.feed = facts, feed
        self.index = {fact.layer: i for i, fact in enumerate(facts.layers)}
        self.attention_layers = frozenset(self.index)

    @property
    def width(self) -> int:
        """Rows of a forward."""
        raise NotImplementedError

    def open(
        self, facts: Facts, modules: frozenset[int], mask: torch.Tensor | None, batch: int, length: int, positions: Any
    ) -> Forward:
        """The step of a forward of batch * length tokens; mask: [B, columns + T] or None; positions: position_ids or None."""
        raise NotImplementedError

    def close(self, forward: Forward, failed: bool) -> None:
        """The forward ended; failed: by a fault."""
        raise NotImplementedError

    def require(self, facts: Facts) -> None:
        """ValueError unless a decoder of these facts is the one that this was made for."""
        difference = None if facts is self.facts else self.facts.difference(facts)
        if difference is not None:
            raise ValueError(f"this cache was made for another model; {difference}")

    def check_keys(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """ValueError unless k, v [B, H, T, D] are what the probe saw of `layer`."""
        if layer not in self.index:
            raise Unsupported(f"{self.facts.name}: layer {layer} has keys, but the probe saw none")
        fact, forward = self.facts.layers[self.index[layer]], self.feed.forward
        assert forward is not None
        expected = (self.width, fact.kv_heads, forward.length, fact.head_dim)
        for name, x in (("keys", k), ("values", v)):
            if tuple(x.shape) != expected:
                raise ValueError(f"layer {layer} {name}: expected [B, H, T, D] = {list(expected)}, got {list(x.shape)}")
            if x.dtype != fact.dtype or x.device != fact.device:
                raise ValueError(
                    f"layer {layer} {name}: expected {fact.dtype} on {fact.device}, as the cache was made, got "
                    f"{x.dtype} on {x.device}"
                )

    def layer_facts(self, layer: int) -> tuple[int, int | None]:
        """(index of a model's attention layer in the core, its window or None)."""
        index = self.index[layer]
        return index, self.facts.layers[index].window
