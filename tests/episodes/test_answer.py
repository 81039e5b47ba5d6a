"""The text of an answer in pieces: whole characters, all of it, and a few tokens decoded for each."""

from __future__ import annotations

import random

import torch

from kvstrata.episodes.answer import Words

SAID = (
    "Ada's na\u00efve caf\u00e9 \u2014 \u6f22\u5b57, \U0001f389\U0001f389 and an e\u0301 and more of it, word by word"
)


def pieces(text: object, ids: list[int]) -> list[str]:
    words = Words(text)  # type: ignore[arg-type]
    return [words.more(ids[:n], n == len(ids)) for n in range(1, len(ids) + 1)]


def test_pieces_of_bytes_are_whole_characters() -> None:
    """As byte-level BPE cuts them: anywhere. Only what ends within a character ends so."""
    r, whole = random.Random(0), SAID.encode()
    for _ in range(200):
        cuts = sorted({0, len(whole), *(r.randrange(len(whole)) for _ in range(r.randrange(60)))})
        parts = [whole[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]

        def text(ids: torch.Tensor, parts: list[bytes] = parts) -> str:
            return b"".join(parts[i] for i in ids.tolist()).decode(errors="replace")

        for n in range(1, len(parts) + 1):
            found = pieces(text, list(range(n)))
            assert "".join(found) == text(torch.arange(n))
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found[:-1])


def test_a_token_may_depend_on_the_one_before_it() -> None:
    """Words that are joined by spaces, of which the first has none."""

    def text(ids: torch.Tensor) -> str:
        return " ".join(f"w{i}" for i in ids.tolist())

    assert pieces(text, [3, 1, 4, 1]) == ["w3", " w1", " w4", " w1"]


def test_few_tokens_are_decoded() -> None:
    seen: list[int] = []

    def text(ids: torch.Tensor) -> str:
        seen.append(len(ids))
        return bytes(ids.tolist()).decode(errors="replace")

    ids = list(SAID.encode() * 20)
    pieces(text, ids)
    assert sorted(seen)[-1] == len(ids) and max(sorted(seen)[:-1]) <= 8
