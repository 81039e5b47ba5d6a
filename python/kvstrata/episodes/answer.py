"""What a conversation answers, and what it holds: as data and as tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from kvstrata.episodes.route import Route

Sampler = Callable[[Tensor], int]


def greedy(logits: Tensor) -> int:
    """The most likely token of logits f32 [V]."""
    return int(logits.argmax())


class Words:
    """The text of tokens as they come, in pieces of whole characters. text: of ids i64 [n].

    Decoded are the tokens since the last piece, behind those of that piece: a token's text may depend on the one before it.
    """

    def __init__(self, text: Callable[[Tensor], str]) -> None:
        self._text = text
        self._said = ""
        self._first = 0
        self._given = 0  # tokens, that made the pieces so far; the last piece begins with the first one

    def more(self, ids: list[int], last: bool = False) -> str:
        """What ids, those given before and more, add; "" while a character lacks bytes. last: all that is left of the text."""
        if last:
            whole = self._decoded(ids)
            return whole[len(self._said) :] if whole.startswith(self._said) else ""
        known, tail = self._decoded(ids[self._first : self._given]), self._decoded(ids[self._first :])
        if tail == known or not tail.startswith(known) or tail.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._first, self._given = self._given, len(ids)
        self._said += tail[len(known) :]
        return tail[len(known) :]

    def _decoded(self, ids: list[int]) -> str:
        return self._text(torch.tensor(ids, dtype=torch.int64))


@dataclass(frozen=True)
class Answer:
    """text; ids: tokens that were generated, a stop token left out; route: None while all is seen; seconds: of the whole call,
    what it had to read first included; bytes_moved: between Near and Far memory;
    stopped: by a token of the model's, not by max_new_tokens."""

    text: str
    ids: tuple[int, ...]
    route: Route | None
    seconds: float
    bytes_moved: int
    stopped: bool


@dataclass(frozen=True)
class Episode:
    """A topic. label: words that tell it from others; windows, tokens: of the history that are its own; prompt: tokens of its
    patched prompt; slots: of its private set, all rows together."""

    label: str
    windows: int
    prompt: int
    slots: int


@dataclass(frozen=True)
class ConversationReport:
    """A snapshot. near, peak, limit: bytes; far: of the Far tier's files; moved: between the two, so far; found: pages of
    sets that came into sight and were Near still, and those that were read; full: of a cache that
    keeps every token; separate: of E caches of B tokens, as the paper has them; tokens: seen; stored: slots of all rows;
    pending: tokens that no compaction has seen; unread: tokens that were added and are not read yet; budget, chunk: B and C;
    whole: tokens that are kept whole before the first compaction; switches: questions that read other episodes than the one
    before; uncertain: of the last 50 questions, the share that no window was like; advice: a refresh that would pay, and why,
    or None; file: bytes on disk, as last saved or loaded; forks: other conversations in this memory, of all of which near,
    far, moved, peak and limit are."""

    near: int
    far: int
    moved: int
    found: tuple[int, int]
    peak: int
    limit: int
    full: int
    separate: int
    turns: int
    tokens: int
    stored: int
    pending: int
    unread: int
    budget: int
    chunk: int
    whole: int
    compactions: int
    questions: int
    switches: int
    uncertain: float
    embedder: str
    episodes: tuple[Episode, ...]
    strays: int
    zeros: int
    advice: str | None
    file: int = 0
    forks: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        main = Table("", "", title="conversation", show_header=False)
        unread = f", {self.unread:,} to read" if self.unread else ""
        rows = {
            "turns, tokens": f"{self.turns:,}, {self.tokens:,} ({self.pending:,} pending{unread})",
            "a question sees": f"all, up to {self.whole:,} tokens; beyond, {self.budget:,}, read {self.chunk:,} at a time",
            "near bytes": f"{self.near:,} (peak {self.peak:,}, limit {self.limit:,})",
            "far bytes": f"{self.far:,} ({self.moved:,} moved so far)",
            "pages of sets": f"{self.found[0]:,} found near, {self.found[1]:,} read",
            "  a cache of all tokens": f"{self.full:,}",
            "  a cache for each episode": f"{self.separate:,}",
            "stored slots": f"{self.stored:,}",
            "compactions": f"{self.compactions:,}",
            "questions": f"{self.questions:,} ({self.switches:,} went to other episodes than the one before,"
            f" {self.uncertain:.0%} uncertain of late)",
            "topics told apart by": self.embedder,
        }
        if not self.separate:
            rows.pop("  a cache for each episode")
        if self.file:
            rows["bytes on disk"] = f"{self.file:,}"
        if self.forks:
            rows["near and far shared"] = f"with {self.forks:,} other conversations"
        if self.strays or self.zeros:
            rows["windows"] = f"{self.strays:,} strays, {self.zeros:,} that say nothing"
        for name, value in (rows | ({"advice": self.advice} if self.advice else {})).items():
            main.add_row(name, value)
        topics = Table("episode", "about", "windows", "prompt tokens", "slots", title="episodes")
        for e, episode in enumerate(self.episodes):
            topics.add_row(str(e), episode.label, *(f"{n:,}" for n in (episode.windows, episode.prompt, episode.slots)))
        return Group(main, topics) if self.episodes else Group(main)
