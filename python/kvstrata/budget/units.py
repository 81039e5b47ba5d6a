"""A budget's unit: bytes, tokens per row, or a share of the dense cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base ** (i + 1) for i, prefix in enumerate("KMGT") for suffix, base in (("iB", 1024), ("B", 1000))
}
SPELLINGS = '"2GiB", "512MB", "25%" (the share kept), "256tok", 256 (tokens per row), or a Budget'


@dataclass(frozen=True)
class Budget:
    """What a cache may hold near the compute: make one with :meth:`bytes`, :meth:`tokens`, :meth:`share` or :meth:`parse`."""

    unit: Literal["bytes", "tokens", "share"]
    value: float

    @staticmethod
    def bytes(value: int | str) -> Budget:
        """At most this many bytes, metadata included; "2GiB" is 2^31, "2GB" is 2 * 10^9."""
        n = _parse_bytes(value) if isinstance(value, str) else value
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"budget: bytes is {value!r}, expected an int >= 1 or a string such as '2GiB'")
        return Budget("bytes", n)

    @staticmethod
    def tokens(n: int) -> Budget:
        """n tokens per row (per KV head and layer), for every sequence."""
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"budget: tokens is {n!r}, expected an int >= 1")
        return Budget("tokens", n)

    @staticmethod
    def share(x: float) -> Budget:
        """The share of the dense cache's bytes that is kept, 0 < x <= 1."""
        if isinstance(x, bool) or not 0 < x <= 1:
            raise ValueError(f"budget: share is {x!r}, expected 0 < share <= 1")
        return Budget("share", float(x))

    @staticmethod
    def parse(spec: Budget | str | int | None) -> Budget | None:
        """From any of the spellings a user may write; None is no limit. A bare float or a bool is refused."""
        if spec is None or isinstance(spec, Budget):
            return spec
        if isinstance(spec, bool) or not isinstance(spec, int | str):
            raise ValueError(f"budget: {spec!r} is ambiguous, expected one of {SPELLINGS}")
        if isinstance(spec, int):
            return Budget.tokens(spec)
        text = spec.strip()
        if match := re.fullmatch(r"(\d+)\s*tok(?:ens)?", text):
            return Budget.tokens(int(match[1]))
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
            return Budget.share(float(match[1]) / 100)
        return Budget.bytes(text)

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{self.value * 100:g}%"
        return f"{int(self.value)}tok" if self.unit == "tokens" else f"{int(self.value)}B"


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)", text.strip())
    if not match:
        raise ValueError(f"budget: {text!r} is not understood, expected one of {SPELLINGS}")
    return int(float(match[1]) * _UNITS[match[2]])
