"""Where questions go without an LLM: one dialogue, one clustering, every rule and control, measured question by question.

A turn counts as loaded if any window that holds a part of it is. ``Outcome`` says what is measured. Source of PPA, EVAFF
and the rule ``shipped``: arXiv 2509.17396 and its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstrata.episodes import Embedder, Router, Window, cluster, represent, segment
from kvstrata.episodes.route import RULES
from kvstrata.episodes.vectors import F64, unit, unit_rows
from kvstrata.quality.dialogues import Dialogue, Question

TEMPLATE = (
    "Answer the question that follows from the conversations above. Be brief: a few words, no whole sentences, and the "
    "conversations' own words wherever they will do.\n\nQuestion: {question}\n"
)
"""A templated query: an instruction of the kind and length that the paper's scripts put around a question and embed."""
QUERIES = ("raw", "templated")
SHIPPED = ("shipped", "templated")
"""What the paper's code does: dot product with centroids that are means, not unit vectors, of the templated query."""
NO_QUERY = "-"
RETRIEVED = (8, 14, 32)
"""Windows loaded by the control that knows no episodes."""
PROMPTS = (("closest", 1), ("closest", 8), ("coverage", 4), ("coverage", 8))
TOP = 0.3
BOTH = 4.0
"""A margin that no two cosines differ by: two episodes are read."""
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Line = tuple[str, str]
"""(rule, query)."""


@dataclass(frozen=True)
class Cut:
    """How a dialogue becomes windows, episodes and prompts. episodes: at most; representatives: windows of a prompt."""

    window: int = 4
    bounded: bool = False
    captions: bool = False
    episodes: int = 4
    representatives: int = 4
    pick: Literal["coverage", "closest"] = "coverage"

    def windows(self, dialogue: Dialogue) -> list[Window]:
        return segment(
            dialogue.turns,
            window=self.window,
            bounded=self.bounded,
            sessions=dialogue.sessions,
            captions=self.captions,
        )


@dataclass(frozen=True)
class Reading:
    """A dialogue cut and embedded. n windows, T turns, Q usable questions.

    holds: whether turn t has a part in window i, [T, n]; tokens of each window [n]; vectors f32 [n, d]; queries: per kind,
    f32 [Q, d]; near: cosines of raw questions and windows [Q, n]; like: of windows and windows [n, n].
    """

    questions: tuple[Question, ...]
    holds: Bools
    tokens: Ints
    vectors: Tensor
    queries: Mapping[str, Tensor]
    near: F64
    like: F64


def read(dialogue: Dialogue, embedder: Embedder, cut: Cut, length: Callable[[str], int]) -> Reading:
    """``length``: tokens of a text. An embedder with ``fit`` is fitted to the windows.

    ValueError where no question has usable evidence.
    """
    questions = tuple(q for q in dialogue.questions if q.usable)
    if not questions:
        raise ValueError(f"{dialogue.id}: no question has evidence that exists, expected one")
    windows = cut.windows(dialogue)
    texts = [w.text for w in windows]
    if fit := getattr(embedder, "fit", None):
        fit(texts)
    holds = np.zeros((len(dialogue.turns), len(windows)), bool)
    for i, window in enumerate(windows):
        holds[list(window.turns), i] = True
    vectors = embedder.embed(texts, "window")
    asked = {"raw": [q.text for q in questions], "templated": [TEMPLATE.format(question=q.text) for q in questions]}
    queries = {kind: embedder.embed(texts, "query") for kind, texts in asked.items()}
    wide = unit(vectors)
    return Reading(
        questions,
        holds,
        np.array([length(text) for text in texts]),
        vectors,
        queries,
        unit(queries["raw"]) @ wide.T,
        wide @ wide.T,
    )


@dataclass(frozen=True)
class Grouping:
    """Windows in E episodes. holds: whether turn t has a part in episode e, [T, E]; tokens of each [E]."""

    labels: Ints
    centroids: Tensor
    holds: Bools
    tokens: Ints

    @property
    def count(self) -> int:
        return len(self.tokens)


def grouping(reading: Reading, labels: Ints) -> Grouping:
    """labels [n], each of 0..E-1 at least once; centroids are unit means."""
    wide, count = unit(reading.vectors), int(labels.max()) + 1
    member = labels[:, None] == np.arange(count)  # [n, E]
    centroids = torch.from_numpy(unit_rows(member.T @ wide)).float()
    return Grouping(labels, centroids, reading.holds @ member, reading.tokens @ member)


def chunks(reading: Reading, count: int) -> Grouping:
    """As many stretches of time, equal but for one window."""
    n = len(reading.tokens)
    return grouping(reading, np.arange(n) * min(count, n) // n)


@dataclass(frozen=True)
class Outcome:
    """What one question got.

    recall: share of its evidence turns that were loaded; whole: all, some: any of them; tokens loaded. Where episodes were
    chosen and have prompts: ppa, mean percentile (0 best, 1 worst) of the prompts' windows among all, ranked by cosine to
    the raw question; evaff, of the evidence's windows, ranked by the largest cosine to a prompt's; top: their share in the
    best 30 %. margin: v of the first less v of the next, where a rule chose.
    """

    episodes: tuple[int, ...]
    recall: float
    whole: float
    some: float
    tokens: float
    ppa: float | None = None
    evaff: float | None = None
    top: float | None = None
    margin: float | None = None


MEASURES = ("recall", "whole", "some", "tokens", "ppa", "evaff", "top", "margin")


@dataclass(frozen=True)
class Loaded:
    """Measures what a choice of episodes loads; each choice once."""

    reading: Reading
    group: Grouping
    prompts: list[list[int]] | None
    _known: dict[tuple[int, tuple[int, ...]], Outcome] = field(default_factory=dict, repr=False)
    _affinity: dict[tuple[int, ...], F64] = field(default_factory=dict, repr=False)

    def outcome(self, q: int, episodes: tuple[int, ...], margin: float | None = None) -> Outcome:
        """What question q gets from these episodes."""
        key = q, tuple(sorted(episodes))
        if key not in self._known:
            self._known[key] = self._measured(*key)
        return replace(self._known[key], episodes=episodes, margin=margin)

    def _measured(self, q: int, episodes: tuple[int, ...]) -> Outcome:
        evidence = list(self.reading.questions[q].evidence)
        found = _held(self.group.holds, evidence, episodes)
        tokens = float(self.group.tokens[list(episodes)].sum())
        outcome = Outcome(episodes, *_shares(found), tokens)
        if self.prompts is None:
            return outcome
        picked = [i for e in episodes for i in self.prompts[e]]
        resting = self.reading.holds[evidence].any(axis=0)
        if episodes not in self._affinity:
            self._affinity[episodes] = percentiles(self.reading.like[:, picked].max(axis=1))
        affinity = self._affinity[episodes][resting]
        ppa = float(percentiles(self.reading.near[q])[picked].mean())
        return Outcome(episodes, *_shares(found), tokens, ppa, float(affinity.mean()), float((affinity <= TOP).mean()))

    def mean(self, q: int, weights: F64) -> Outcome:
        """What q gets on average from one episode drawn with these weights [E]: no draw, no noise."""
        each = [self.outcome(q, (e,)) for e in range(self.group.count)]
        means = (sum(w * getattr(o, name) for w, o in zip(weights, each, strict=True)) for name in MEASURES[:-1])
        return Outcome((), *map(float, means))

    def best(self, q: int) -> Outcome:
        """The single episode that holds most of the evidence; ties: the lowest."""
        return max((self.outcome(q, (e,)) for e in range(self.group.count)), key=lambda o: o.recall)


def _held(holds: Bools, turns: Sequence[int], places: Sequence[int]) -> Bools:
    """Whether any of these windows or episodes has a part of each of these turns."""
    return np.asarray(holds[list(turns)][:, list(places)].any(axis=1))


def _shares(found: Bools) -> tuple[float, float, float]:
    return float(found.mean()), float(found.all()), float(found.any())


def percentiles(values: F64) -> F64:
    """0 for the largest to 1 for the smallest, [n]; ties: the earlier is the better."""
    order = np.argsort(-values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    return ranks / max(1, len(values) - 1)


def measured(reading: Reading, cut: Cut, seed: int) -> dict[Line, list[Outcome]]:
    """Every rule and control, an outcome for each of the Q questions. ``seed``: of the clustering and of what is shuffled."""
    found = cluster(reading.vectors, cut.episodes, seed=seed)
    group = grouping(reading, found.labels.numpy().astype(np.int64))
    loaded = Loaded(reading, group, _prompts(reading, group, cut.representatives, cut.pick))
    shuffled = Loaded(reading, _dealt(reading, group, seed), None)
    every = range(len(reading.questions))
    lines: dict[Line, list[Outcome]] = {}
    for kind in QUERIES:
        for rule in RULES:
            lines |= _routed(reading, loaded, rule, kind)
        lines["shipped", kind] = _shipped(reading, loaded, kind)
        for k in RETRIEVED:
            lines[f"windows @{k}", kind] = _retrieved(reading, reading.queries[kind], k)
    for rule in ("nearest_window", "centroid"):
        routes = [o.episodes for o in lines[rule, "raw"]]
        lines[f"shuffled, {rule}", "raw"] = [shuffled.outcome(q, route) for q, route in zip(every, routes, strict=True)]
    in_time = chunks(reading, group.count)
    apart = Loaded(reading, in_time, _prompts(reading, in_time, cut.representatives, cut.pick))
    for rule in ("nearest_window", "centroid"):
        lines[f"in time, {rule}", "raw"] = _routed(reading, apart, rule, "raw")[rule, "raw"]
    sizes = np.bincount(group.labels) / len(group.labels)
    lines["random", NO_QUERY] = [loaded.mean(q, np.full(group.count, 1 / group.count)) for q in every]
    lines["size-proportional", NO_QUERY] = [loaded.mean(q, sizes) for q in every]
    lines["largest", NO_QUERY] = [loaded.outcome(q, (int(sizes.argmax()),)) for q in every]
    lines["oracle", NO_QUERY] = [loaded.best(q) for q in every]
    return lines | _prompted(reading, group)


def _prompts(reading: Reading, group: Grouping, n: int, pick: Any) -> list[list[int]]:
    return represent(reading.vectors, torch.from_numpy(group.labels), group.centroids, n, pick)


def _prompted(reading: Reading, group: Grouping) -> dict[Line, list[Outcome]]:
    """The oracle's episode with prompts picked in other ways: what they do to PPA and EVAFF alone."""
    lines = {}
    for pick, n in PROMPTS:
        loaded = Loaded(reading, group, _prompts(reading, group, n, pick))
        lines[f"oracle, {n} {pick}", NO_QUERY] = [loaded.best(q) for q in range(len(reading.questions))]
    return lines


def _routed(reading: Reading, loaded: Loaded, rule: Any, kind: str) -> dict[Line, list[Outcome]]:
    """The rule with one episode, always with two, and as a :class:`Router` with its defaults does."""
    routers = {rule: Router(rule, top=1), f"{rule}, two": Router(rule, margin=BOTH), f"{rule}, default": Router(rule)}
    lines: dict[Line, list[Outcome]] = {(name, kind): [] for name in routers}
    labels = torch.from_numpy(loaded.group.labels)
    for q, query in enumerate(reading.queries[kind]):
        v = np.array(routers[rule].route(query, reading.vectors, labels, loaded.group.centroids).scores)
        for name, router in routers.items():
            route = router.choose(v)
            lines[name, kind].append(loaded.outcome(q, route.episodes, _finite(route.margin)))
    return lines


def _shipped(reading: Reading, loaded: Loaded, kind: str) -> list[Outcome]:
    wide, labels = unit(reading.vectors), loaded.group.labels
    means = np.stack([wide[labels == e].mean(axis=0) for e in range(loaded.group.count)])
    scores = unit(reading.queries[kind]) @ means.T  # [Q, E]
    routes = [Router(top=1).choose(v) for v in scores]
    return [loaded.outcome(q, r.episodes, _finite(r.margin)) for q, r in enumerate(routes)]


def _retrieved(reading: Reading, queries: Tensor, k: int) -> list[Outcome]:
    """The k windows nearest to the question, whatever their episodes."""
    found = []
    cosines = unit(queries) @ unit(reading.vectors).T
    for question, cos in zip(reading.questions, cosines, strict=True):
        nearest = np.argsort(-cos, kind="stable")[:k]
        held = _held(reading.holds, question.evidence, nearest.tolist())
        found.append(Outcome((), *_shares(held), float(reading.tokens[nearest].sum())))
    return found


def _dealt(reading: Reading, group: Grouping, seed: int) -> Grouping:
    """The same sizes, the windows dealt anew. Routes are taken in the true grouping: within a shuffled one the nearest
    window would still find itself."""
    return grouping(reading, np.random.default_rng(seed).permutation(group.labels))


def _finite(margin: float) -> float | None:
    return margin if np.isfinite(margin) else None


def columns(outcomes: Iterable[Outcome]) -> dict[str, list[Any]]:
    """What a record holds of a line: numbers alone, rounded to 5 places."""
    outcomes = list(outcomes)
    found: dict[str, list[Any]] = {"episodes": [list(o.episodes) for o in outcomes]}
    for name in MEASURES:
        values = [getattr(o, name) for o in outcomes]
        if any(v is not None for v in values):
            found[name] = [v if v is None else round(v, 5) for v in values]
    return found
