"""What a conversation holds: its topics, and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvstrata.episodes.answer import ConversationReport, Episode

if TYPE_CHECKING:
    from kvstrata.episodes.conversation import Conversation


def episodes(chat: Conversation) -> tuple[Episode, ...]:
    """The topics of the last compaction."""
    history = chat._history
    if history.topics is None:
        return ()
    slots = chat._store.slots(len(history.prompts))
    counts = torch.bincount(history.topics.labels.long(), minlength=len(slots)).tolist()
    about = zip(history.labels(), counts, history.prompts, slots, strict=True)
    return tuple(Episode(label, n, len(prompt), held) for label, n, prompt, held in about)


def report(chat: Conversation) -> ConversationReport:
    """What is held now."""
    store, sizes, history, turned = chat._store, chat._sizes, chat._history, chat._turned
    held, topics = store.cache.report(), history.topics
    assert held.limit_bytes is not None
    return ConversationReport(
        near=held.nbytes,
        far=held.far_bytes,
        moved=store.moved_bytes,
        found=store.cache._store.fetched(),
        peak=held.peak_bytes,
        limit=held.limit_bytes,
        full=store.length * chat._model.shape.token_bytes(),
        separate=store.episodes * sizes.budget * chat._model.shape.token_bytes(),
        turns=len(history.turns),
        tokens=store.length,
        stored=store.stored,
        pending=store.pending,
        unread=len(chat._queue),
        budget=sizes.budget,
        chunk=sizes.chunk,
        whole=sizes.whole,
        compactions=store.compactions,
        questions=turned.questions,
        switches=turned.switches,
        uncertain=turned.uncertain,
        embedder=type(chat._embedder).__name__,
        episodes=episodes(chat),
        strays=len(topics.strays) if topics else 0,
        zeros=topics.zeros if topics else 0,
        advice=history.advice(turned),
        file=chat._kept.nbytes,
        forks=len(held.logical_tokens) // sizes.caches - 1,
    )
