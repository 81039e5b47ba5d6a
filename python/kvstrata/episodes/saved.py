"""A conversation on disk: saved as a whole, by what is new in it, and loaded as it was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from io import FileIO
from itertools import groupby, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from kvstrata import stored
from kvstrata.budget import Budget
from kvstrata.config import BudgetExceeded, MachineError, Unsupported
from kvstrata.episodes.conversation import Conversation
from kvstrata.episodes.embed import Embedder, Fitted
from kvstrata.episodes.folder import FORMAT, MANIFEST, Facts, Folder, Kept
from kvstrata.episodes.history import History, Segments
from kvstrata.episodes.model import ChatModel
from kvstrata.episodes.pages import COLUMNS, PageFiles, Shelf
from kvstrata.episodes.route import Route, Router, Turned
from kvstrata.episodes.segment import Turn, Utterance, Window
from kvstrata.episodes.tensors import TensorFile, parts
from kvstrata.episodes.topics import Topics

BROKEN = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)
"""What reading a file may come to that is whole, but not written by this module."""


# --- saving -----------------------------------------------------------------------------------------------------------------


def save_conversation(chat: Conversation, path: str | os.PathLike[str], *, keep_text: bool = True) -> int:
    """Saves a conversation as a folder, mode 0700; returns the bytes of new files. Pages that the save before holds are not
    written again. A kill at any moment leaves the conversation as it was saved before, or as it is.

    keep_text: with its turns. Without, there is no rebuild and no repair, and what is in no window yet becomes one; token ids
    of prompts and of what is unread stay. ValueError: a folder of other files; a router or a fitted embedder that cannot be
    saved; keep_text where the text is gone. RuntimeError: the folder is open elsewhere, or is another conversation's.
    """
    chat._check()
    if chat._sizes.build == "separate":
        raise Unsupported("save: build is 'separate', expected 'shared': separate caches are measured, not written")
    history = chat._history if keep_text else _forgetting(chat)
    if keep_text and not history.whole:
        raise ValueError("save: keep_text is True, expected False: the text was not kept before")
    fitted = _fitted(chat)
    folder = Folder(path)
    with folder.writing():
        known = _before(folder, chat._kept)
        generation = folder.generation()
        with folder.new() as facts:
            there = {name: file["bytes"] for name, file in known.items()}
            pages = PageFiles(chat._store.cache, chat._store._seq.id, folder, there)
            pages.write(generation, facts)
            if keep_text:
                folder.write(f"turns-{generation}.jsonl", [b"".join(map(_line, history.turns))], facts)
            index = _index(chat, history, fitted) | _tables(pages)
            if (scores := stored.scores_of(chat._store.cache, chat._store._seq.id)) is not None:
                index["scores"] = scores
            folder.write(f"index-{generation}.safetensors", parts(index), facts)
            named = {name: known[name] for name in pages.files if name in known} | facts
            content = _described(chat, history) | {"generation": generation, "files": named}
            digest = folder.prepare(content | {"pages": pages.files, "kinds": pages.kinds})
        chat._kept = chat._kept.to(digest)  # where the switch fails, either is there
        folder.switch()
        chat._kept = replace(chat._kept, nbytes=sum(file["bytes"] for file in named.values()))
        folder.clean(named)
        return sum(int(file["bytes"]) for file in facts.values())


def _before(folder: Folder, kept: Kept) -> Facts:
    """The files of pages that are there. RuntimeError where they are another conversation's."""
    before = folder.manifest()
    if before is None:
        return {}
    if before["sha256"] not in kept.manifests:
        own = kept.manifests[-1] if kept.manifests else "none"
        raise RuntimeError(
            f"{folder.path / MANIFEST}: its sha256 is {before['sha256']}, expected {own}: another conversation was saved"
            " there, or this one by another process"
        )
    return {} if before["sha256"] == kept.damaged else {name: before["files"][name] for name in before["pages"]}


def _forgetting(chat: Conversation) -> History:
    """The history without its text: what needs that is done before."""
    how, encode, prompt = chat._how, chat._model.plain, chat._sizes.prompt
    history = chat._history
    if history.topics is None and history.turns:
        history = history.grouped(how, chat._embedder, encode, prompt)
    return history.closed(how).placed(how, chat._embedder, encode, prompt).forgotten()


def _fitted(chat: Conversation) -> Fitted | None:
    """What the embedder was fitted to."""
    if type(chat._router) is not Router:
        raise ValueError(f"save: router is a {type(chat._router).__name__}, expected a Router")
    fitted = getattr(chat._embedder, "fitted", None)
    if hasattr(chat._embedder, "fit") and not isinstance(fitted, Fitted | None):
        raise ValueError(f"save: {type(chat._embedder).__name__}.fitted is {type(fitted).__name__}, expected Fitted")
    return fitted if isinstance(fitted, Fitted) else None


def _line(turn: Turn) -> bytes:
    said = {key: value for key, value in asdict(turn).items() if value is not None}
    return json.dumps(said).encode() + b"\n"


def _described(chat: Conversation, history: History) -> dict[str, Any]:
    """The manifest but for its files."""
    store, topics, turned = chat._store, history.topics, chat._turned
    return {
        "format": FORMAT,
        **_fingerprints(chat._model),
        "embedder": chat._embedder.fingerprint,
        "settings": {"sizes": asdict(chat._sizes), "segments": asdict(chat._how), "router": asdict(chat._router)},
        "counters": {
            "length": store.length,
            "floor": store.cache.crop_floor(store._seq),
            "planned": store._planned,
            "compactions": store.compactions,
            "episodes": store.episodes,
            "view": store._view,
            "shown": store.cache._store.view(store._seq.id),
            "begun": chat._begun,
            "turned": asdict(turned) | {"route": None if turned.route is None else _route_data(turned.route)},
            "windows": len(history.windows),
            "clustered": history.clustered,
            "characters": [history.added, history.asked],
            "tau": None if topics is None else topics.tau,
            "refused": 0 if topics is None else topics.refused,
        },
    }


def _fingerprints(model: ChatModel) -> dict[str, Any]:
    return {"model": model.fingerprint, "tokenizer": getattr(model, "tokenizer_fingerprint", None)}


def _route_data(route: Route) -> dict[str, Any]:
    return asdict(route) | {"margin": route.margin if math.isfinite(route.margin) else None}


def _index(chat: Conversation, history: History, fitted: Fitted | None) -> dict[str, Tensor]:
    """What is known of the text. Utterances are i64 [n, 4]: window, turn, start, end; in no window yet: window -1."""
    of_windows = ((k, u.turn, u.start, u.end) for k, window in enumerate(history.windows) for u in window.utterances)
    left = ((-1, u.turn, u.start, u.end) for u in history.left)
    found = {
        "queue": chat._queue,
        "utterances": _numbers([*of_windows, *left], 4),
        "text": chat._store._text,
        "starts": torch.tensor([window.start for window in history.windows], dtype=torch.int64),
        "spots": _numbers(history.spots, 2),
        "prompts": torch.cat([chat._queue[:0], *history.prompts]),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in history.prompts], dtype=torch.int64),
    }
    if history.vectors is not None and history.topics is not None:
        found["vectors"] = history.vectors.to(torch.float32)
        found["labels"] = history.topics.labels
        found["strays"] = torch.tensor(history.topics.strays, dtype=torch.int64)
    if fitted is not None:
        found |= {f"fitted.{field.name}": getattr(fitted, field.name) for field in fields(Fitted)}
    return found


def _tables(pages: PageFiles) -> dict[str, Tensor]:
    rows = [(len(row.pools), row.sealed, 2 if row.mean else int(row.frozen)) for row in pages.rows]
    means = [torch.tensor(row.mean, dtype=torch.float32) for row in pages.rows]
    return {"entries": pages.entries(), "rows": _numbers(rows, 3), "means": torch.cat(means)}


def _numbers(found: Sequence[tuple[int, ...]], columns: int) -> Tensor:
    return torch.tensor(found, dtype=torch.int64).view(-1, columns)


# --- loading ----------------------------------------------------------------------------------------------------------------


def load_conversation(
    path: str | os.PathLike[str],
    model: ChatModel,
    *,
    embedder: Embedder | Literal["auto"] = "auto",
    repair: bool = False,
) -> Conversation:
    """The conversation that was saved last in a folder, as it was, under its own limit. Sets that the last question did not
    read stay in their files, and are read, each page by its checksum, when a question is first routed there, or a compaction
    reads all; a damaged one is a RuntimeError then, with file and set. Of all else hashes are checked now.

    model, embedder: those that it had; ValueError with field and both values where they, or the format, are others.
    RuntimeError for a damaged or missing file, with expected and actual; repair: damage to anything but manifest and turns
    is mended: the text is read again, as if added in one call. All is read then, to know.
    """
    folder = Folder(path)
    with folder.reading(), ExitStack() as stack:
        manifest = folder.manifest()
        if manifest is None:
            raise RuntimeError(f"{folder.path / MANIFEST}: it is missing, expected a saved conversation")
        for field, value in _fingerprints(model).items():
            _same(field, manifest.get(field), value)
        saved = Saved(folder, manifest, stack)
        turns, kept = saved.turns(), Kept((manifest["sha256"],), saved.nbytes)
        chat = saved.empty(model, embedder)
        try:
            saved.resume(chat, turns, whole=repair)
        except BaseException as damage:
            chat.close()
            if not repair or turns is None or not isinstance(damage, RuntimeError) or isinstance(damage, MachineError):
                raise
            chat, kept = saved.empty(model, embedder), replace(kept, damaged=manifest["sha256"])
            _reread(chat, turns)
        chat._kept = kept
        return chat


def _same(field: str, expected: object, actual: object) -> None:
    if expected != actual:
        raise ValueError(f"load: {field} is {actual!r}, expected {expected!r}, as it was saved")


def _reread(chat: Conversation, turns: Iterable[Turn]) -> None:
    """All the text anew."""
    try:
        chat.add(turns)
        chat.build()
    except BaseException:
        chat.close()
        raise


class Saved:
    """A saved conversation. Each file is checked as it is first opened, and open as long as ``stack``."""

    def __init__(self, folder: Folder, manifest: Mapping[str, Any], stack: ExitStack) -> None:
        self._folder = folder
        self._manifest = manifest
        self._stack = stack

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(int(file["bytes"]) for file in self._manifest["files"].values())

    def turns(self) -> list[Turn] | None:
        """None where they were not kept."""
        name = self._name("turns")
        if name is None:
            return None
        with self._broken(name):
            return [Turn(**json.loads(line)) for line in self._open(name).read().splitlines()]

    def empty(self, model: ChatModel, embedder: Embedder | Literal["auto"]) -> Conversation:
        """With the settings that were saved, and not a token."""
        with self._broken(MANIFEST):
            sizes, segments = dict(self._manifest["settings"]["sizes"]), dict(self._manifest["settings"]["segments"])
            router, system, episodes = self._manifest["settings"]["router"], sizes.pop("system"), sizes.pop("episodes")
            layers = sizes.pop("layers")
            sizes["layers"] = None if layers is None else tuple(layers)
            budget, chunk, prompt = (sizes.pop(name) for name in ("budget", "chunk", "prompt"))
            chat = Conversation(
                model,
                Budget.tokens(budget),
                chunk=chunk,
                prompt_tokens=prompt,
                embedder=embedder,
                router=Router(**router),
                **sizes,
                **asdict(Segments(**segments)),
            )
        try:
            _same("system tokens", system, chat._sizes.system)
            _same("max_episodes", episodes, chat._sizes.episodes)
            _same("embedder", self._manifest.get("embedder"), chat._embedder.fingerprint)
        except BaseException:
            chat.close()
            raise
        return chat

    def resume(self, chat: Conversation, turns: list[Turn] | None, *, whole: bool = False) -> None:
        """Makes an empty conversation the saved one. whole: all files are checked."""
        name = self._name("index")
        if name is None:
            raise RuntimeError(f"{self._folder.path / MANIFEST}: it names no index, expected one")
        with self._broken(name):
            file, counters = TensorFile(self._open(name)), self._manifest["counters"]
            history = self._history(file, chat, turns)
            self._restore(file, chat, whole)
            store, view = chat._store, counters["view"]
            store._planned, store.compactions = counters["planned"], counters["compactions"]
            store.episodes = counters["episodes"]
            store._view = None if view is None else (tuple(view[0]), view[1])
            chat._history = history
            chat._queue = file.tensor("queue", None)
            store._text = file.tensor("text", None)
            chat._begun = counters["begun"]
            chat._turned = _turned(counters["turned"])
            if "fitted.common" in file.names:
                known = {f.name: file.tensor(f"fitted.{f.name}", None) for f in fields(Fitted)}
                chat._embedder.fitted = Fitted(**known)  # type: ignore[attr-defined]

    def _restore(self, file: TensorFile, chat: Conversation, whole: bool) -> None:
        cache, counters = chat._store.cache, self._manifest["counters"]
        entries, rows = file.tensor("entries", None, COLUMNS), file.tensor("rows", cache.shape.rows, 3)
        names = self._manifest["pages"]
        opened = [self._open(name, whole=whole) for name in names]
        tables = [self._tables(name, file) for name, file in zip(names, opened, strict=True)]

        def check(i: int) -> None:
            self._folder.check(opened[i], self._manifest["files"][names[i]])

        shelf = Shelf(cache, tables, check, self._manifest["kinds"], entries, rows, file.tensor("means", None))
        length, floor, (every, sets, halves) = counters["length"], counters["floor"], counters["shown"]
        cache.view(chat._store._seq, [])  # sets are put where they stay: what then comes Near has a clean copy
        stored.restore(cache, chat._store._seq.id, shelf.rows, shelf.pages, length, floor, shelf.lies)
        cache.view(chat._store._seq, None if every else sets, halves=halves)
        if "scores" in file.names:
            stored.restore_scores(cache, chat._store._seq.id, file.tensor("scores", None))

    def _history(self, file: TensorFile, chat: Conversation, turns: list[Turn] | None) -> History:
        counters, how = self._manifest["counters"], chat._how
        table = [tuple(row) for row in file.tensor("utterances", None, 4).tolist()]
        by_window = {k: tuple(Utterance(*row[1:]) for row in some) for k, some in groupby(table, lambda row: row[0])}
        added, asked = counters["characters"]
        spots = tuple((first, last) for first, last in file.tensor("spots", None, 2).tolist())
        plain = History(turns=tuple(turns or ()), added=added, asked=asked, spots=spots if turns is not None else ())
        starts = file.tensor("starts", None).tolist()
        windows = [
            plain._window(by_window[k], how) if turns is not None else Window((), "", starts[k])
            for k in range(counters["windows"])
        ]
        ends = [0, *file.tensor("prompt_lengths", None).cumsum(0).tolist()]
        prompts = [file.tensor("prompts", None)[a:b] for a, b in pairwise(ends)]
        found = replace(plain, windows=tuple(windows), left=by_window.get(-1, ()), prompts=tuple(prompts))
        if "vectors" not in file.names:
            return found
        vectors = file.tensor("vectors", None, None)
        topics = Topics.resume(
            vectors,
            file.tensor("labels", None),
            tau=counters["tau"],
            open_after=how.open_after,
            max_episodes=how.max_episodes,
            strays=file.tensor("strays", None).tolist(),
            refused=counters["refused"],
        )
        return replace(found, vectors=vectors, topics=topics, clustered=counters["clustered"])

    # --- files ------------------------------------------------------------------------------------------------------------

    def _name(self, what: str) -> str | None:
        found = sorted(name for name in self._manifest["files"] if name.startswith(f"{what}-"))
        return found[-1] if found else None

    def _open(self, name: str, *, whole: bool = True) -> FileIO:
        return self._stack.enter_context(self._folder.open(name, self._manifest["files"][name], whole=whole))

    def _tables(self, name: str, file: FileIO) -> TensorFile:
        """A file of pages, of which all but the pages is checked."""
        found, expected = TensorFile(file), self._manifest["files"][name].get("books")
        if (books := found.books(".payload")) != expected:
            raise RuntimeError(f"{found.name}: its sha256 is {books} without pages, expected {expected}")
        return found

    def _broken(self, name: str) -> _Broken:
        return _Broken(str(self._folder.path / name))


class _Broken:
    """What goes wrong inside is the content of a file: RuntimeError with its name."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BROKEN) and not isinstance(error, BudgetExceeded):
            raise RuntimeError(f"{self._path}: it holds what no conversation does: {error}") from error


def _turned(data: Mapping[str, Any]) -> Turned:
    route = data["route"]
    if route is not None:
        margin = math.inf if route["margin"] is None else route["margin"]
        route = Route(tuple(route["episodes"]), tuple(route["scores"]), margin, route["uncertain"])
    return Turned(route, data["questions"], data["switches"], tuple(data["lately"]))
