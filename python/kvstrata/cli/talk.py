"""The loop of `kvstrata chat`: questions, commands, and what stops them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from kvstrata.cli.output import Output, bytes_text
from kvstrata.episodes import Answer, Attending, Conversation, picture

PATIENCE = 2.0
"""Seconds of reading before its progress is shown."""
MOST = 256
Stopped = Callable[[], bool]


class Watched:
    """A chat model that calls ``before`` with the tokens seen, ahead of each pass. What ``before`` raises ends the step."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.before: Callable[[int], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(
        self, ids: Tensor, positions: Tensor, step: Attending, logits: Literal["last", "none"] = "last"
    ) -> Tensor | None:
        """As :meth:`kvstrata.episodes.ChatModel.forward`."""
        if self.before is not None:
            self.before(int(positions[0]))
        found: Tensor | None = self._model.forward(ids, positions, step, logits)
        return found


@contextmanager
def stoppable() -> Iterator[Stopped]:
    """Within, Ctrl-C is noted: the function says whether it came. A second one is a KeyboardInterrupt."""
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


class Talk:
    """A conversation at a terminal, or over lines of another input.

    make: a new conversation under another budget; most: tokens of an answer, None: 256, at most half a chunk; folder: that
    it was loaded from.
    """

    def __init__(
        self,
        chat: Conversation,
        model: Watched,
        make: Callable[[str], Conversation],
        out: Output,
        most: int | None = None,
        folder: str = "",
    ) -> None:
        self.chat, self._model, self._make, self._out, self._most = chat, model, make, out, most
        self._read_last: tuple[int, ...] | None = None  # episodes of the last question
        self._folder = folder
        self._said: list[dict[str, Any]] = []
        self._failed = False

    def run(self, name: str) -> int:
        """Until the input ends, or /quit. Returns the exit code."""
        terminal = sys.stdin.isatty()
        for line in _typed(self._out) if terminal else _piped(self._out):
            if line == "/quit":
                break
            try:
                self._command(line) if line.startswith("/") else self._ask(line)
            except KeyboardInterrupt:
                self._warn("stopped; what was not read yet is read with the next question")
            except ValueError as error:
                self._warn(str(error))
            except (RuntimeError, OSError, ImportError) as error:
                self._warn(f"{type(error).__name__}: {error}")
        report = self.chat.report()
        self._out.result({"schema": 1, "model": name, "answers": self._said, "report": report.to_dict()})
        self.chat.close()
        return 1 if self._failed and not terminal else 0

    def _warn(self, reason: str) -> None:
        self._failed = True
        self._out.warn(reason)

    # --- questions --------------------------------------------------------------------------------------------------------

    def _ask(self, question: str) -> None:
        self._read(self.chat.build)
        most = self._most or min(MOST, self.chat.report().chunk // 2)
        answer: Answer | None = None
        words = ""
        try:
            with stoppable() as stopped:
                stream = self.chat.stream(question, max_new_tokens=most)
                while answer is None and not stopped():
                    try:
                        piece = next(stream)
                    except StopIteration as end:
                        answer = end.value
                    else:
                        self._out.piece(piece if words.strip() else piece.lstrip())
                        words += piece
                stream.close()
        finally:
            self._out.piece("\n" if words else "")
        if answer is None:
            self._out.line("(stopped)", style="dim")
            self._said.append({"question": question, "text": words.strip(), "stopped": True})
        else:
            self._told(question, answer)

    def _told(self, question: str, answer: Answer) -> None:
        """What is to be said behind an answer."""
        route, about = answer.route, self.chat.episodes
        self._read_last = route.episodes if route else None
        where = "all that was said"
        if route:
            where = " and ".join(f"episode {e} ({about[e].label})" for e in route.episodes)
            where += ", uncertain" if route.uncertain else ""
        if not answer.text.strip():
            self._out.line("(no words)")
        self._out.line(f"[{answer.seconds:.1f} s, {len(answer.ids)} tokens, saw {where}]", style="dim")
        record = {"question": question, "text": answer.text.strip(), "stopped": False, "tokens": len(answer.ids)}
        record |= {"episodes": route and list(route.episodes), "uncertain": bool(route and route.uncertain)}
        self._said.append(record | {"seconds": answer.seconds})

    def _read(self, work: Callable[[], None], total: int | None = None) -> None:
        """Runs what reads so many tokens, None: those unread, and shows how far it is. Ctrl-C ends it after a pass."""
        report = self.chat.report()
        done = 0 if total else report.tokens
        total = report.unread if total is None else total
        with self._out.progress("tokens", total, after=PATIENCE) as advance, stoppable() as stopped:

            def before(seen: int) -> None:
                nonlocal done
                if stopped():
                    raise KeyboardInterrupt
                advance("read", seen - done)
                done = seen

            self._model.before = before
            try:
                work()
            finally:
                self._model.before = None
            if stopped():  # in the last pass
                raise KeyboardInterrupt

    # --- commands ---------------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"{name} is unknown; /help lists the commands")
        COMMANDS[name][2](self, rest.strip())

    def _help(self, _: str) -> None:
        self._out.table("Commands", ["", ""], [(f"{n} {given}", says) for n, (given, says, _) in COMMANDS.items()])

    def _report(self, _: str) -> None:
        self._out.show(self.chat.report())

    def _episodes(self, file: str) -> None:
        episodes = self.chat.episodes
        if not episodes:
            report = self.chat.report()
            there = f"{report.tokens:,}" + (f", and {report.unread:,} to read" if report.unread else "")
            self._out.line(f"No episodes yet: all is seen, up to {report.whole:,} tokens; there are {there}.")
            return
        if file:
            picture(self.chat, Path(file).expanduser())
            self._out.line(f"Picture: {file}")
            return
        read = self._read_last or ()
        rows = [
            (e, episode.label, episode.windows, episode.slots, "yes" if e in read else "")
            for e, episode in enumerate(episodes)
        ]
        self._out.table("Episodes", [">episode", "about", ">windows", ">slots", "read last"], rows)

    def _save(self, folder: str) -> None:
        self._folder = folder or self._folder
        if not self._folder:
            raise ValueError("/save: nothing given, expected a folder")
        written = self.chat.save(Path(self._folder).expanduser())
        self._out.line(
            f"Saved in {self._folder}, {bytes_text(written)} of new files; --load {self._folder} goes on with it."
        )

    def _budget(self, text: str) -> None:
        if not text:
            raise ValueError('/budget: nothing given, expected "2GiB" or "4096tok"')
        fresh = self._make(text)
        fresh.repeat(self.chat)
        count = fresh.report().unread
        self._out.line(f"Reading {count:,} tokens again, which may take long.")
        self.chat.close()  # both are not held at once
        self.chat, self._read_last = fresh, None
        self._read(fresh.build)
        self._report("")

    def _refresh(self, what: str) -> None:
        given = what or "labels"
        if given == "rebuild":
            self._out.line(f"Reading {self.chat.report().tokens:,} tokens again, which may take long.")
        self._read(lambda: self.chat.refresh(given), self.chat.report().tokens)  # type: ignore[arg-type]
        self._read_last = None
        self._episodes("")


def _typed(out: Output) -> Iterator[str]:
    """Lines of a terminal."""
    with suppress(ImportError):
        import_module("readline")  # edits lines, and remembers them
    while True:
        try:
            line = input("" if out.json else "> ").strip()
        except EOFError:
            out.line()
            return
        except KeyboardInterrupt:
            out.line("\nCtrl-D or /quit ends.", style="dim")
            continue
        if line:
            yield line


def _piped(out: Output) -> Iterator[str]:
    """Lines of another input, each shown before what comes of it."""
    for line in sys.stdin:
        if line.strip():
            out.line(f"> {line.strip()}")
            yield line.strip()


Command = Callable[[Talk, str], None]
COMMANDS: dict[str, tuple[str, str, Command]] = {
    "/report": ("", "what is held: bytes, limit, episodes", Talk._report),
    "/episodes": ("[FILE.png]", "the topics; or a picture of them over time", Talk._episodes),
    "/save": ("[DIR]", "writes the conversation to a folder, the last one if none is given, for --load", Talk._save),
    "/budget": ("NEW", "reads all again under another budget", Talk._budget),
    "/refresh": ("[rebuild]", "tells topics apart anew; rebuild: and reads all again", Talk._refresh),
    "/help": ("", "this", Talk._help),
    "/quit": ("", "ends; Ctrl-D does too, Ctrl-C stops an answer", Talk._help),
}
