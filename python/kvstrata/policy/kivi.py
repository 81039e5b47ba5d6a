"""``kivi``: everything but the recent window is quantized (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstrata.ops import choose_states
from kvstrata.policy.base import STATES, Plan, Policy, Seen


@dataclass(frozen=True)
class QuantizeAll:
    """Every unprotected token takes one format; nothing is scored.

    format: "int8", "int4" or "int2". Where a limit does not hold all tokens in that format, the newest stay, in whole
    pages. A token of fewer bits keeps its own. ValueError for an unknown format.
    """

    format: str = "int4"

    def __post_init__(self) -> None:
        if self.format not in STATES:
            raise ValueError(f"QuantizeAll: format is {self.format!r}, expected one of {', '.join(STATES)}")

    def plan(self, seen: Seen) -> Plan:
        state, allowance = STATES[self.format], seen.allowance
        if allowance is None:
            pages = torch.full_like(seen.lengths, seen.positions.shape[1])  # one for each token: room for all
        else:
            pages = torch.div(allowance.bytes.clamp_min(0), allowance.page_bytes[state], rounding_mode="floor")
        newest = seen.positions.to(torch.float32)
        none = torch.zeros_like(pages)
        return Plan(state=choose_states(newest, seen.state, seen.positions, seen.protected, none, pages, state))


def kivi(format: str = "int4", *, window: int = 128, sinks: int = 16, interval: int = 64, chunk: int = 2048) -> Policy:
    """Full tokens in the recent window, everything older in one quantized format.

    format: "int4", or "int2" (paper); window, interval, chunk: tokens, multiples of 16 (window 128: paper); sinks: first
    tokens kept Full (0: paper). Works without a budget; under one that does not hold all, the newest stay.
    ValueError for parameters.

    Deviations: the paper quantizes keys per channel over 32 tokens and values per token, both asymmetrically; here keys and
    values are rotated and quantized per token, so that a token can change state by itself. Tokens are quantized as they leave
    the window, 16 at a time.
    """
    planner = QuantizeAll(format)
    formats = (format,)
    return Policy(
        "kivi",
        planner,
        formats=formats,
        sinks=sinks,
        window=window,
        interval=interval,
        chunk=chunk,
        on_seal=format,
    )
