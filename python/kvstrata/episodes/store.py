"""A conversation's tokens in a cache: read in chunks, compacted by what prompts attend to, shown by episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstrata.budget import Budget
from kvstrata.cache import Cache
from kvstrata.config import SLOTS
from kvstrata.episodes.limits import Sizes
from kvstrata.episodes.model import ChatModel
from kvstrata.episodes.places import Places, parts_of
from kvstrata.spans import SpanStep
from kvstrata.step import Step

LEAD = 16
"""Tokens before a piece of text that is said once more: what a word means there hangs on them."""


@dataclass(frozen=True)
class Mark:
    """Where a store stood: what :meth:`EpisodeStore.back` returns to."""

    length: int
    compactions: int


class EpisodeStore:
    """Keys and values of one conversation, in a cache whose Near bytes never pass ``sizes.limit_bytes`` for it and each fork.

    model: reads the tokens; sizes: what may be held; prompts: asked at every compaction, gives the prompts of the episodes,
    ids i64 [at most W] each, or, under ``sizes.prompts`` "reconstruct", :class:`Places`.

    Pending tokens are those that no compaction has given to a set: all until the first one, which comes before more than
    ``sizes.whole`` are, then before more than r + C + 16 are.

    "reconstruct": the prompt is the text of the pending tokens once more, in pieces of at most W that begin LEAD tokens before
    what is new in them, as what is said again attends to what it has to find (KVzip, arXiv 2505.23416). A token is scored while
    it is pending, by the most that any query of the pending text sees of it, and keeps that score. Its episode is that of its
    window, of a token in no window that of the one before. All layers are planned behind the pass, so that they can share one
    budget. Deviations: KVzip repeats a context behind an instruction once all of it is read, and cuts it then; here pieces are
    repeated as they come, without an instruction, and the cache stays small.
    """

    _view: tuple[tuple[int, ...], bool] | None  # sets that are shown, whether by halves; None: all

    def __init__(self, model: ChatModel, sizes: Sizes, prompts: Callable[[], Sequence[Tensor] | Places]) -> None:
        self._model = model
        self.sizes = sizes
        self._prompts = prompts
        limit = sizes.limit_bytes(model.shape)
        far = "auto" if sizes.far else None
        # Each fork has as much. An answer of up to a chunk can be taken back from sliding windows, too.
        budget = Budget.bytes(limit // sizes.caches, per="sequence")
        self.cache = Cache(model.shape, budget, sizes.policy(), far=far, hold=sizes.chunk)
        (self._seq,) = self.cache.new()
        self._begin()

    def _begin(self) -> None:
        self._planned = 0  # tokens before this one are in a set, or evicted
        self._text = torch.empty(0, dtype=torch.int64)  # ids of pending tokens, and of LEAD before them
        self.compactions = 0
        self.episodes = 0
        self.show(None)

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.cache.logical_length(self._seq)

    @property
    def stored(self) -> int:
        """Slots of all rows."""
        layers = enumerate(self.cache.shape.layers)
        return sum(self.cache.stored_length(i, self._seq, h) for i, spec in layers for h in range(spec.kv_heads))

    @property
    def pending(self) -> int:
        """Tokens that no compaction has seen."""
        return self.length - self._planned

    @property
    def room(self) -> int:
        """Tokens that may come before the next compaction."""
        s = self.sizes
        return (s.recent + s.chunk + SLOTS if self._cut else s.whole) - self.pending

    @property
    def _cut(self) -> bool:
        """Whether a compaction came."""
        return self.compactions > 0

    # --- reading ----------------------------------------------------------------------------------------------------------

    def read(self, ids: Tensor, logits: bool = False) -> Tensor | None:
        """Feeds ids i64 [T]; returns the last one's logits f32 [V] where they are asked for.

        A chunk after which there is no room for the next is compacted in the same pass. An error leaves the tokens of the
        chunks before. ValueError for more tokens than the model has positions for.
        """
        self.check(len(ids))
        out: Tensor | None = None
        chunk = self.sizes.chunk
        for first in range(0, len(ids), chunk):
            part, rest = ids[first : first + chunk], len(ids) - first - chunk
            if len(part) > self.room:
                self._compact(ids[:0])
            due = rest > 0 and len(part) + min(chunk, rest) > self.room
            if due:
                self._compact(part)
            else:
                out = self._feed(part, logits and rest <= 0)
        return out

    def check(self, tokens: int) -> None:
        """ValueError where so many more tokens, with the prompts of a compaction that may come behind any of them, pass the
        model's last position."""
        prompt = self.sizes.prompt
        more = max(tokens + (prompt if tokens > self.room else 0), prompt)
        if self.length + more > self._model.max_positions:
            raise ValueError(
                f"conversation: {self.length} tokens seen and {more} more, expected at most the"
                f" {self._model.max_positions} positions of the model"
            )

    def make_room(self, tokens: int) -> None:
        """Compacts where so many tokens, or a chunk if they are more, would not fit."""
        if min(tokens, self.sizes.chunk) > self.room:
            self._compact(torch.empty(0, dtype=torch.int64))

    def compact(self) -> None:
        """Scores all that is stored by the episodes' prompts, and keeps the best: one pass of the prompts alone."""
        self._compact(torch.empty(0, dtype=torch.int64))

    def _feed(self, ids: Tensor, logits: bool) -> Tensor | None:
        fed: Step | SpanStep = self.cache.step([self._seq], [len(ids)])
        if self._view is None and self._cut:  # every layer shows its sets while it is read, and no longer
            fed = self.cache.read(self._seq, len(ids), [], compact=False)
        try:
            with fed as step:
                out = self._model.forward(ids, step.positions, step, "last" if logits else "none")
        except BaseException:
            self._view = self._shown()  # where a set did not come, the one before
            raise
        self._text = torch.cat([self._text, ids])
        return out

    def _compact(self, ids: Tensor) -> None:
        found = self._prompts()
        if isinstance(found, Places):
            self._regroup(ids, found)
            return
        prompts = list(found)
        if not 1 <= len(prompts) <= self.sizes.episodes or max(map(len, prompts)) > self.sizes.prompt:
            raise ValueError(
                f"prompts: {len(prompts)} of {[len(p) for p in prompts]} tokens, expected 1 to {self.sizes.episodes} of at most"
                f" {self.sizes.prompt}"
            )
        self._guided(ids, prompts)

    def _guided(self, ids: Tensor, prompts: list[Tensor]) -> None:
        """Feeds ids, and scores by prompts behind them what each layer keeps."""
        with self.cache.read(self._seq, len(ids), [len(p) for p in prompts]) as step:
            self._model.forward(torch.cat([ids, *prompts]), step.positions, step, "none")
        self._text = torch.cat([self._text, ids])
        self._compacted(len(prompts))

    def _compacted(self, episodes: int) -> None:
        self._planned = max(self._planned, self._settled(self.length))
        self._text = self._text[max(0, len(self._text) - self.pending - LEAD) :]
        self.compactions += 1
        self.episodes = episodes

    def _settled(self, length: int) -> int:
        """Tokens that are not pending after a compaction at so many."""
        return max(0, length - self.sizes.recent) // SLOTS * SLOTS

    def _regroup(self, ids: Tensor, places: Places) -> None:
        """Scores pending tokens by their own text, then plans all layers, none of which shows a set meanwhile."""
        if self.sizes.prompts != "reconstruct" or not 1 <= places.count <= self.sizes.episodes:
            raise ValueError(
                f"prompts: places of {places.count} episodes, expected 1 to {self.sizes.episodes} and sizes of 'reconstruct'"
            )
        text, first = torch.cat([self._text, ids]), len(self._text) - self.pending
        again = range(first, first + max(0, self._settled(self.length + len(ids)) - self._planned))
        passes = parts_of(again, self.sizes.chunk) or [again]  # the last one alone holds tokens that are yet to be read
        view = self._view
        self.show(None)
        try:
            for part in passes[:-1]:
                self._say_again(ids[:0], text, part)
            self._say_again(ids, text, passes[-1])
            self.cache.regroup(self._seq, places.of(self.length), places.count)
            self._compacted(places.count)
        finally:
            self.show(None if view is None else [e - 1 for e in view[0]])

    def _say_again(self, ids: Tensor, text: Tensor, part: range) -> None:
        """Feeds ids, and scores pending tokens by a part of the text, each piece with what stands before it."""
        lead = min(LEAD, self.sizes.prompt // 2)
        pieces = [text[max(0, p.start - lead) : p.stop] for p in parts_of(part, self.sizes.prompt - lead)]
        if not len(ids) and not pieces:
            return
        spans = [len(piece) for piece in pieces]
        with self.cache.read(self._seq, len(ids), spans, compact=False, score=self._planned) as step:
            self._model.forward(torch.cat([ids, *pieces]), step.positions, step, "none")
        self._text = torch.cat([self._text, ids])

    # --- asking -----------------------------------------------------------------------------------------------------------

    def show(self, episodes: Sequence[int] | None, *, ahead: bool = False) -> None:
        """What the next tokens see beside backbone and pending tokens: the sets of these episodes, numbered from 0, of two the
        better halves; None: all. ahead: as :meth:`kvstrata.Cache.view`."""
        view = None if episodes is None else (tuple(e + 1 for e in episodes), len(episodes) > 1)
        sets, halves = view or ((), False)  # all of them are Near in the layer in work alone
        self.cache.view(self._seq, sets, halves=halves, ahead=ahead)
        self._view = view

    def _shown(self) -> tuple[tuple[int, ...], bool] | None:
        """The cache's view, as :attr:`_view`."""
        _, sets, halves = self.cache._store.view(self._seq.id)
        return (tuple(sets), halves) if sets else None

    @property
    def moved_bytes(self) -> int:
        """Between Near and Far memory, so far."""
        return self.cache.moved_bytes

    def mark(self) -> Mark:
        """Where the conversation stands."""
        return Mark(self.length, self.compactions)

    def back(self, mark: Mark) -> None:
        """Takes back the tokens since. ValueError where a compaction has come between."""
        if mark.compactions != self.compactions:
            raise ValueError("back: a compaction came since, which nothing takes back")
        self._crop(mark.length)

    def _crop(self, length: int) -> None:
        kept = len(self._text) - (self.length - length)
        self.cache.crop([self._seq], [length])
        self._text = self._text[:kept]

    def fork(self, prompts: Callable[[], Sequence[Tensor] | Places]) -> EpisodeStore:
        """Another one that goes on from here in the same cache, with prompts of its own; BudgetExceeded without room for its
        tables. The cache's limit is ``sizes.limit_bytes`` for each of them."""
        twin = copy(self)
        twin._prompts = prompts
        (twin._seq,) = self.cache.fork(self._seq)
        return twin

    def clear(self) -> None:
        """Forgets every token."""
        self.cache.clear([self._seq])
        self._begin()

    def close(self) -> None:
        """Gives all memory back."""
        self.cache.free([self._seq])
        self.cache.trim()

    def slots(self, episodes: int) -> list[int]:
        """Slots of each private set, all rows together."""
        found = [0] * episodes
        for layer, spec in enumerate(self.cache.shape.layers):
            for head in range(spec.kv_heads):
                for tag, n in self.cache.sets(layer, self._seq, head):
                    if 0 < tag <= episodes:
                        found[tag - 1] += n
        return found
