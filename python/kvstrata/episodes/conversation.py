"""``Conversation``: a chat of any length over a cache of fixed size (EpiCache, arXiv 2509.17396)."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvstrata.budget import Budget
from kvstrata.config import Unsupported
from kvstrata.episodes import holdings
from kvstrata.episodes.answer import Answer, ConversationReport, Episode, Sampler, Words, greedy
from kvstrata.episodes.embed import Embedder, auto
from kvstrata.episodes.folder import Kept
from kvstrata.episodes.history import History, Segments
from kvstrata.episodes.limits import Sizes, settled, sizes_of
from kvstrata.episodes.model import ChatModel
from kvstrata.episodes.places import Places
from kvstrata.episodes.route import Route, Router, Turned
from kvstrata.episodes.segment import Turn, turns_of
from kvstrata.episodes.separate import opened
from kvstrata.episodes.store import Mark

ASSISTANT, USER = "assistant", "user"
_SIZES = {f.name for f in fields(Sizes)} - {"budget", "chunk", "prompt", "system", "episodes"}
_SEGMENTS = {f.name for f in fields(Segments)}


class Conversation:
    """Add turns, ask, report. Near bytes never pass a limit fixed here.

    model: a :class:`ChatModel` (:func:`kvstrata.hf.chat_model`); budget: bytes, which hold everything, or tokens of a row that
    one question sees; chunk, prompt_tokens: C and W (None: as :func:`sizes_of`); embedder: "auto" (:func:`auto`) or an
    :class:`Embedder`; router: a :class:`Router` (None: Router(), of separate caches with top=1); options: the fields of
    :class:`Segments` and, but for ``episodes``, of :class:`Sizes`. What fits (``Sizes.whole``) is kept whole; beyond, all is
    read once, and kept as far as prompts attend to it. One thread at a time. ValueError for sizes that do not work, with the
    least that do; Unsupported: what separate caches (``build="separate"``) have not.
    """

    def __init__(
        self,
        model: ChatModel,
        budget: Budget | str | int,
        *,
        chunk: int | None = None,
        prompt_tokens: int | None = None,
        embedder: Embedder | Literal["auto"] = "auto",
        router: Router | None = None,
        **options: Any,
    ) -> None:
        if unknown := sorted(set(options) - _SIZES - _SEGMENTS):
            raise ValueError(f"Conversation: unknown {unknown}, expected some of {sorted(_SIZES | _SEGMENTS)}")
        self._model = model
        self._how = Segments(**{k: v for k, v in options.items() if k in _SEGMENTS})
        opening, offsets = model.tokens([], first=True, answer=False)
        parsed = Budget.parse(budget)
        if parsed is None:
            raise ValueError("Conversation: budget is None, expected bytes or tokens")
        sizes = settled({k: v for k, v in options.items() if k in _SIZES})
        self._sizes = sizes_of(
            parsed,
            model.shape,
            chunk=chunk,
            prompt=prompt_tokens,
            system=int(offsets[0]),
            episodes=self._how.max_episodes,
            **sizes,
        )
        self._embedder = auto(model.embeddings, model.plain) if embedder == "auto" else embedder
        top = 2 if self._sizes.build == "shared" else 1
        self._router = Router(top=top) if router is None else router
        if getattr(self._router, "top", top) > top:
            raise Unsupported(
                "router.top is 2 with build 'separate', expected 1: a question reads one of separate caches"
            )
        self._history = History()
        self._store = opened(model, self._sizes, self._prompts)
        self._queue = opening[:0]  # ids that were said and are not read yet
        self._begun = False  # the opening was written
        self._turned = Turned()
        self._busy = False
        self._closed = False
        self._kept = Kept()

    # --- saying -----------------------------------------------------------------------------------------------------------

    def add(self, turns: Iterable[Turn | Sequence[str] | Mapping[str, Any]]) -> None:
        """More turns: :class:`Turn`, (speaker, text) or mappings. They are read at :meth:`build`, or with the next question.

        ValueError names a turn that is blank or has unknown keys, and for more tokens than the model has positions; then
        nothing is added.
        """
        self._check()
        given = turns_of(turns)
        if not given:
            return
        ids, offsets = self._model.tokens(given, first=not self._begun, answer=False)
        self._store.check(len(self._queue) + len(ids))
        self._history = self._history.said(given, self._how, offsets + self._store.length + len(self._queue))
        self._say(ids)

    def repeat(self, other: Conversation) -> None:
        """All that was said in another conversation, to be read as by :meth:`add`; what was asked there makes no topic here
        either. It is saved where that one was, in its place. ValueError where this one has begun, where the text of the other
        was not kept, and as :meth:`add`."""
        self._check()
        if self._begun or not other._history.whole:
            raise ValueError("repeat: expected a conversation without a turn, and one whose text was kept")
        ids, offsets = self._model.tokens(other.turns, first=True, answer=False)
        self._store.check(len(ids))
        self._history, kept = other._history.untold().respotted(offsets, self._how), other._kept
        self._kept = replace(kept, damaged=kept.manifests[-1] if kept.manifests else "")  # no page is one of its files'
        self._say(ids)

    def _say(self, ids: Tensor) -> None:
        self._queue = torch.cat([self._queue, ids])
        self._begun = True

    def build(self) -> None:
        """Reads what was added: once, in chunks. An error leaves the rest to be read."""
        self._check()
        self._read()

    def _read(self) -> None:
        if not len(self._queue):
            return
        self._store.check(len(self._queue))
        self._place()
        if len(self._queue) > self._sizes.chunk:
            self._store.show(None)  # history is read over all that is stored
        before = self._store.length
        try:
            self._store.read(self._queue)
        finally:
            self._queue = self._queue[self._store.length - before :]
            self._store.show(self._turned.episodes)

    def _place(self) -> None:
        self._history = self._history.placed(self._how, self._embedder, self._model.plain, self._sizes.prompt)

    def _prompts(self) -> Sequence[Tensor] | Places:
        """Of the present topics, which are told apart when first asked for."""
        if self._history.topics is None:
            self._history = self._grouped()
        return self._history.places() if self._sizes.prompts == "reconstruct" else self._history.prompts

    def _grouped(self) -> History:
        """With new topics; the embedder stays as it was where that fails."""
        fitted = getattr(self._embedder, "fitted", None)
        try:
            return self._history.grouped(self._how, self._embedder, self._model.plain, self._sizes.prompt)
        except BaseException:
            if fitted is not None:
                self._embedder.fitted = fitted  # type: ignore[attr-defined]
            raise

    # --- asking -----------------------------------------------------------------------------------------------------------

    def ask(
        self, question: str, *, max_new_tokens: int = 256, remember: bool = True, sampler: Sampler = greedy
    ) -> Answer:
        """Answers a question under the episodes that it is routed to.

        remember: question and answer become turns, of no window unless they are most of the talk (:meth:`History.answered`);
        without, they leave no trace but a compaction that made room for them.
        sampler: the next token's id from logits f32 [V]. ValueError for a blank question, where it and max_new_tokens are
        more than the model has positions for, and, if they are to be taken back or the style is "transcript", than a chunk. An
        error takes back what was asked, unless a compaction came while it was answered.
        """
        stream = self._answered(question, max_new_tokens, remember, sampler)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                answer: Answer = end.value
                return answer

    def stream(
        self, question: str, *, max_new_tokens: int = 256, remember: bool = True, sampler: Sampler = greedy
    ) -> Generator[str, None, Answer]:
        """The answer of :meth:`ask` in pieces of text, as they come; returns it. Closed early, the words so far are the answer.

        RuntimeError for another call of this conversation before it ends.
        """
        return (yield from self._answered(question, max_new_tokens, remember, sampler))

    def _answered(self, question: str, most: int, remember: bool, sampler: Sampler) -> Generator[str, None, Answer]:
        self._check()
        began, moved = time.perf_counter(), self._store.moved_bytes
        asked = Turn(USER, question)
        ids, _ = self._model.tokens([asked], first=not self._begun, answer=True)
        self._check_room(len(ids), most, remember)
        self._busy = True
        try:
            self._read()
            self._store.make_room(len(ids) + most)
            mark, out, before = self._store.mark(), list[int](), self._turned
            try:
                self._turned = before.to(self._history.route(question, *self._routing))
                self._store.show(self._turned.episodes, ahead=True)
                logits = self._store.read(ids, logits=True)
                done = yield from self._generate(logits, out, most, sampler)
                text = self._keep(asked, ids, out, mark, remember)
            except GeneratorExit:
                self._keep(asked, ids, out, mark, remember)
                raise
            except BaseException:
                self._undo(asked, ids, out, mark, before)
                raise
            seconds, moved = time.perf_counter() - began, self._store.moved_bytes - moved
            return Answer(text, tuple(out), self._turned.route, seconds, moved, done)
        finally:
            self._busy = False

    def _check_room(self, asked: int, most: int, remember: bool) -> None:
        """ValueError where a question of so many tokens and its answer have no place."""
        if most < 1:
            raise ValueError(f"ask: max_new_tokens is {most}, expected at least 1")
        if (not remember or self._model.style == "transcript") and asked + most > self._sizes.chunk:
            what = "that are taken back" if not remember else "in style 'transcript'"
            raise ValueError(
                f"ask: a question of {asked} tokens and {most} more {what}, expected at most the {self._sizes.chunk} of a chunk"
            )
        self._store.check(len(self._queue) + asked + most)

    def _undo(self, asked: Turn, ids: Tensor, out: list[int], mark: Mark, before: Turned) -> None:
        """After an error: the question goes; where a compaction came since, which nothing takes back, what was said stays."""
        if mark.compactions != self._store.compactions:
            self._keep(asked, ids, out, mark, True)
            return
        self._store.back(mark)
        self._turned = before
        self._store.show(before.episodes)

    @property
    def _routing(self) -> tuple[Segments, Router, Embedder, Route | None]:
        return self._how, self._router, self._embedder, self._turned.route

    def _generate(
        self, logits: Tensor | None, out: list[int], most: int, sampler: Sampler
    ) -> Generator[str, None, bool]:
        """Appends ids to ``out``, yields text, all of it in the end; whether the model ended it."""
        words = Words(self._model.text)
        while True:
            assert logits is not None
            token = sampler(logits)
            done = token in self._model.stop_ids
            if not done:
                out.append(token)
            last = done or len(out) == most
            if piece := words.more(out, last):
                yield piece
            if last:
                return done
            logits = self._store.read(torch.tensor([token]), logits=True)

    def _keep(self, asked: Turn, ids: Tensor, out: list[int], mark: Mark, remember: bool) -> str:
        """Question and answer become part of the conversation, or go. An error comes before anything has changed."""
        text = self._model.text(torch.tensor(out, dtype=torch.int64))
        if not remember:
            self._store.back(mark)
            return text
        turns = [asked, Turn(ASSISTANT, text)] if text.strip() else [asked]
        if self._model.style == "transcript":
            told, offsets = self._model.tokens(turns, first=not self._begun, answer=False)
        else:
            offsets = torch.tensor([0, len(ids), len(ids) + len(out)])[: len(turns) + 1]
            told = torch.cat([ids, torch.tensor(out, dtype=torch.int64), self._model.closing])
            told = told[self._store.length - mark.length :]
        history = self._history.answered(turns, self._how, offsets + mark.length)
        if self._model.style == "transcript":
            self._store.back(mark)
        self._say(told)
        self._history = history
        return text

    # --- looking ----------------------------------------------------------------------------------------------------------

    def route(self, question: str) -> Route | None:
        """Where a question would go; None while all is seen. Changes nothing."""
        self._check()
        self._place()
        return self._history.route(question, *self._routing)

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """The topics of the last compaction."""
        return holdings.episodes(self)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All that was said."""
        return self._history.turns

    def report(self) -> ConversationReport:
        """What is held now."""
        return holdings.report(self)

    # --- anew -------------------------------------------------------------------------------------------------------------

    def refresh(self, what: Literal["labels", "rebuild"]) -> None:
        """ "labels": topics are told apart anew, and what is stored is compacted by their prompts; what was evicted stays gone.
        "rebuild": then all the text is read again; after an error the rest of it is, at :meth:`build`. ValueError for anything
        else, and where nothing was said or kept."""
        self._check()
        if what not in ("labels", "rebuild"):
            raise ValueError(f"refresh: {what!r} is unknown, expected 'labels' or 'rebuild'")
        before, fitted = self._history, getattr(self._embedder, "fitted", None)
        self._history = self._grouped()
        if what == "rebuild":
            self._rebuild()
        elif self._store.length:
            try:
                self._store.compact()
            except BaseException:
                self._history = before
                if fitted is not None:
                    self._embedder.fitted = fitted  # type: ignore[attr-defined]
                raise
        self._turned = replace(self._turned, route=None)
        self._store.show(None)

    def _rebuild(self) -> None:
        """Reads all turns into a new store, which takes the place of the old one: both are not held at once."""
        ids, offsets = self._model.tokens(self._history.turns, first=True, answer=False)
        self._store.clear()
        self._queue, self._history = ids, self._history.respotted(offsets, self._how)
        self._turned = replace(self._turned, route=None)
        self._read()

    def fork(self) -> Conversation:
        """Another conversation that goes on from here, in the same memory: what was read is held once until either of them
        compacts, and of each row no more than the open page is copied. Neither sees what becomes of the other.

        Each has a limit of its own: together they hold at most as many limits as there are conversations, which a report shows
        (near, peak, limit, far, moved). It is saved apart from this one; an embedder with a ``fit`` is copied (copy.copy).
        BudgetExceeded where there is no room for its tables.
        """
        self._check()
        twin = copy(self)
        twin._embedder = copy(self._embedder) if hasattr(self._embedder, "fit") else self._embedder
        twin._store = self._store.fork(twin._prompts)
        twin._kept = Kept()
        return twin

    # --- on disk ----------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, keep_text: bool = True) -> int:
        """:func:`kvstrata.episodes.saved.save_conversation`."""
        from kvstrata.episodes.saved import save_conversation

        return save_conversation(self, path, keep_text=keep_text)

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        model: ChatModel,
        *,
        embedder: Embedder | Literal["auto"] = "auto",
        repair: bool = False,
    ) -> Conversation:
        """:func:`kvstrata.episodes.saved.load_conversation`."""
        from kvstrata.episodes.saved import load_conversation

        return load_conversation(path, model, embedder=embedder, repair=repair)

    def close(self) -> None:
        """Gives all memory back. A closed conversation refuses everything."""
        self._closed = True
        self._store.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("conversation: it was closed")
        if self._busy:
            raise RuntimeError("conversation: an answer is still streaming; one call at a time")
