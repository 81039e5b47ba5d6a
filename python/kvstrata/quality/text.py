"""Real text for contexts: the Python standard library's source, which every machine with Python has."""

from __future__ import annotations

import sysconfig
import zlib
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "held-out"]
MAX_LINE = 160
"""Longer lines (data tables) are left out."""
SKIPPED = frozenset({"site-packages", "test", "tests", "lib2to3", "idlelib", "encodings", "__pycache__"})


@cache
def files(split: Split) -> tuple[Path, ...]:
    """Source files of a split, in order of their paths; a tenth of all, chosen by the hash of the name, is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    return tuple(p for p in found if (zlib.crc32(p.name.encode()) % 10 == 0) == (split == "held-out"))


@cache
def lines(split: Split) -> tuple[str, ...]:
    """Lines of the split's files, each with its newline, in file order. OSError if this Python came without sources."""
    out: list[str] = []
    for path in files(split):
        text = path.read_text(encoding="utf-8", errors="replace")
        out += [line + "\n" for line in text.splitlines() if line.strip() and len(line) <= MAX_LINE and line.isascii()]
    if not out:
        raise OSError(f"no standard library sources in {sysconfig.get_paths()['stdlib']}")
    return tuple(out)
