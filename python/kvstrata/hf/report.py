"""The report of a KVCache: the core's, with what only the transformers side knows."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rich.console import Group

from kvstrata.report import Report


@dataclass(frozen=True)
class KVReport(Report):
    """A snapshot. columns: padded positions fed; the recurrent states of a hybrid model are one of the kinds of bytes."""

    columns: int = 0

    @classmethod
    def of(cls, report: Report, columns: int, states: int) -> KVReport:
        """The core's report, with columns and the bytes of recurrent states added."""
        known = {field.name: getattr(report, field.name) for field in fields(report)}
        if states:
            known["bytes_by_kind"] = report.bytes_by_kind | {"recurrent states": states}
            known["nbytes"] = report.nbytes + states
        return cls(**known, columns=columns)

    def __rich__(self) -> Group:
        return Group(super().__rich__(), f"columns fed: {self.columns}")
