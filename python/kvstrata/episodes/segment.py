"""Turns, utterances, windows: a conversation's text cut into what is embedded. Source: arXiv 2509.17396, section 3.1."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|(?=\n)")
WORD_END = re.compile(r"(?<=\S)(?=\s)")


@dataclass(frozen=True)
class Turn:
    """What one speaker said at once. date, caption (of an image sent with it) and id are text or None.

    ValueError: a field that is no text; a blank speaker or text.
    """

    speaker: str
    text: str
    date: str | None = None
    caption: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        for name in KEYS:
            value: object = getattr(self, name)
            needed = name in ("speaker", "text")
            if not isinstance(value, str) and (needed or value is not None):
                raise ValueError(f"Turn: {name} is {value!r}, expected a str{'' if needed else ' or None'}")
            if needed and isinstance(value, str) and not value.strip():
                raise ValueError(f"Turn: {name} is blank, expected a word")


KEYS = tuple(field.name for field in fields(Turn))


@dataclass(frozen=True)
class Utterance:
    """Characters start to end (not included) of the text of ``turns[turn]``: all of it, or one piece of a long one."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class Window:
    """Consecutive utterances and their text, one line for each; start: the first token of the conversation that is theirs."""

    utterances: tuple[Utterance, ...]
    text: str
    start: int = 0

    @property
    def turns(self) -> tuple[int, ...]:
        """The turns it has a part of, each once, rising."""
        return tuple(sorted({u.turn for u in self.utterances}))


def turns_of(items: Iterable[Turn | Sequence[str] | Mapping[str, Any]]) -> list[Turn]:
    """Turns from turns, (speaker, text) pairs, or mappings with the fields of :class:`Turn`.

    ValueError names the index: another type or length, an unknown or lacking key, a blank text.
    """
    if isinstance(items, (str, Mapping)):
        raise ValueError(f"turns: got a single {type(items).__name__}, expected a list of turns")
    return [_turn(i, item) for i, item in enumerate(items)]


def _turn(i: int, item: Turn | Sequence[str] | Mapping[str, Any]) -> Turn:
    if isinstance(item, Turn):
        return item
    if isinstance(item, Mapping):
        unknown = [key for key in item if key not in KEYS]
        lacking = {"speaker", "text"} - set(item)
        if unknown or lacking:
            wrong = f"unknown keys {unknown}" if unknown else f"no {' and no '.join(sorted(lacking))}"
            raise ValueError(f"turns[{i}]: {wrong}, expected speaker, text and of {', '.join(KEYS[2:])} what is known")
        given = dict(item)
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        given = {"speaker": item[0], "text": item[1]}
    else:
        raise ValueError(f"turns[{i}]: {item!r:.80}, expected a Turn, a (speaker, text) pair or a mapping")
    try:
        return Turn(**given)
    except ValueError as error:
        raise ValueError(f"turns[{i}]: {error}") from None


def utterances(turns: Sequence[Turn], longest: int = 500, shortest: int = 10) -> list[Utterance]:
    """The turns in order; a text over ``longest`` characters in pieces of ``shortest`` to ``longest``, each cut as late as
    it can be: after the last sentence end, else at the last space, else hard.

    The pieces of a text cover each of its characters exactly once: the space after a piece belongs to it, if it has room.
    A sentence too short for a piece stays with its neighbour. ValueError: longest < 2 * shortest, or shortest < 1.
    """
    if not 1 <= shortest <= longest // 2:
        raise ValueError(
            f"utterances: shortest is {shortest}, longest {longest}, expected 1 <= shortest <= longest / 2"
        )
    found = []
    for i, turn in enumerate(turns):
        cuts = [0]
        while len(turn.text) - cuts[-1] > longest:
            cuts.append(_cut(turn.text, cuts[-1], longest, shortest))
        found += [Utterance(i, start, end) for start, end in pairwise([*cuts, len(turn.text)])]
    return found


def _cut(text: str, start: int, longest: int, shortest: int) -> int:
    """Where the piece from ``start`` ends, when more than ``longest`` characters are left."""
    last = min(start + longest, len(text) - shortest)
    for ends in (SENTENCE_END, WORD_END):
        found = [m.end() for m in ends.finditer(text, start, last + 1)]
        for end in reversed(found):
            while end < last and text[end].isspace():
                end += 1
            whole = len(text[start:end].strip()) >= shortest and len(text[end : end + longest].strip()) >= shortest
            if end <= last and whole:
                return end
    return last


def segment(
    turns: Sequence[Turn],
    *,
    window: int = 4,
    bounded: bool = False,
    sessions: Sequence[int] | None = None,
    dates: bool = False,
    captions: bool = False,
) -> list[Window]:
    """Windows of ``window`` consecutive utterances; the last one may be shorter. Together they cover every turn once.

    bounded: no window crosses the border of two ``sessions`` (the number of each session's first turn, rising from 0).
    Lines of text: ``speaker: text``, with ``[date]`` before and ``(image: caption)`` behind where asked for and known.
    ValueError: window < 1; bounded without sessions; sessions that do not rise from 0 or pass the turns.
    """
    if window < 1:
        raise ValueError(f"segment: window is {window}, expected at least 1 utterance")
    if bounded and sessions is None:
        raise ValueError("segment: bounded without sessions, expected the first turn of each")
    firsts = list(sessions) if sessions is not None else [0] if turns else []
    rising = firsts == sorted(set(firsts)) and (firsts[:1] == [0] if turns else not firsts)
    if not rising or (firsts and firsts[-1] >= len(turns)):
        raise ValueError(f"segment: sessions are {firsts}, expected numbers of {len(turns)} turns, rising from 0")
    pieces = utterances(turns)
    starts = [bisect_left(pieces, first, key=lambda u: u.turn) for first in (firsts if bounded else [0])]
    found: list[Window] = []
    for start, end in pairwise([*starts, len(pieces)]):
        for at in range(start, end, window):
            part = tuple(pieces[at : min(at + window, end)])
            lines = (line(turns[u.turn], u, dates=dates, captions=captions) for u in part)
            found.append(Window(part, "\n".join(lines)))
    return found


def line(turn: Turn, piece: Utterance | None = None, *, dates: bool = False, captions: bool = False) -> str:
    """``[date] speaker: text (image: caption)`` of a turn or one piece of it; the caption follows the last piece."""
    start, end = (piece.start, piece.end) if piece else (0, len(turn.text))
    date = f"[{turn.date}] " if dates and turn.date else ""
    caption = f" (image: {turn.caption})" if captions and turn.caption and end == len(turn.text) else ""
    return f"{date}{turn.speaker}: {turn.text[start:end].strip()}{caption}"
