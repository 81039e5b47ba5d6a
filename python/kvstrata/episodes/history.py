"""The text of a conversation: turns, windows and their vectors, topics, and the prompts that stand for them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from typing import Literal

import torch
from torch import Tensor

from kvstrata.episodes.cluster import cluster
from kvstrata.episodes.embed import Embedder
from kvstrata.episodes.places import Places
from kvstrata.episodes.represent import fit, represent
from kvstrata.episodes.route import LATELY, Route, Router, Turned
from kvstrata.episodes.segment import Turn, Utterance, Window, line, utterances
from kvstrata.episodes.topics import Topics

LABEL = 3
"""Words of an episode's label."""
UNCERTAIN = 0.2
"""Of the last questions, the share that no window was like from which new topics are advised."""


@dataclass(frozen=True)
class Segments:
    """How a conversation is cut and grouped (:func:`segment`, :func:`cluster`, :func:`represent`, :class:`Topics`).

    window: utterances; bounded: no window crosses the border of two calls of ``add``; episodes: at a clustering;
    representatives: windows of a prompt, which begins with ``instruction``.
    """

    window: int = 4
    bounded: bool = False
    dates: bool = False
    captions: bool = False
    episodes: int = 4
    max_episodes: int = 8
    seed: int = 42
    n_init: int = 10
    representatives: int = 4
    pick: Literal["coverage", "closest"] = "coverage"
    instruction: str = ""
    tau: float | Literal["auto"] = "auto"
    open_after: int = 2

    def __post_init__(self) -> None:
        for name in ("window", "episodes", "representatives", "open_after", "n_init"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.max_episodes < self.episodes:
            raise ValueError(f"max_episodes is {self.max_episodes}, expected at least the {self.episodes} episodes")


@dataclass(frozen=True, eq=False)
class History:
    """What was said. Never changed: each step gives a new one, and a failed one leaves the old.

    windows: closed ones; left: utterances that are in none yet; vectors: f32 [windows embedded, d], from the first on; topics:
    None before the first clustering; prompts: ids of each episode's; clustered: windows at the last clustering; added, asked:
    characters of turns that were added, and of questions and answers; spots: of each turn its first token and the one after its
    last, where they were given.
    """

    turns: tuple[Turn, ...] = ()
    spots: tuple[tuple[int, int], ...] = ()
    windows: tuple[Window, ...] = ()
    left: tuple[Utterance, ...] = ()
    vectors: Tensor | None = None
    topics: Topics | None = None
    prompts: tuple[Tensor, ...] = ()
    clustered: int = 0
    added: int = 0
    asked: int = 0

    @property
    def whole(self) -> bool:
        """Whether the text of every window is known."""
        return all(window.text for window in self.windows)

    def forgotten(self) -> History:
        """Without turns, and without the text of the windows, which stay in their topics."""
        windows = tuple(Window((), "", w.start) for w in self.windows)
        return replace(self, turns=(), spots=(), windows=windows, left=())

    # --- turns ------------------------------------------------------------------------------------------------------------

    def said(self, turns: Sequence[Turn], how: Segments, offsets: Tensor | None = None) -> History:
        """With more turns, and the windows that they fill. offsets: i64 [n + 1], the first token of each, and the end."""
        return replace(self, added=self.added + _length(turns))._told(turns, how, offsets)

    def answered(self, turns: Sequence[Turn], how: Segments, offsets: Tensor | None = None) -> History:
        """With a question and its answer.

        Questions are more like each other than like what they are about: their windows would be a topic of their own, found
        episodes, move centroids, and draw later questions away from what holds the answer. So they are in no window; they
        belong to the episode that they were routed to. Not so where they are most of the talk, by characters, as in a chat
        to which nothing was added: there they are told as any turn is.
        """
        grown = replace(self, asked=self.asked + _length(turns))
        if grown.asked > grown.added:
            return grown._told(turns, how, offsets)
        return replace(grown, turns=(*self.turns, *turns), spots=(*self.spots, *_spots(turns, offsets)))

    def _told(self, turns: Sequence[Turn], how: Segments, offsets: Tensor | None) -> History:
        known = len(self.turns)
        fresh = [replace(u, turn=u.turn + known) for u in utterances(turns)]
        grown = replace(self, turns=(*self.turns, *turns), spots=(*self.spots, *_spots(turns, offsets)))
        if how.bounded:
            grown = grown.closed(how)
        return grown._filled(fresh, how)

    def _filled(self, more: Sequence[Utterance], how: Segments) -> History:
        windows, left = list(self.windows), [*self.left, *more]
        while len(left) >= how.window:
            windows.append(self._window(left[: how.window], how))
            left = left[how.window :]
        return replace(self, windows=tuple(windows), left=tuple(left))

    def _recut(self, how: Segments) -> History:
        """With full windows, where one was closed before it was."""
        if how.bounded:
            return self
        every = [u for window in self.windows for u in window.utterances]
        return replace(self, windows=(), left=())._filled([*every, *self.left], how)

    def closed(self, how: Segments) -> History:
        """The utterances that are in no window are one, shorter than the others."""
        if not self.left:
            return self
        return replace(self, windows=(*self.windows, self._window(self.left, how)), left=())

    def _window(self, part: Sequence[Utterance], how: Segments) -> Window:
        lines = (line(self.turns[u.turn], u, dates=how.dates, captions=how.captions) for u in part)
        first, last = self.spots[part[0].turn] if self.spots else (0, 0)
        start = first + (last - first) * part[0].start // max(1, len(self.turns[part[0].turn].text))
        return Window(tuple(part), "\n".join(lines), start)

    def untold(self) -> History:
        """Before any topic."""
        return replace(self, vectors=None, topics=None, prompts=(), clustered=0)

    def respotted(self, offsets: Tensor, how: Segments) -> History:
        """With the tokens of all turns elsewhere: i64 [n + 1]."""
        moved = replace(self, spots=tuple(pairwise(offsets.tolist())))
        return replace(moved, windows=tuple(moved._window(w.utterances, how) for w in self.windows))

    # --- topics -----------------------------------------------------------------------------------------------------------

    def grouped(self, how: Segments, embedder: Embedder, encode: Callable[[str], Tensor], prompt: int) -> History:
        """All windows cut and clustered anew, with a prompt for each topic. ValueError without a turn."""
        if not self.whole:
            raise ValueError("conversation: its text was not kept, expected topics to stay as they are")
        whole = self._recut(how).closed(how)
        if not whole.windows:
            raise ValueError("conversation: nothing was said yet, expected a turn to tell topics from")
        texts = [w.text for w in whole.windows]
        if (fitted := getattr(embedder, "fit", None)) is not None:
            fitted(texts)
        vectors = embedder.embed(texts, "window")
        clusters = cluster(vectors, how.episodes, seed=how.seed, n_init=how.n_init)
        topics = Topics.of(vectors, clusters, tau=how.tau, open_after=how.open_after, max_episodes=how.max_episodes)
        found = replace(whole, vectors=vectors, topics=topics, clustered=len(texts), prompts=())
        return found._prompted(how, encode, prompt)

    def placed(self, how: Segments, embedder: Embedder, encode: Callable[[str], Tensor], prompt: int) -> History:
        """Windows that came since the clustering join a topic, or found one."""
        if self.topics is None or self.vectors is None or len(self.vectors) == len(self.windows):
            return self
        fresh = embedder.embed([w.text for w in self.windows[len(self.vectors) :]], "window")
        topics = self.topics
        for vector in fresh:
            topics, _ = topics.assign(vector)
        found = replace(self, vectors=torch.cat([self.vectors, fresh]), topics=topics)
        return found._prompted(how, encode, prompt)

    def _prompted(self, how: Segments, encode: Callable[[str], Tensor], prompt: int) -> History:
        """With prompts for the episodes that have none."""
        assert self.topics is not None and self.vectors is not None
        if len(self.prompts) == len(self.topics.centroids):
            return self
        picked = represent(self.vectors, self.topics.labels, self.topics.centroids, how.representatives, how.pick)[
            len(self.prompts) :
        ]
        texts = [w.text for w in self.windows]
        known = ([w for w in windows if texts[w]] or [len(texts) - 1] for windows in picked)  # the last one founded it
        prompts = (fit(texts, windows, encode, prompt, how.instruction) for windows in known)
        return replace(self, prompts=(*self.prompts, *prompts))

    def places(self) -> Places:
        """Which episode each token is of, once topics were told apart."""
        assert self.topics is not None
        starts = [w.start for w in self.windows[: len(self.topics.labels)]]
        return Places(torch.tensor(starts), self.topics.labels, len(self.topics.centroids))

    # --- questions --------------------------------------------------------------------------------------------------------

    def route(
        self, question: str, how: Segments, router: Router, embedder: Embedder, last: Route | None
    ) -> Route | None:
        """Where a question goes; None before the first clustering. What is in no window yet counts as one for now."""
        if self.topics is None or self.vectors is None:
            return None
        vectors, labels = self.vectors, self.topics.labels
        if self.left:
            open_ = embedder.embed([self._window(self.left, how).text], "window")
            seen, _ = self.topics.assign(open_[0])
            if len(seen.centroids) == len(self.topics.centroids):  # what would found an episode has no set yet
                vectors, labels = torch.cat([vectors, open_]), seen.labels
        query = embedder.embed([question], "query")[0]
        return router.route(query, vectors, labels, self.topics.centroids, last)

    def advice(self, turned: Turned) -> str | None:
        """A refresh that would pay, and why; None: none would, or the text is gone."""
        if self.topics is None or not self.whole:
            return None
        if len(self.windows) >= 2 * self.clustered:
            return "refresh: there are twice as many windows as when topics were told apart"
        if self.topics.refused:
            return "refresh: a new topic found no place, max_episodes are there"
        if len(turned.lately) == LATELY and turned.uncertain > UNCERTAIN:
            return f"refresh: of the last {LATELY} questions, {sum(turned.lately)} were like no window"
        return None

    def labels(self) -> tuple[str, ...]:
        """Of each episode the words that tell it from the others: by times said, weighed by how much more often than in all."""
        if self.topics is None:
            return ()
        names = {turn.speaker.lower() for turn in self.turns}
        said = [Counter[str]() for _ in range(len(self.topics.centroids))]
        for window, e in zip(self.windows, self.topics.labels.tolist(), strict=False):
            said[e].update(word for word in re.findall(r"[^\W\d_]{3,}", window.text.lower()) if word not in names)
        whole: Counter[str] = sum(said, Counter())

        def best(words: Counter[str]) -> str:
            share = words.total() / whole.total() if whole else 1.0
            weight = {w: n * log(n / (whole[w] * share)) for w, n in words.items()}
            return ", ".join(sorted(words, key=lambda w: (-weight[w], -words[w], w))[:LABEL])

        return tuple(best(words) for words in said)


def _spots(turns: Sequence[Turn], offsets: Tensor | None) -> list[tuple[int, int]]:
    return list(pairwise([0] * (len(turns) + 1) if offsets is None else offsets.tolist()))


def _length(turns: Sequence[Turn]) -> int:
    """Characters."""
    return sum(len(turn.text) for turn in turns)
