"""A tokenizer as conversations use it: text to ids, piece by piece, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvstrata.config import Unsupported

TRANSCRIPT = "style='transcript' works with it"
Message = Mapping[str, str]


class Spelling:
    """tokenizer: of transformers, or any with encode(text, add_special_tokens=False) and decode(ids, skip_special_tokens=True).

    arguments: more for its chat template, such as enable_thinking=False.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = getattr(tokenizer, "chat_template", None)
        self._arguments = dict(arguments or {})

    def ids(self, text: str) -> list[int]:
        """Of a text; special tokens only where the text names them."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def after(self, before: str, text: str) -> list[int]:
        """ids of ``text`` as it follows ``before``. Unsupported where a token crosses the border."""
        head, whole = self.ids(before), self.ids(before + text)
        if whole[: len(head)] != head:
            raise Unsupported(f"the tokenizer joins {text[:20]!r} to what stands before it, {before[-20:]!r}")
        return whole[len(head) :]

    def start(self) -> list[int]:
        """What the tokenizer puts before every text."""
        plain, whole = self.ids("a"), [int(i) for i in self.tokenizer.encode("a")]
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])

    def text(self, ids: Tensor | list[int]) -> str:
        """Without special tokens."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def render(self, messages: Iterable[Message], prompt: bool = False) -> str:
        """What the chat template makes of messages; prompt: with the beginning of an answer. Raises what the template does."""
        found = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=prompt, **self._arguments
        )
        return str(found)

    def mark(self, ids: list[int]) -> frozenset[int]:
        """The first of ids, if it is one of the tokenizer's own marks and no piece of text."""
        marks = {*getattr(self.tokenizer, "all_special_ids", ()), *getattr(self.tokenizer, "added_tokens_decoder", ())}
        return frozenset(ids[:1]) & marks

    def newlines(self) -> frozenset[int]:
        """Tokens that hold the end of a line."""
        sized = hasattr(self.tokenizer, "__len__")
        vocabulary = len(self.tokenizer) if sized else int(self.tokenizer.vocab_size)
        return frozenset(i for i in range(vocabulary) if "\n" in self.tokenizer.decode([i]))

    def checked(self, messages: list[Message]) -> list[str]:
        """The renderings of messages[:1], messages[:2], ...; Unsupported unless each begins with the one before it."""
        try:
            texts = [self.render(messages[: n + 1]) for n in range(len(messages)) if messages[n]["role"] != "system"]
        except Exception as error:  # whatever a template raises
            raise Unsupported(
                f"the chat template does not take {', '.join(m['role'] for m in messages)} "
                f"({type(error).__name__}: {error}); {TRANSCRIPT}"
            ) from error
        for n, (shorter, longer) in enumerate(zip(texts, texts[1:], strict=False), 1):
            if not longer.startswith(shorter):
                raise Unsupported(
                    f"the chat template writes {n} turns otherwise when another follows: turns[:{n}] is no prefix of "
                    f"turns[:{n + 1}]; {TRANSCRIPT}"
                )
        return texts


def split_at(text: str, mark: str) -> tuple[str, str]:
    """What stands before and behind ``mark``. Unsupported unless it is there exactly once."""
    if text.count(mark) != 1:
        raise Unsupported(f"the chat template writes a text {text.count(mark)} times, expected once: {text[:200]!r}")
    before, behind = text.split(mark)
    return before, behind


def row(ids: list[int]) -> Tensor:
    """i64 [T]."""
    return torch.tensor(ids, dtype=torch.int64)
