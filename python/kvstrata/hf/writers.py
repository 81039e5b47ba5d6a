"""How a conversation is written: turn by turn by the chat template, or as the lines of one message."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvstrata.config import Unsupported
from kvstrata.episodes.segment import Turn, line
from kvstrata.hf.spelling import TRANSCRIPT, Message, Spelling, row, split_at

ASKED, ANSWERED, ANOTHER = "probe of a question", "probe of an answer", "probe of another question"
_ROLES = ("user", "assistant", "user")
LINE = "A: b\n"
"""What stands before a line, when its tokens are made."""


class Writer:
    """opening, closing: ids before the first turn and behind an answer; prompt: ids that ask for one; stops: tokens that end
    it."""

    opening: list[int]
    closing: list[int]
    prompt: list[int]
    stops: frozenset[int]

    def turn(self, turn: Turn) -> list[int]:
        """ids of a turn behind others."""
        raise NotImplementedError

    def begin(self, turn: Turn) -> tuple[list[int], list[int]]:
        """(what stands before it, its ids) of the first turn of all."""
        return self.opening, self.turn(turn)

    def tokens(self, turns: Sequence[Turn], *, first: bool, answer: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`kvstrata.episodes.ChatModel.tokens`."""
        ids = list(self.opening) if first and not turns else []
        offsets = []
        for i, turn in enumerate(turns):
            try:
                if first and i == 0:
                    before, own = self.begin(turn)
                    ids += before
                else:
                    own = self.turn(turn)
            except Exception as error:  # whatever a template raises
                raise ValueError(f"turns[{i}] cannot be written: {error}") from error
            offsets.append(len(ids))
            ids += own
        return row(ids + (self.prompt if answer else [])), row([*offsets, len(ids)])


class ChatWriter(Writer):
    """Each turn as the chat template writes it behind others.

    ``assistant``, "assistant", "user" and "system" speak in these roles; whoever else does is a user whose name is written
    before the text. Date and caption are written with it too.

    Unsupported unless three probe turns show that a turn's tokens depend neither on what follows nor on its place.
    """

    def __init__(self, spelling: Spelling, system: str | None, assistant: str) -> None:
        self._spelling, self._assistant = spelling, assistant
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        probes = _probes()
        texts = spelling.checked(self._system + probes)
        self._stand = {
            "user": self._system + probes[:2],
            "assistant": self._system + probes[:1],
            "system": self._system + probes[:2],
        }
        begin, _ = split_at(texts[0], ASKED)
        user, _ = split_at(self._rendered("user", ANOTHER)[1], ANOTHER)
        reply = self._rendered("assistant", ANSWERED)[1]
        self.folds = not begin.endswith(user)
        """Whether the system text is part of the first user turn."""
        self._opening = begin if self.folds else begin[: len(begin) - len(user)]
        self.opening = spelling.ids(self._opening)
        _, behind = split_at(reply, ANSWERED)
        self.closing = spelling.after(texts[1][: len(texts[1]) - len(behind)], behind)
        self.stops = spelling.mark(self.closing)
        asked = spelling.render(self._stand["assistant"], prompt=True)
        if not asked.startswith(texts[0]):
            raise Unsupported(f"the chat template asks for an answer in another place than the end; {TRANSCRIPT}")
        self.prompt = spelling.after(texts[0], asked[len(texts[0]) :])
        self._check()

    def _check(self) -> None:
        probes = [*_probes(), *_probes()[1:]]
        first, *others = (Turn(probe["role"], probe["content"]) for probe in probes)
        before, own = self.begin(first)
        ids = self._spelling.ids(self._spelling.render(self._system + probes))
        if before + own + [i for turn in others for i in self.turn(turn)] != ids:
            raise Unsupported(f"the tokens of a turn depend on its place in the chat template; {TRANSCRIPT}")

    def turn(self, turn: Turn) -> list[int]:
        before, own = self._rendered(self._role(turn), self._content(turn))
        return self._spelling.after(before, own)

    def begin(self, turn: Turn) -> tuple[list[int], list[int]]:
        role, content = self._role(turn), self._content(turn)
        if role == "system" and not self._system:
            whole = self._spelling.render([{"role": role, "content": content}, *self._stand["assistant"]])
            user = self._rendered("user", ASKED)[1]
            if not whole.endswith(user):
                raise ValueError("the chat template writes a system turn into the user's; give it as system=")
            return [], self._spelling.ids(whole[: len(whole) - len(user)])
        if not self.folds:
            return self.opening, self.turn(turn)
        if role != "user":
            raise ValueError(f"the chat template writes the system text into a user's turn, so {role} cannot be first")
        whole = self._spelling.render([*self._system, {"role": role, "content": content}])
        return self.opening, self._spelling.after(self._opening, whole[len(self._opening) :])

    def _rendered(self, role: str, content: str) -> tuple[str, str]:
        """What may stand before a turn, and the turn behind it."""
        stand = self._stand[role]
        before = self._spelling.render(stand)
        whole = self._spelling.render([*stand, {"role": role, "content": content}])
        if not whole.startswith(before):
            raise Unsupported(f"the chat template rewrites earlier turns when a turn of {role} follows; {TRANSCRIPT}")
        return before, whole[len(before) :]

    def _role(self, turn: Turn) -> str:
        if turn.speaker == self._assistant:
            return "assistant"
        return turn.speaker if turn.speaker in ("assistant", "system") else "user"

    def _content(self, turn: Turn) -> str:
        named = line(turn, dates=True, captions=True)
        if turn.speaker not in (self._assistant, *_ROLES, "system"):
            return named
        date = f"[{turn.date}] " if turn.date else ""
        return date + named[len(f"{date}{turn.speaker}: ") :]


def _probes() -> list[Message]:
    return [{"role": r, "content": c} for r, c in zip(_ROLES, (ASKED, ANSWERED, ANOTHER), strict=True)]


class LineWriter(Writer):
    """Lines ``[date] speaker: text (image: caption)`` in one user message; without a chat template the lines alone, behind the
    system text, and an answer is the line of ``assistant``.

    A system text that the template has no role for stands before the first line.
    """

    def __init__(self, spelling: Spelling, system: str | None, assistant: str) -> None:
        self._spelling = spelling
        self.closing = []
        start: list[int] = []
        if spelling.template is None:
            start, begin, end = spelling.start(), "" if system is None else f"{system}\n\n", f"{assistant}:"
            self.stops = spelling.newlines()
        else:
            begin, end = self._message(system)
            self.stops = self._ends()
        self.opening = start + spelling.ids(begin)
        self.prompt = spelling.after(LINE, end)

    def _message(self, system: str | None) -> tuple[str, str]:
        """What stands before the lines, and what behind them asks for an answer."""
        user: Message = {"role": "user", "content": ASKED}
        if system is None:
            return split_at(self._spelling.render([user], prompt=True), ASKED)
        try:
            text = self._spelling.render([{"role": "system", "content": system}, user], prompt=True)
        except Exception:  # whatever a template raises that knows no such role
            begin, end = split_at(self._spelling.render([user], prompt=True), ASKED)
            return f"{begin}{system}\n\n", end
        return split_at(text, ASKED)

    def _ends(self) -> frozenset[int]:
        """What the template writes behind an answer, if that is a mark."""
        _, behind = split_at(self._spelling.render(_probes()[:2]), ANSWERED)
        return self._spelling.mark(self._spelling.ids(behind))

    def turn(self, turn: Turn) -> list[int]:
        return self._spelling.after(LINE, line(turn, dates=True, captions=True) + "\n")
