"""Text, bytes and timings as the command line prints them."""

from __future__ import annotations

import pytest

from kvstrata.cli.measure import Run
from kvstrata.cli.output import bytes_text
from kvstrata.cli.text import ByteTokenizer, readable


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_bytes(n: int, text: str) -> None:
    assert bytes_text(n) == text
    assert bytes_text(None) == "-"


def test_byte_tokenizer_round_trip() -> None:
    tokens = ByteTokenizer()
    assert tokens.decode(tokens.encode("grüße\n")) == "grüße\n"
    assert tokens.decode([0x68, 0xFF, 300, 0x69]) == "h\\xffi"


def test_readable_is_one_line() -> None:
    assert readable("a\nb\x07ü") == "a\\nb\\x07ü"


def test_agreement_counts_leading_tokens() -> None:
    def run(tokens: list[int]) -> Run:
        return Run("r", tokens, 1.0, 1.0, 1.0, 1, 1)

    assert run([1, 2, 3]).agreement(run([1, 2, 4])) == 2
    assert run([1, 2]).agreement(run([1, 2, 3])) == 2
    assert run([1]).agreement(run([2])) == 0
