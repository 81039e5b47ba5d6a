"""Real text for contexts: the Python standard library's source, which every machine has, and a tokenizer trained on it."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

Split = Literal["train", "held-out"]
MAX_LINE = 160
"""Longer lines (data tables) are left out."""


@cache
def files(split: Split) -> list[Path]:
    """Source files of a split; a tenth of all, chosen by the hash of their name, is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "lib2to3", "idlelib", "encodings", "__pycache__"}
    found = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    return [p for p in found if (zlib.crc32(p.name.encode()) % 10 == 0) == (split == "held-out")]


@cache
def lines(split: Split) -> list[str]:
    """Lines of the split's files, each with its newline, in file order."""
    out: list[str] = []
    for path in files(split):
        text = path.read_text(encoding="utf-8", errors="replace")
        out += [line + "\n" for line in text.splitlines() if line.strip() and len(line) <= MAX_LINE and line.isascii()]
    return out


def train_tokenizer(extra: str, size: int = 1024) -> Tokenizer:
    """Byte-level BPE, digits single. ``extra``: text of the tasks, so that their words are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n| ?[A-Za-z]+| +|[^\sA-Za-z\d]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*lines("train"), *(extra.splitlines(keepends=True) * 20)], trainer)
    return tokenizer


@dataclass(frozen=True)
class Source:
    """Filler text with the token count of every line."""

    lines: list[str]
    counts: list[int]

    @staticmethod
    def of(tokenizer: Tokenizer, split: Split) -> Source:
        text = lines(split)
        return Source(text, [len(e.ids) for e in tokenizer.encode_batch(text)])
