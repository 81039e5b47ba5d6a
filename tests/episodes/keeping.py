"""Conversations to be saved, what they are, and what they answer: shared by the tests of saved ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from plain import PlainChat
from topics import TOPICS, CountedWords, talk

from kvstrata.episodes.conversation import Conversation

HERE = Path(__file__).parent
QUESTIONS = [f"What of the {word}?" for words in TOPICS.values() for word in words.split()[:4]]


def made(layers: int = 4, **options: Any) -> Conversation:
    options = {"chunk": 128, "prompt_tokens": 32, "embedder": CountedWords()} | options
    return Conversation(PlainChat(layers), options.pop("budget", "256tok"), **options)


def loaded(path: Path, layers: int = 4, **options: Any) -> Conversation:
    options = {"embedder": CountedWords()} | options
    return Conversation.load(path, PlainChat(layers), **options)


def full(turns: int = 150, layers: int = 4, **options: Any) -> Conversation:
    """After compactions, a routed question, and turns that are not read yet."""
    chat = made(layers, **options)
    chat.add(talk(turns, seed=1))
    chat.build()
    chat.ask("Which harbour did the boat and its captain reach?", max_new_tokens=4)
    chat.add(talk(3, seed=2))
    return chat


def content(chat: Conversation) -> list[Any]:
    """Tables and bytes of all rows, and all else that answers depend on."""
    cache, seq, out = chat._store.cache, chat._store._seq, []
    for layer, spec in enumerate(cache.shape.layers):
        out.append([t.view(torch.uint8).numpy().tobytes() for t in cache.materialize(layer, seq)])
        for head in range(spec.kv_heads):
            _, alive, hidden, sealed = cache._store.row(seq.id, layer, head)
            tags, aside, _ = cache._store.row_sets(seq.id, layer, head)
            out.append([alive, hidden, sealed, tags, aside, cache._store.centre(seq.id, layer, head)])
    history, store = chat._history, chat._store
    topics = history.topics
    out.append([history.turns, history.windows, history.left, history.clustered, [p.tolist() for p in history.prompts]])
    if topics is not None and history.vectors is not None:
        out.append([topics.labels.tolist(), topics.tau, topics.strays, topics.refused, topics.zeros])
        out.append([history.vectors.numpy().tobytes(), topics.totals.tobytes(), topics.held.tobytes()])
    out.append([chat._queue.tolist(), chat._begun, chat._turned, chat._sizes])
    out.append([store.length, store.pending, store.compactions, store.episodes, store._view])
    out.append([cache.crop_floor(seq), cache._store.view(seq.id)])
    return out


def entries(chat: Conversation) -> int:
    """Pages of all rows."""
    cache, seq = chat._store.cache, chat._store._seq.id
    places = [(layer, h) for layer, spec in enumerate(cache.shape.layers) for h in range(spec.kv_heads)]
    return sum(len(cache._store.row(seq, *place)[0]) for place in places)


def answers(chat: Conversation) -> list[Any]:
    found = []
    for i, question in enumerate(QUESTIONS):
        answer = chat.ask(question, max_new_tokens=6, remember=i % 3 > 0)
        route = answer.route
        found.append([list(answer.ids), None if route is None else [list(route.episodes), list(route.scores)]])
    return found


def elsewhere(script: str, path: Path, **options: Any) -> subprocess.Popen[str]:
    """The script in a fresh process."""
    folders_ = (HERE, HERE.parent / "store")  # kvstrata is where it is for this process: installed, or on PYTHONPATH
    command = [sys.executable, "-c", script, str(path), *map(str, folders_)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
