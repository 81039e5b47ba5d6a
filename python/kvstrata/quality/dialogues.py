"""Dialogues with questions whose evidence is known: LoCoMo and RealTalk files of a user. The files are no part of this
repository, and nothing of their text is ever written down.

LoCoMo: arXiv 2402.17753; one file, a list of conversations. RealTalk: arXiv 2502.13270; a file per chat, or a list of
them in one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstrata.episodes import Turn

LOCOMO = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
REALTALK = {1: "multi-hop", 2: "temporal", 3: "commonsense"}
UNANSWERABLE = "adversarial"
"""A category without answers, and so without evidence that counts."""
SESSION = re.compile(r"session_(\d+)")
IDS = re.compile(r"D:?(\d+):0*(\d+)(?:\s*[-–—]\s*(?:D:?(\d+):)?0*(\d+))?")
"""One id, or the first and last of a range: "D1:3", "D:1:03", "D12:3-D12:5", "D12:3-5"."""
WORDLESS = "(image)"
"""Stands for the text of a turn that has neither text nor caption."""
Place = tuple[int, int]
"""(session, number in it), as an id names a turn."""


@dataclass(frozen=True)
class Question:
    """evidence: the turns that the answer rests on, each once, rising; dangling: how many more the file names that there
    are not."""

    id: str
    text: str
    category: str
    evidence: tuple[int, ...]
    answer: str = ""
    dangling: int = 0

    @property
    def usable(self) -> bool:
        """Has an answer, and evidence that exists."""
        return self.category != UNANSWERABLE and bool(self.evidence)


@dataclass(frozen=True)
class Dialogue:
    """sessions: the first turn of each, rising from 0."""

    id: str
    turns: tuple[Turn, ...]
    sessions: tuple[int, ...]
    questions: tuple[Question, ...]


def counts(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """How many dialogues, sessions, turns, questions (also by category), usable ones, and ids that name no turn."""
    questions = [q for d in dialogues for q in d.questions]
    return {
        "dialogues": len(dialogues),
        "sessions": sum(len(d.sessions) for d in dialogues),
        "turns": sum(len(d.turns) for d in dialogues),
        "questions": len(questions),
        "categories": dict(Counter(q.category for q in questions)),
        "usable": sum(q.usable for q in questions),
        "dangling": sum(q.dangling for q in questions),
    }


def locomo(path: Path) -> list[Dialogue]:
    """The conversations of a LoCoMo file. OSError if there is none; ValueError naming the place of what is malformed."""
    found = []
    for i, sample in enumerate(_field(_json(path), list, path.name)):
        name = str(_field(sample, dict, f"{path.name}[{i}]").get("sample_id", f"conv-{i}"))
        spoken = _field(sample.get("conversation"), dict, f"{name}: conversation")
        found.append(_dialogue(name, spoken, sample.get("qa", []), "text", LOCOMO))
    return _distinct(found)


def realtalk(path: Path) -> list[Dialogue]:
    """The chats of a RealTalk file, or of all in a folder by name; their ids are numbers, for file names name people.

    OSError if there is none; ValueError naming the place of what is malformed.
    """
    files = _files(path)
    found: list[Dialogue] = []
    for file in files:
        held = _json(file)
        for chat in held if isinstance(held, list) else [held]:
            name = f"chat-{len(found) + 1}"
            chat = _field(chat, dict, f"{file.name} ({name})")
            found.append(_dialogue(name, chat, chat.get("qa", []), "clean_text", REALTALK))
    return found


FORMATS: dict[str, Callable[[Path], list[Dialogue]]] = {"locomo": locomo, "realtalk": realtalk}


def digest(path: Path) -> str:
    """sha256 of what :data:`FORMATS` read at ``path``, in hexadecimal."""
    whole = hashlib.sha256()
    for file in _files(path):
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


def _files(path: Path) -> list[Path]:
    """The file, or those of a folder whose names end in .json. OSError if there is none."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no .json file")
    return files


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # json's own error is one, and names line and column alone
        raise ValueError(f"{path.name}: expected JSON, {type(error).__name__}: {error}") from None


def _field(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{place}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _distinct(dialogues: list[Dialogue]) -> list[Dialogue]:
    twice = [name for name, n in Counter(d.id for d in dialogues).items() if n > 1]
    if twice:
        raise ValueError(f"sample_id: {', '.join(twice)} more than once, expected each once")
    return dialogues


def _dialogue(name: str, spoken: Mapping[str, Any], asked: Any, text: str, categories: Mapping[int, str]) -> Dialogue:
    turns: list[Turn] = []
    sessions: list[int] = []
    places: dict[Place, int] = {}
    for number, session in _sessions(spoken):
        if session:
            sessions.append(len(turns))
        for i, said in enumerate(session):
            where = f"{name}: session_{number}[{i}]"
            turn = _turn(_field(said, dict, where), text, spoken.get(f"session_{number}_date_time"), where)
            if (place := _place(turn.id)) is not None:
                places.setdefault(place, len(turns))
            turns.append(turn)
    if not turns:
        raise ValueError(f"{name}: expected lists named session_<n> with turns, got none")
    questions = tuple(
        _question(f"{name}/{i}", _field(q, dict, f"{name}: qa[{i}]"), places, categories)
        for i, q in enumerate(_field(asked, list, f"{name}: qa"))
    )
    return Dialogue(name, tuple(turns), tuple(sessions), questions)


def _sessions(spoken: Mapping[str, Any]) -> Iterator[tuple[int, list[Any]]]:
    """The lists in order of their numbers. A date may stand there without its session."""
    numbered = {int(m[1]): spoken[key] for key in spoken if (m := SESSION.fullmatch(key))}
    yield from ((n, session) for n, session in sorted(numbered.items()) if isinstance(session, list))


def _turn(said: Mapping[str, Any], text: str, date: Any, where: str) -> Turn:
    caption = said.get("blip_caption") or None
    words = _field(said.get(text) or "", str, f"{where}: {text}")
    try:
        return Turn(
            speaker=_field(said.get("speaker"), str, f"{where}: speaker"),
            text=words if words.strip() else caption or WORDLESS,
            date=said.get("date_time") or date or None,
            caption=caption,
            id=said.get("dia_id") or None,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _place(name: str | None) -> Place | None:
    found = IDS.search(name) if name else None
    return (int(found[1]), int(found[2])) if found else None


def _question(
    name: str, asked: Mapping[str, Any], places: Mapping[Place, int], categories: Mapping[int, str]
) -> Question:
    if asked.get("category") not in categories:
        raise ValueError(f"{name}: category is {asked.get('category')!r}, expected one of {list(categories)}")
    given = asked.get("evidence") or []
    listed = [given] if isinstance(given, str) else _field(given, list, f"{name}: evidence")
    turns, dangling = evidence([_field(text, str, f"{name}: evidence") for text in listed], places)
    return Question(
        name,
        _field(asked.get("question"), str, f"{name}: question"),
        categories[asked["category"]],
        turns,
        str(asked.get("answer", "")),
        dangling,
    )


def evidence(texts: Sequence[str], places: Mapping[Place, int]) -> tuple[tuple[int, ...], int]:
    """The turns that ids in ``texts`` name, ranges expanded, each once, rising; and how many ids name none.

    A string may hold several ids with anything between them. The ends of a range belong to it; one that runs backwards
    is two ids.
    """
    turns: set[int] = set()
    dangling = 0
    for text in texts:
        for session, number, last_session, last_number in (m.groups() for m in IDS.finditer(text)):
            ends = [(int(session), int(number))]
            if last_number is not None:
                ends.append((int(last_session or session), int(last_number)))
            turns.update(turn for place, turn in places.items() if ends[0] <= place <= ends[-1] or place in ends)
            dangling += sum(place not in places for place in ends)
    return tuple(sorted(turns)), dangling
