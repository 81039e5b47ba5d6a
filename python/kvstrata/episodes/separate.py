"""One cache for each episode, as EpiCache has them (arXiv 2509.17396): what a shared build is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvstrata.cache import Sequence as Handle
from kvstrata.config import BudgetExceeded
from kvstrata.episodes.limits import Sizes
from kvstrata.episodes.model import ChatModel
from kvstrata.episodes.places import Places
from kvstrata.episodes.store import EpisodeStore


def opened(model: ChatModel, sizes: Sizes, prompts: Callable[[], Sequence[Tensor] | Places]) -> EpisodeStore:
    """An empty store of the build that ``sizes`` names."""
    return (SeparateStore if sizes.build == "separate" else EpisodeStore)(model, sizes, prompts)


@dataclass(frozen=True)
class Stand:
    """A cache that is not in work: its sequence, and where it stands."""

    seq: Handle
    planned: int
    text: Tensor
    cut: bool


class SeparateStore(EpisodeStore):
    """A cache of B tokens for each episode: all read the same tokens, each keeps what the prompt of its own episode attends to.

    ``sizes.build`` is "separate". There is one cache until the first compaction; then, and where a topic comes later, an
    episode's is a fork of the first one's. History is read by all, one after another; a question and its answer by the cache
    that it goes to, and by the others before the next one. compactions: of all caches together.
    """

    def __init__(self, model: ChatModel, sizes: Sizes, prompts: Callable[[], Sequence[Tensor] | Places]) -> None:
        self._at = 0  # the episode whose cache is in work: whose sequence the attributes of EpisodeStore are of
        self._apart: dict[int, Stand] = {}  # the others
        super().__init__(model, sizes, prompts)
        self._spare = [
            seq for _ in range(sizes.caches - 1) for seq in self.cache.new()
        ]  # the limit is that of all at once

    def _begin(self) -> None:
        self._parted = False  # whether the cache in work was compacted
        self._since, self._said = (
            0,
            torch.empty(0, dtype=torch.int64),
        )  # tokens that some cache may lack, from _since on
        super()._begin()

    @property
    def _cut(self) -> bool:
        return self._parted

    @property
    def stored(self) -> int:
        """Slots of all rows of all caches."""
        return sum(self.slots(max(1, self.episodes)))

    # --- one of them ------------------------------------------------------------------------------------------------------

    def _turn(self, episode: int) -> None:
        """The cache of that episode is in work."""
        if episode != self._at:
            self._apart[self._at] = Stand(self._seq, self._planned, self._text, self._parted)
            stand = self._apart.pop(episode)
            self._seq, self._planned, self._text, self._parted = stand.seq, stand.planned, stand.text, stand.cut
            self._at = episode

    def _by_each(self, work: Callable[[], None]) -> None:
        """With each cache in work, from the first one on, which may bring more."""
        at, episode = self._at, 0
        try:
            while episode < max(1, self.episodes):
                self._turn(episode)
                work()
                episode += 1
        finally:
            self._turn(at if at == self._at or at in self._apart else 0)

    def _part(self, episodes: int) -> None:
        """There are so many caches, the new ones forks of the first one, which is in work."""
        for e in range(max(1, self.episodes), episodes):
            (seq,) = self.cache.fork(self._seq)
            self.cache.free([self._spare.pop()])
            self._apart[e] = Stand(seq, self._planned, self._text, self._parted)
            self.episodes = e + 1
        gone = [self._apart.pop(e).seq for e in range(max(1, episodes), self.episodes)]
        self.cache.clear(gone)
        self._spare += gone
        self.episodes = episodes

    # --- reading ----------------------------------------------------------------------------------------------------------

    def read(self, ids: Tensor, logits: bool = False) -> Tensor | None:
        first = self.length
        try:
            out = super().read(ids, logits)
        finally:
            self._said = torch.cat([self._said, ids[: self.length - first]])
        if self._all:
            self._follow()
        return out

    def _follow(self) -> None:
        """All caches read what they lack."""
        self._by_each(self._catch_up)
        self._since, self._said = self.length, self._said[:0]

    def _catch_up(self) -> None:
        if lacking := self._since + len(self._said) - self.length:
            super().read(self._said[-lacking:])

    def make_room(self, tokens: int) -> None:
        self._follow()
        self._by_each(lambda: EpisodeStore.make_room(self, tokens))

    def compact(self) -> None:
        """Each cache by its own episode's prompt: as many passes."""
        self._follow()
        self._by_each(lambda: EpisodeStore.compact(self))

    def _guided(self, ids: Tensor, prompts: list[Tensor]) -> None:
        if self._at == 0:
            self._part(len(prompts))
        super()._guided(ids, [prompts[self._at]])

    def _compacted(self, episodes: int) -> None:
        super()._compacted(self.episodes)
        self._parted = True

    # --- asking -----------------------------------------------------------------------------------------------------------

    def show(self, episodes: Sequence[int] | None, *, ahead: bool = False) -> None:
        """The cache that reads what comes next, of one episode; None: all do. ValueError for two."""
        if episodes is not None and len(episodes) != 1:
            raise ValueError(
                f"show: episodes is {list(episodes)}, expected one: a question reads one of separate caches"
            )
        self._all = episodes is None
        episode = 0 if episodes is None else episodes[0]
        if episode >= self.episodes and episode:
            self._turn(0)
            self._part(episode + 1)
        self._turn(episode)
        super().show([], ahead=ahead)  # there are no sets
        self._catch_up()

    def _crop(self, length: int) -> None:
        self._by_each(lambda: EpisodeStore._crop(self, min(length, self.length)))
        self._since = min(self._since, length)
        self._said = self._said[: length - self._since]

    def fork(self, prompts: Callable[[], Sequence[Tensor] | Places]) -> EpisodeStore:
        every, made = [self._seq, *(s.seq for s in self._apart.values()), *self._spare], list[Handle]()
        try:
            for seq in every:
                made += self.cache.fork(seq)
        except BudgetExceeded:
            self.cache.free(made)
            raise
        twin, seqs = copy(self), iter(made)
        twin._prompts, twin._seq = prompts, next(seqs)
        twin._apart = {e: replace(s, seq=next(seqs)) for e, s in self._apart.items()}
        twin._spare = list(seqs)
        return twin

    def clear(self) -> None:
        self._turn(0)
        self._part(1)
        super().clear()

    def close(self) -> None:
        self.cache.free([*(s.seq for s in self._apart.values()), *self._spare])
        super().close()

    def slots(self, episodes: int) -> list[int]:
        """Slots of each cache, all rows together."""
        seqs = {self._at: self._seq} | {e: s.seq for e, s in self._apart.items()}
        rows = [(i, h) for i, spec in enumerate(self.cache.shape.layers) for h in range(spec.kv_heads)]
        return [
            sum(self.cache.stored_length(i, seqs[e], h) for i, h in rows) if e in seqs else 0 for e in range(episodes)
        ]
