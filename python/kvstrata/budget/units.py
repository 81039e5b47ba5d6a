"""A budget's unit: bytes, tokens per row, or a share of the dense cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf
from typing import Literal

from kvstrata.budget.schedule import Schedule
from kvstrata.budget.sizes import SPELLINGS, parse_bytes, size
from kvstrata.config import Unsupported


@dataclass(frozen=True)
class Budget:
    """What a cache may hold near the compute: make one with :meth:`bytes`, :meth:`tokens`, :meth:`share` or :meth:`parse`.

    schedule: how the limit falls with decoded tokens, from the budget's bytes to its ``end`` (None, or a constant one: it
    does not); far: the Far tier of a cache that archives: "auto" or inf, one without a limit, its size ("64GiB" or bytes), or
    None, no tier; disk: None; per: "cache", one limit for all sequences, or "sequence", one for each; count: of
    :meth:`tokens`; at: the length in tokens that a share is of (None: each plan's logical length). Values that this release
    cannot honour are Unsupported, with the reason.
    """

    unit: Literal["bytes", "tokens", "share"]
    value: float
    schedule: Schedule | None = None
    far: int | float | str | None = "auto"
    disk: int | str | None = None
    per: str = "cache"
    count: bool = False
    at: int | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and not self.schedule.constant and self.unit == "share" and self.at is None:
            raise Unsupported("budget: schedule: a share grows with the sequences, expected at=N with a schedule")
        if self.far not in ("auto", inf):
            size("budget: far", self.far, least=1)  # type: ignore[arg-type]
        if self.disk is not None:
            raise Unsupported(f"budget: disk is {self.disk!r}, there is no disk tier yet; expected None")
        if self.per not in ("cache", "sequence"):
            raise ValueError(f"budget: per is {self.per!r}, expected 'cache' or 'sequence'")
        if self.per == "sequence" and self.unit != "bytes":
            raise ValueError(f"budget: per='sequence' belongs to bytes, {self.unit} are of each sequence anyway")
        if self.per == "sequence" and self.schedule is not None and not self.schedule.constant:
            raise Unsupported("budget: schedule: it is one for all sequences yet, expected per='cache'")
        if self.count and self.unit != "tokens":
            raise ValueError(f"budget: count belongs to tokens, got it with {self.unit}")
        if self.at is not None and self.unit != "share":
            raise ValueError(f"budget: at belongs to a share, got it with {self.unit}")
        if self.at is not None and (not isinstance(self.at, int) or isinstance(self.at, bool) or self.at < 1):
            raise ValueError(f"budget: at is {self.at!r}, expected None or an int >= 1")

    @staticmethod
    def bytes(
        value: int | str,
        *,
        near: int | str | None = None,
        far: int | float | str | None = "auto",
        disk: int | str | None = None,
        schedule: Schedule | None = None,
        per: str = "cache",
    ) -> Budget:
        """At most this many bytes, metadata included; "2GiB" is 2^31, "2GB" is 2 * 10^9.

        near: a limit of the Near tier alone, as is ``value``: the smaller of the two binds. far: of the Far tier, on top, for a
        policy that archives: "auto" or inf, one without a limit, its size, or None, no tier. per: "sequence" is a limit
        for each sequence, forks too: the cache may hold as many times the bytes, no sequence more for the others being small.
        Pages that forks share count in each of them.
        """
        limits = []
        for name, given in (("bytes", value), ("near", value if near is None else near)):
            n = parse_bytes(given) if isinstance(given, str) else given
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"budget: {name} is {given!r}, expected an int >= 1 or a string such as '2GiB'")
            limits.append(n)
        return Budget("bytes", min(limits), schedule, far, disk, per)

    @staticmethod
    def tokens(n: int, *, count: bool = False, schedule: Schedule | None = None) -> Budget:
        """n tokens per row (per KV head and layer), for every sequence.

        count: beside the bytes of n Full tokens, never more than n stored in any row of a full-attention layer after a step,
        whatever their states: for comparisons with methods that count. While a prompt is read its next chunk stands in one
        layer on top, and while recording the tokens not yet confirmed.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"budget: tokens is {n!r}, expected an int >= 1")
        return Budget("tokens", n, schedule, count=count)

    @staticmethod
    def share(x: float, *, at: int | None = None, schedule: Schedule | None = None) -> Budget:
        """The share of the dense cache's bytes that is kept, 0 < x <= 1; at: of a cache of so many tokens, whatever the length.

        A cache does not take a share yet; :func:`kvstrata.budget.protect.limit_bytes` says how many bytes it is.
        """
        if isinstance(x, bool) or not 0 < x <= 1:
            raise ValueError(f"budget: share is {x!r}, expected 0 < share <= 1")
        return Budget("share", float(x), schedule, at=at)

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
            return f"{self.value * 100:g}%" + (f" of {self.at}tok" if self.at else "")
        return f"{int(self.value)}tok" if self.unit == "tokens" else f"{int(self.value)}B"
