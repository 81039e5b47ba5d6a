"""What a verb says: lines and tables for people, or one JSON object for programs."""

from __future__ import annotations

import json as codec
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 160
"""Columns of a line where no terminal says how many it has."""


class Advance(Protocol):
    """So many steps more are done, and this was the last."""

    def __call__(self, said: str, by: int = 1) -> None: ...


class Output:
    """People's text goes to standard output, or nowhere with --json; progress and errors go to standard error."""

    def __init__(self, json: bool) -> None:
        self.json = json
        self._out = _console(stderr=False)
        self._err = _console(stderr=True)

    def line(self, text: str = "", style: str = "") -> None:
        if not self.json:
            self._out.print(escape(text), style=style or None, highlight=False, soft_wrap=True)

    def piece(self, text: str) -> None:
        """Part of a line, at once. What does not print is shown as an escape: no terminal obeys what a model says."""
        if not self.json:
            shown = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
            self._out.print(Text(shown), end="", soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns whose header begins with ">" are set flush right."""
        if self.json:
            return
        self.line()
        self.line(title, style="bold")
        table = Table(box=self._box(), pad_edge=False, show_header=any(columns))
        for column in columns:
            table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self._out.print(table)

    def show(self, renderable: Any) -> None:
        """Anything that rich can print; its tables without lines where this verb's own have none."""
        if not self.json:
            self._out.print(renderable if self._out.is_terminal else _unboxed(renderable))

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A spinner on a terminal while something takes longer than a moment; a line elsewhere."""
        if self._err.is_terminal:
            with self._err.status(escape(what)):
                yield
        else:
            if not self.json:
                self._err.print(escape(what), highlight=False, soft_wrap=True)
            yield

    @contextmanager
    def progress(self, what: str, total: int, after: float = 0.0) -> Iterator[Advance]:
        """A bar on a terminal, a line at every tenth elsewhere; nothing for what ends within ``after`` seconds. Gives a
        function to call after each step, with a word on what was done, and how many steps it was."""
        bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=self._err, transient=True)
        shown = self._err.is_terminal
        task = bar.add_task(escape(what), total=total)
        tenths, began = 0, time.monotonic()

        def advance(said: str, by: int = 1) -> None:
            nonlocal tenths
            bar.update(task, advance=by, description=escape(said))
            if time.monotonic() - began < after:
                return
            done = int(bar.tasks[0].completed)
            if shown:
                bar.start()
            elif not self.json and 10 * done // max(1, total) > tenths:
                tenths = 10 * done // max(1, total)
                self._err.print(escape(f"{done} of {total} {what}, {said}"), highlight=False, soft_wrap=True)

        if shown and not after:
            bar.start()
        try:
            yield advance
        finally:
            if bar.live.is_started:
                bar.stop()

    def result(self, value: dict[str, Any]) -> None:
        """The JSON object; nothing without --json."""
        if self.json:
            self._out.file.write(codec.dumps(value, indent=2, allow_nan=False) + "\n")

    def fail(self, reason: str) -> int:
        """Says why, and returns exit code 1."""
        self.result({"error": reason})
        self.warn(reason)
        return 1

    def warn(self, reason: str) -> None:
        """Says on standard error what went wrong, or was stopped."""
        self._err.print(escape(f"kvstrata: {reason}"), style="red", highlight=False, soft_wrap=True)

    def _box(self) -> Any:
        from rich import box

        return box.SIMPLE_HEAD if self._out.is_terminal else None


def _unboxed(renderable: Any) -> Any:
    """The same without the lines of its tables."""
    renderable = renderable.__rich__() if hasattr(renderable, "__rich__") else renderable
    if isinstance(renderable, Group):
        return Group(*map(_unboxed, renderable.renderables))
    if isinstance(renderable, Table):
        renderable.box = None
    return renderable


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PLAIN_WIDTH, no_color=True)


def bytes_text(n: float | None) -> str:
    """1536 -> "1.5 KiB"."""
    if n is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")
