"""Text to tokens and back, where a model has no tokenizer: one token per byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ByteTokenizer:
    """Token i is byte i."""

    vocab_size = 256
    bos_token_id = None
    eos_token_id = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Ids past 255 belong to no byte and are left out; bytes that are no UTF-8 show as escapes."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="backslashreplace")


def readable(text: str) -> str:
    """On one line, everything that does not print as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
