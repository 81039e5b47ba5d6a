"""The command line, run in this process: importing torch once is enough."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstrata.cli import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs it with arguments, over lines that are no terminal's."""

    def run(*arguments: str | Path, lines: str = "") -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as usage:  # argparse's way
            code = int(usage.code or 0)
        return Done(code, *capsys.readouterr())

    return run
