"""``epicache``: long conversations as episodes under a fixed budget (EpiCache, arXiv 2509.17396)."""

from __future__ import annotations

from typing import Literal

from kvstrata.policy.backbone import Backbone
from kvstrata.policy.base import Policy
from kvstrata.policy.patched import PatchedPrompt

RING = 2
"""Near pages through which Far ones are read to look at: sets come Near whole."""


def epicache(
    budget: int,
    *,
    recent: int = 64,
    share: float = 2 / 3,
    heads: Literal["pair", "uniform", "model"] = "pair",
    head_floor: float = 0.25,
    layers: tuple[int, ...] | None = None,
    private: str = "full",
    kernel: int = 17,
    common: str = "full",
    head_cap: float = 2.5,
    guards: int = 16,
    keeps: bool = False,
) -> Policy:
    """Keeps what the prompts of episodes attend to: a backbone for all of them, and of each a private set.

    budget: tokens of a row that a question can see, a multiple of 16; recent: of them the tail, likewise; guards: first tokens
    that the backbone always has, a system prompt for example; keeps: a token's score is the largest it ever had, for plans by
    :meth:`kvstrata.Cache.regroup`; the others: of :class:`kvstrata.policy.backbone.Backbone`. Nothing is planned but there and
    in steps with spans (:meth:`kvstrata.Cache.read`), which :class:`kvstrata.Conversation` takes.
    ValueError for parameters, and where the backbone cannot hold the guards.
    """
    if heads == "model" and not keeps:
        raise ValueError("epicache: heads is 'model', expected 'pair' or 'uniform' where scores are not kept")
    planner = Backbone(budget, recent, share, heads, head_floor, layers, private, kernel, common, head_cap)
    for layer, b in enumerate(layers or (budget,)):
        if b < (least := planner.least(guards, 2)):
            where = f" of layer {layer}" if layers else ""
            raise ValueError(f"epicache: budget{where} is {b} tokens, expected at least {least}")
    return Policy(
        "epicache",
        planner,
        PatchedPrompt(),
        formats=() if private == "full" else (private,),
        sinks=guards,
        window=recent,
        ring=RING,
        combine="max" if keeps else "replace",
        decay=1.0 if keeps else 0.95,
    )
