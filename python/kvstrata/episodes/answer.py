"""What a conversation answers, and what it holds: as data and as tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from kvstrata.episodes.route import Route

Sampler = Callable[[Tensor], int]


def greedy(logits: Tensor) -> int:
    """The most likely token of logits f32 [V]."""
    return int(logits.argmax())


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
    """A snapshot. near, peak, limit: bytes; far: of the Far tier's files; moved: between the two, so far; full: of a cache that
    keeps every token; separate: of E caches of B tokens, as the paper has them; tokens: seen; stored: slots of all rows;
    pending: tokens that no compaction has seen; unread: tokens that were added and are not read yet; switches: questions that
    read other episodes than the one before; uncertain: of the last 50 questions, the share that no window was like; advice: a
    refresh that would pay, and why, or None; file: bytes on disk, as last saved or loaded."""

    near: int
    far: int
    moved: int
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        main = Table("", "", title="conversation", show_header=False)
        rows = {
            "turns, tokens": f"{self.turns:,}, {self.tokens:,} ({self.pending:,} pending)",
            "near bytes": f"{self.near:,} (peak {self.peak:,}, limit {self.limit:,})",
            "far bytes": f"{self.far:,} ({self.moved:,} moved)",
            "bytes, full cache": f"{self.full:,}",
            "bytes, E caches of B": f"{self.separate:,}",
            "stored slots": f"{self.stored:,}",
            "B, C": f"{self.budget:,}, {self.chunk:,} tokens",
            "compactions": f"{self.compactions:,}",
            "questions": f"{self.questions:,} ({self.switches:,} switched, {self.uncertain:.0%} uncertain of late)",
            "embedder": self.embedder,
        }
        if self.file:
            rows["bytes on disk"] = f"{self.file:,}"
        if self.strays or self.zeros:
            rows["windows"] = f"{self.strays:,} strays, {self.zeros:,} that say nothing"
        for name, value in (rows | ({"advice": self.advice} if self.advice else {})).items():
            main.add_row(name, value)
        topics = Table("episode", "about", "windows", "prompt tokens", "slots", title="episodes")
        for e, episode in enumerate(self.episodes):
            topics.add_row(str(e), episode.label, *(f"{n:,}" for n in (episode.windows, episode.prompt, episode.slots)))
        return Group(main, topics) if self.episodes else Group(main)
