"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base ** (i + 1) for i, prefix in enumerate("KMGT") for suffix, base in (("iB", 1024), ("B", 1000))
}
SPELLINGS = '"2GiB", "512MB", "25%" (the share kept), "256tok", 256 (tokens per row), or a Budget'


def parse_bytes(text: str) -> int:
    """Bytes of "2GiB" (2^31), "2GB" (2 * 10^9), "1.5MiB", "64B". ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)", text.strip())
    if not match:
        raise ValueError(f"budget: {text!r} is not understood, expected one of {SPELLINGS}")
    return int(float(match[1]) * _UNITS[match[2]])


def size(name: str, value: int | str | None, least: int = 0) -> int | None:
    """Bytes from an int, a string, or None (no limit). ValueError below ``least``, which names the argument."""
    if value is None:
        return None
    n = parse_bytes(value) if isinstance(value, str) else value
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise ValueError(f"{name} is {value!r}, expected None, an int >= {least} or a string such as '2GiB'")
    return n
