"""``arkv``: Full, Quantized or Evicted, with shares by the statistics of each layer's attention (ARKV, arXiv 2603.08727)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvstrata.budget import EntropyShare
from kvstrata.policy.base import Policy, Scorer
from kvstrata.policy.keydiff import KeyDiversity
from kvstrata.policy.snapkv import WindowVote
from kvstrata.policy.three_states import ThreeStates

FULL_SHARE = 0.01
"""Mean share of the pages of a row that stay Full where not all fit; layers of high OQ take more of it. Answers fall with it:
the same bytes hold three to four times as many int4 tokens."""
KERNEL = 5
"""Neighbourhood in positions over which key diversity is averaged."""


@dataclass(frozen=True)
class MeanSpread(WindowVote):
    """The mean attention of a row's last queries to each token plus their spread, pooled over its neighbours (ARKV).

    spread: "std", mean + beta * standard deviation (ours), or "variance", mean + gamma * variance (paper; gamma of the code).
    Variance is mass squared, so gamma means another thing at each number of tokens. Both unbiased over the queries; 0 for one
    query. beta, gamma >= 0. The rest as in :class:`kvstrata.policy.snapkv.WindowVote`. ValueError for parameters.
    """

    queries: int = 32
    spread: Literal["std", "variance"] = "std"
    beta: float = 1.0
    gamma: float = 263.81

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spread not in ("std", "variance"):
            raise ValueError(f"MeanSpread: spread is {self.spread!r}, expected 'std' or 'variance'")
        for name in ("beta", "gamma"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"MeanSpread: {name} is {value}, expected a finite number >= 0")

    def _spread(self) -> tuple[Literal["mean", "std", "variance"], float]:
        return self.spread, self.beta if self.spread == "std" else self.gamma


def arkv(
    quantized: str | tuple[str, ...] = ("int4", "int2"),
    cover: bool = True,
    scorer: Scorer | None = None,
    *,
    allocator: EntropyShare | None = None,
    combine: Literal["replace", "sum", "max"] = "replace",
    decay: float = 0.95,
    centre: bool = True,
    window: int = 64,
    sinks: int = 16,
    interval: int = 64,
    chunk: int = 2048,
    legacy: bool = False,
) -> Policy:
    """Keeps what matters most Full, quantizes the middle, evicts the rest.

    quantized, cover: of :class:`kvstrata.policy.three_states.ThreeStates`; scorer: None is
    :class:`kvstrata.policy.keydiff.KeyDiversity` over KERNEL neighbours; allocator: None is
    ``EntropyShare(full_share=FULL_SHARE)``; combine, decay: how a new score joins the last one, "replace" for scores
    that are no attention mass; centre: of :class:`kvstrata.policy.base.Policy`; window: recent tokens kept, at least the
    queries of both; interval, chunk: tokens; all three multiples of 16; sinks: first tokens kept; legacy: what the paper's
    public code does (:mod:`kvstrata.policy.legacy`), under a budget in tokens with count=True: its window of 32 and no sinks,
    its scores, statistics and trims, whatever those would do better; only that quantized tokens, int8 each by itself, stay
    and are read. It takes interval and chunk alone. ValueError for parameters.

    The paper's settings: ``arkv("int8", cover=False, scorer=MeanSpread(spread="variance", divide="kernel"), window=32,
    sinks=0, allocator=EntropyShare(stats="code", every=0))``. Deviations: the paper ranks by what the last queries attend
    to, which knows little of questions that come later; the default here ranks by the keys alone, averaged over neighbours,
    as what an answer is made of stands together; :class:`MeanSpread` is for prompts that end in their question. Few pages
    stay Full, and where int4 would hold few of the tokens they are int2, because coverage answers more than precision does.
    Its code cuts the prompt without quantizing, decides by one query while decoding, and overwrites what it has quantized;
    here quantized tokens live on, and one plan serves prompt and decoding. Its FP8 with one scale for all heads is int8 per
    token.
    """
    if legacy:
        given = (quantized, cover, scorer, allocator, combine, centre, window, sinks)
        if given != (("int4", "int2"), True, None, None, "replace", True, 64, 16):
            raise ValueError(f"arkv: legacy with {given}, expected no argument but interval and chunk")
        return _legacy(interval, chunk)
    planner = ThreeStates(quantized, cover)
    return Policy(
        "arkv",
        planner,
        KeyDiversity(KERNEL) if scorer is None else scorer,
        EntropyShare(full_share=FULL_SHARE) if allocator is None else allocator,
        formats=planner.formats,
        sinks=sinks,
        window=window,
        interval=interval,
        chunk=chunk,
        combine=combine,
        decay=decay,
        centre=centre,
    )


def _legacy(interval: int, chunk: int) -> Policy:
    from kvstrata.policy.legacy import CodeStates, CodeVotes  # which is made of this file's scorer

    planner, votes = CodeStates(), CodeVotes()
    allocator = EntropyShare(stats="code", every=0)
    formats = (planner.quantized,)
    return Policy(
        "arkv", planner, votes, allocator, formats=formats, sinks=0, window=32, interval=interval, chunk=chunk
    )
