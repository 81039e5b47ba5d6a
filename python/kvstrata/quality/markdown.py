"""Tables of reports."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table; columns after the first are set right."""
    line = "| {} |".format
    width = [max(3, *(len(r[i]) for r in (header, *rows))) for i in range(len(header))]

    def padded(row: Sequence[str]) -> str:
        first, *rest = (c.rjust(w) for c, w in zip(row, width, strict=True))
        return line(" | ".join([first.strip().ljust(width[0]), *rest]))

    rule = line(" | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(width)))
    return [padded(header), rule, *map(padded, rows), ""]
