"""What a cache holds, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from rich.console import Group
from rich.table import Table


@dataclass(frozen=True)
class Recall:
    """What selecting steps read, since the cache was made.

    captured, least_captured: the share of a query head's attention mass that was read, mean and minimum over selections, as the
    pages' summaries estimate it, leaning optimistic: no bound; below_floor: selections below the selector's mass_floor;
    audited: query heads of rows that were read whole beside, and of those audited_estimate and audited_exact, the mean share as
    estimated and as it was; selections: (step, layer, query head); hits, misses: selected Far pages that were found Near, and
    those read; late: Far pages that the disk had to bring while steps went on, and waited, for how many seconds they could not.
    """

    captured: float
    least_captured: float
    below_floor: int
    selections: int
    hits: int
    misses: int
    audited: int = 0
    audited_estimate: float = 1.0
    audited_exact: float = 1.0
    late: int = 0
    waited: float = 0.0


@dataclass(frozen=True)
class Share:
    """What one sequence holds of a cache's pages, Near and Far.

    charged_bytes: of pages that it took, for their life, whoever shares them (None: the cache has no ledger); fair_bytes: of
    each page that it holds, its bytes divided by its holders, an exact rational. Both sum to the bytes of pages in use, charges
    with those of sequences that have ended, and beside what is no sequence's: the ring, Near copies of Far pages.
    logical_tokens: real tokens seen; stored_tokens: slots of a row: least, mean, most.
    """

    charged_bytes: int | None
    charged_far_bytes: int | None
    fair_bytes: Fraction
    fair_far_bytes: Fraction
    logical_tokens: int
    stored_tokens: tuple[int, float, int]


@dataclass(frozen=True)
class Report:
    """A snapshot. Bytes are what the allocator gave, not a formula; ``nbytes`` is the sum of ``bytes_by_kind``.

    budget: as it was asked for, or "256tok read per row and step" under a policy that selects; logical_tokens: real tokens
    seen, per sequence; stored_tokens: slots held, summed over rows, full-attention and windowed alike; stored: tokens per
    layer and head, the most over sequences; dense_bytes: what a dense cache of the logical tokens would hold; lost_slots:
    free slots in part-filled pages; far_bytes: of the Far tier's files, on top of nbytes; far_tokens: slots there, of those
    that are stored; recall: None without a selector; loan_bytes: on a device, page lists and workspace of kernels, on top of
    nbytes and of the limit.
    """

    policy: str
    budget: str | None
    window: int
    sinks: int
    logical_tokens: tuple[int, ...]
    stored_tokens: int
    states: dict[str, int]
    stored: tuple[tuple[int, ...], ...]
    bytes_by_kind: dict[str, int]
    nbytes: int
    allocator_bytes: int
    peak_bytes: int
    dense_bytes: int
    limit_bytes: int | None
    lost_slots: int
    counts: dict[str, int]
    far_bytes: int = 0
    far_tokens: int = 0
    recall: Recall | None = None
    loan_bytes: int = 0

    @property
    def headroom(self) -> int | None:
        """Bytes left under the limit; None where there is no limit."""
        return None if self.limit_bytes is None else self.limit_bytes - self.nbytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"headroom": self.headroom}

    def __rich__(self) -> Group:
        main = Table("", "", title=f"cache: {self.policy}", show_header=False)
        rows = {
            "budget": self.budget or "none",
            "sinks, window": f"{self.sinks}, {self.window}",
            "logical tokens": ", ".join(map(str, self.logical_tokens)) or "-",
            "stored slots": f"{self.stored_tokens:,} ({self.lost_slots:,} more free in part-filled pages)",
            "bytes": f"{self.nbytes:,}",
            "bytes, dense cache": f"{self.dense_bytes:,}",
            "peak bytes": f"{self.peak_bytes:,}",
            "headroom": "-" if self.headroom is None else f"{self.headroom:,}",
        } | {f"  {kind}": f"{n:,}" for kind, n in self.bytes_by_kind.items()}
        if self.far_bytes:
            rows["bytes, Far tier"] = f"{self.far_bytes:,} ({self.far_tokens:,} slots)"
        if self.loan_bytes:
            rows["bytes, device's lists and workspace"] = f"{self.loan_bytes:,}"
        if self.recall is not None:
            seen = self.recall
            rows["captured mass, estimated"] = f"{seen.captured:.3f}, least {seen.least_captured:.3f}"
            if seen.audited:
                exact = f"{seen.audited_exact:.3f}, estimated {seen.audited_estimate:.3f}"
                rows["captured mass, audited"] = f"{exact} ({seen.audited:,} heads)"
            rows["selections below the floor"] = f"{seen.below_floor:,} of {seen.selections:,}"
            rows["Far pages found Near"] = f"{seen.hits:,} of {seen.hits + seen.misses:,}"
        for name, value in (rows | {k: str(v) for k, v in self.counts.items()}).items():
            main.add_row(name, value)
        layers = Table("layer", "stored per head", title="stored tokens")
        for i, heads in enumerate(self.stored):
            layers.add_row(str(i), " ".join(map(str, heads)))
        return Group(main, layers)
