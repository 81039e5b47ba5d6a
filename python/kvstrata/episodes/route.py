"""Which episodes does a question read? Source: arXiv 2509.17396, section 3.3 (rule ``centroid``); the rest is ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvstrata.episodes.vectors import F64, checked, first_of_largest, unit

VOTERS = 10
"""Windows that vote."""
LATELY = 50
"""Questions that are looked back at."""


@dataclass(frozen=True)
class Route:
    """Where a question went. Episodes are numbered from 0.

    episodes: one or two, the first first; scores: v of every episode [E]; margin: v of the first less v of the best other
    one (below 0 where hysteresis kept the first, inf with one episode); uncertain: no window is like the question.
    """

    episodes: tuple[int, ...]
    scores: tuple[float, ...]
    margin: float
    uncertain: bool


@dataclass(frozen=True)
class Turned:
    """Where questions went. route: of the last; switches: questions that read other episodes than the one before; lately: of
    the last 50 that were routed, whether no window was like them."""

    route: Route | None = None
    questions: int = 0
    switches: int = 0
    lately: tuple[bool, ...] = ()

    def to(self, route: Route | None) -> Turned:
        """After another question."""
        if route is None:
            return replace(self, questions=self.questions + 1)
        other = self.route is not None and route.episodes != self.route.episodes
        lately = (*self.lately, route.uncertain)[-LATELY:]
        return Turned(route, self.questions + 1, self.switches + other, lately)

    @property
    def episodes(self) -> tuple[int, ...] | None:
        """That are read; None: all."""
        return None if self.route is None else self.route.episodes

    @property
    def uncertain(self) -> float:
        """The share of late questions that no window was like."""
        return sum(self.lately) / max(1, len(self.lately))


@dataclass(frozen=True)
class Router:
    """The episode whose windows are most like the question, and the next one where the two are close.

    rule: v of an episode is ``nearest_window``: the largest cosine of question and one of its windows; ``centroid``: the
    cosine of question and centroid (the paper's); ``vote``: its share of the summed cosines of the 10 nearest windows
    (negative ones count 0). top: episodes read, 1 or 2; margin: a second one is read if v of the first leads by less;
    hysteresis: by how much v of another must lead to take the place of the last first, and what the margin grows by for
    an episode read last time; query_floor: cosine that no window reaches of an uncertain question. Ties: lower episode.
    ValueError: another rule or top, a margin or hysteresis below 0 or not finite, a floor outside -1..1.
    """

    rule: Literal["nearest_window", "centroid", "vote"] = "nearest_window"
    top: int = 2
    margin: float = 0.05
    hysteresis: float = 0.02
    query_floor: float = 0.15

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"Router: rule is {self.rule!r}, expected one of {', '.join(RULES)}")
        if self.top not in (1, 2):
            raise ValueError(f"Router: top is {self.top!r}, expected 1 or 2 episodes")
        for name in ("margin", "hysteresis"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Router: {name} is {getattr(self, name)!r}, expected a finite number >= 0")
        if not -1 <= self.query_floor <= 1:
            raise ValueError(f"Router: query_floor is {self.query_floor!r}, expected a cosine, -1 to 1")

    def route(
        self, query: Tensor, vectors: Tensor, labels: Tensor, centroids: Tensor, last: Route | None = None
    ) -> Route:
        """query f32 [d]; vectors of the windows f32 [n, d], their episodes i32 [n], centroids f32 [E, d]; the last route.

        ValueError: n or E is 0, misshapen, NaN or infinite embeddings, an episode without a window, a last route that names
        an episode there is not.
        """
        d, n, episodes = checked_index(vectors, labels, centroids)
        q = unit(checked("query", query, (d,)))
        cos = unit(vectors) @ q  # [n]
        v = RULES[self.rule](cos, labels.cpu().numpy(), unit(centroids) @ q)
        if last is not None and max(last.episodes) >= episodes:
            raise ValueError(f"route: last names episodes {last.episodes}, expected numbers below {episodes}")
        return self.choose(v, bool(cos.max() < self.query_floor), last)

    def choose(self, v: F64, uncertain: bool = False, last: Route | None = None) -> Route:
        """The route by v, f64 [E], alone."""
        first = first_of_largest(v)
        if last is not None and v.max() - v[last.episodes[0]] <= self.hysteresis:
            first = last.episodes[0]
        scores = tuple(v.tolist())
        if len(v) == 1:
            return Route((first,), scores, math.inf, uncertain)
        others = v.copy()
        others[first] = -math.inf
        second = first_of_largest(others)
        lead = float(v[first] - v[second])
        near = self.margin + (self.hysteresis if last is not None and second in last.episodes else 0)
        both = self.top >= 2 and lead < near
        return Route((first, second) if both else (first,), scores, lead, uncertain)


def checked_index(vectors: Tensor, labels: Tensor, centroids: Tensor) -> tuple[int, int, int]:
    """d, n and E of windows f32 [n, d], labels i32 [n] and centroids f32 [E, d]; ValueError as :meth:`Router.route`."""
    n, d = checked("vectors", vectors, ("n", "d")).shape
    episodes = checked("centroids", centroids, ("E", d)).shape[0]
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"labels is {labels.dtype} {list(labels.shape)}, expected integers [{n}]")
    found = torch.unique(labels.cpu()).tolist()
    if found != list(range(episodes)) or not episodes:
        raise ValueError(f"labels name episodes {found}, centroids {episodes}: expected a window for each from 0 on")
    return d, n, episodes


def _nearest_window(cos: F64, labels: np.ndarray, to_centroid: F64) -> F64:
    v = np.full(len(to_centroid), -np.inf)
    np.maximum.at(v, labels, cos)
    return v


def _centroid(cos: F64, labels: np.ndarray, to_centroid: F64) -> F64:
    return to_centroid


def _vote(cos: F64, labels: np.ndarray, to_centroid: F64) -> F64:
    nearest = np.argsort(-cos, kind="stable")[:VOTERS]
    votes = np.bincount(labels[nearest], weights=cos[nearest].clip(0), minlength=len(to_centroid))
    share: F64 = votes / max(votes.sum(), np.finfo(np.float64).tiny)
    return share


RULES: dict[str, Callable[[F64, np.ndarray, F64], F64]] = {
    "nearest_window": _nearest_window,
    "centroid": _centroid,
    "vote": _vote,
}
