"""Text to tokens and back, where a model has no tokenizer: one token per byte."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ByteTokenizer:
    """Token i is byte i."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Ids past 255 belong to no byte and are left out; bytes that are no UTF-8 show as escapes."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="backslashreplace")


def readable(text: str) -> str:
    """On one line, everything that does not print as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def long_text(n_bytes: int) -> str:
    """The first n_bytes bytes of real text that every machine with Python has: the standard library's own sources."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    size = 0
    for name in ("argparse.py", "typing.py", "inspect.py", "tarfile.py"):
        if size >= n_bytes or not (root / name).exists():
            continue
        parts.append((root / name).read_text(encoding="utf-8"))
        size += len(parts[-1].encode("utf-8"))
    text = "".join(parts).encode("utf-8")[:n_bytes].decode("utf-8", errors="ignore")
    if not text:
        raise OSError(f"no standard library sources in {root}")
    return text
