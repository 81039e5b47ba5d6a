"""How much each layer and KV head may hold: what allocators see, what they say, and the plain ones.

An allocator turns a total into bytes for every (layer, row), between floors and caps. Protected tokens (sinks, window)
are subtracted before; what is divided here is for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from kvstrata.budget.split import Floats, split
from kvstrata.config import SLOTS, Unsupported


@dataclass(frozen=True, eq=False)
class RowsSeen:
    """What an allocator sees of every (layer, row): unprotected tokens only.

    tokens: i64 [L, R], unprotected visible tokens of each row; page_bytes: i64 [F, L], bytes of one page of each format,
    metadata included, most precise format first; formats: their names; unit: bytes that are divided as one, those of the
    cheapest page in use.
    scores: f32 [L, R, N], attention mass of each token, >= 0, read up to a row's ``tokens`` (None: none yet);
    mass: f32 [L, R], sum of the scores of all visible tokens of a row, protected ones included (None: of those given);
    positions: i32 [L, R, N] (None: tokens stand in order of age); stored: u8 [L, R, N], the format each token is stored in,
    an index into ``formats`` (None: 0 everywhere); norms: f32 [L, R, N], length of each token's value (None: unknown);
    oq: f32 [L, R], the attention statistic OQ of each row (None: not measured yet);
    sequence: i64 [R], the sequence of each row (None: all of one); priority: f64 [R] (None: 1).
    ValueError for shapes that do not agree.
    """

    tokens: Tensor
    page_bytes: Tensor
    formats: tuple[str, ...] = ("full",)
    unit: int = 1
    scores: Tensor | None = None
    mass: Tensor | None = None
    positions: Tensor | None = None
    stored: Tensor | None = None
    norms: Tensor | None = None
    oq: Tensor | None = None
    sequence: Tensor | None = None
    priority: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or (self.tokens < 0).any():
            raise ValueError(f"RowsSeen: tokens is {list(self.tokens.shape)}, expected counts >= 0 of [L, R]")
        layers, rows = self.tokens.shape
        columns = 0 if self.scores is None else self.scores.shape[-1]
        wide = {"scores", "positions", "stored", "norms"}
        expected: dict[str, tuple[int, ...]] = {"page_bytes": (len(self.formats), layers)}
        expected |= dict.fromkeys(("mass", "oq"), (layers, rows)) | dict.fromkeys(("sequence", "priority"), (rows,))
        for name, shape in (expected | dict.fromkeys(wide, (layers, rows, columns))).items():
            value: Tensor | None = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"RowsSeen: {name} is {list(value.shape)}, expected {list(shape)}")
        if self.scores is not None and self.tokens.numel() and int(self.tokens.max()) > columns:
            raise ValueError(f"RowsSeen: a row has {int(self.tokens.max())} tokens, scores are given for {columns}")
        if self.unit < 1 or (self.page_bytes < 1).any():
            raise ValueError("RowsSeen: unit and page_bytes must be >= 1")
        if self.priority is not None and not (self.priority.isfinite() & (self.priority >= 0)).all():
            raise ValueError("RowsSeen: a priority is negative or not finite")

    @property
    def full_bytes(self) -> Tensor:
        """Bytes of all unprotected tokens in Full pages: i64 [L, R]."""
        return torch.div(self.tokens + SLOTS - 1, SLOTS, rounding_mode="floor") * self.page_bytes[0].unsqueeze(1)

    @property
    def present(self) -> Tensor:
        """bool [L, R, N]: entries of the wide columns that hold a token."""
        assert self.scores is not None
        return torch.arange(self.scores.shape[-1]) < self.tokens.unsqueeze(-1)

    def of(self, rows: Tensor) -> RowsSeen:
        """The table of some rows alone. rows: i64 indices."""
        parts: dict[str, Any] = {}
        for name in ("tokens", "scores", "mass", "positions", "stored", "norms", "oq", "sequence", "priority"):
            value: Tensor | None = getattr(self, name)
            if value is not None:
                parts[name] = value[:, rows] if value.dim() > 1 else value[rows]
        return replace(self, **parts)

    def sequences(self) -> list[Tensor]:
        """Row indices i64 of each sequence, in order of the sequences' numbers."""
        if self.sequence is None:
            return [torch.arange(self.tokens.shape[1])]
        return [torch.nonzero(self.sequence == s).flatten() for s in torch.unique(self.sequence).tolist()]


@dataclass(frozen=True, eq=False)
class Allocation:
    """What each (layer, row) may hold beside its protected tokens.

    bytes: i64 [L, R]; full_share: f32 [L, R], the share r of a row's pages that stay Full where not all fit (None: the
    planner's own); formats: u8 [L, R, N], 0 Evicted, 1 + f the format f that a token shall be stored in, where the
    allocator decides it token by token (None: the planner does); slack: bytes of the total that were not given; nans: scores
    that were NaN and counted as 0, where scores were read.
    """

    bytes: Tensor
    full_share: Tensor | None = None
    formats: Tensor | None = None
    slack: int = 0
    nans: int = 0


class Allocator(Protocol):
    """How much may each layer and head hold?

    total: bytes; floor, cap: i64 [L, R] bytes (None: 0, and ``seen.full_bytes``). The bytes of an allocation sum to
    min(total, sum of caps), in whole units of ``seen.unit``: a cap that is no multiple takes its last unit in part.
    """

    needs: ClassVar[frozenset[str]]

    def allocate(
        self, seen: RowsSeen, total: int, floor: Tensor | None = None, cap: Tensor | None = None
    ) -> Allocation: ...


def divide(
    seen: RowsSeen,
    total: int,
    weights: Floats,
    floor: Tensor | None,
    cap: Tensor | None,
    full_share: Tensor | None = None,
) -> Allocation:
    """The allocation by weights f64 [L, R] or [L, 1]: what every allocator but the knapsack ends with."""
    low, high = limits(seen, floor, cap)
    unit = seen.unit
    wide = np.broadcast_to(weights, tuple(high.shape)).ravel()
    units = split(total // unit, wide, _ceil(low, unit).numpy().ravel(), _ceil(high, unit).numpy().ravel())
    given = torch.minimum(torch.from_numpy(units * unit).view(high.shape), high)
    return Allocation(given, full_share, slack=total - int(given.sum()))


def limits(seen: RowsSeen, floor: Tensor | None, cap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Floors and caps i64 [L, R] with their defaults; a floor above its cap becomes the cap."""
    high = seen.full_bytes if cap is None else cap
    low = torch.zeros_like(high) if floor is None else floor
    for name, value in (("floor", low), ("cap", high)):
        if value.shape != seen.tokens.shape or value.dtype != torch.int64:
            raise ValueError(
                f"allocate: {name} is {value.dtype} {list(value.shape)}, expected torch.int64 {list(seen.tokens.shape)}"
            )
    return torch.minimum(low, high), high


def _ceil(values: Tensor, unit: int) -> Tensor:
    return torch.div(values + unit - 1, unit, rounding_mode="floor")


@dataclass(frozen=True)
class Uniform:
    """The same for every layer and row. Needs nothing."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def allocate(
        self, seen: RowsSeen, total: int, floor: Tensor | None = None, cap: Tensor | None = None
    ) -> Allocation:
        return divide(seen, total, np.ones((1, 1)), floor, cap)


@dataclass(frozen=True)
class Pyramid:
    """Much for the first layer, little for the last, on a straight line (PyramidKV, arXiv 2406.02069).

    beta: the last layer's weight is 1/beta of the mean, >= 1 (20: the code's; the paper searches). With B the mean bytes of
    a row: lo = B / beta, hi = 2B - lo; where hi passes the mean cap of the first layer, hi = that cap, lo = 2B - hi.
    Deviation: the code steps by an integer division and loses or adds tokens (.5 % over at 2,048); here the line is the
    weight of the exact splitter.
    """

    beta: float = 20.0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise ValueError(f"Pyramid: beta is {self.beta}, expected >= 1")

    def allocate(
        self, seen: RowsSeen, total: int, floor: Tensor | None = None, cap: Tensor | None = None
    ) -> Allocation:
        layers, rows = seen.tokens.shape
        if layers == 0 or rows == 0:
            return divide(seen, total, np.ones((1, 1)), floor, cap)
        mean = total / (layers * rows)
        highest = float(limits(seen, floor, cap)[1][0].double().mean())
        last = mean / self.beta
        first = 2 * mean - last
        if first > highest:
            first, last = highest, max(2 * mean - highest, 0.0)
        line = np.linspace(first, last, layers) if layers > 1 else np.ones(1)
        return divide(seen, total, line[:, None], floor, cap)


@dataclass(frozen=True)
class AdaptiveHeads:
    """More for the heads that hold a layer's largest scores (Ada-KV, arXiv 2407.11550).

    Inside a layer and sequence of H heads, with B the mean tokens of a row: n_h = tokens of head h among the layer's top
    H * B scores, w_h = (1 - alpha) * n_h + alpha * B. alpha: the share that is uniform, 0..1 (.2: paper, code);
    normalize: a head's scores first times the share of its mass that its own top B hold.
    Needs scores that are attention mass: scores of different heads are compared. Ties: lower head, then older token.
    Without scores: uniform. Deviation: the code rounds per head and its sum drifts; here the sum is exact.
    """

    alpha: float = 0.2
    normalize: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"AdaptiveHeads: alpha is {self.alpha}, expected 0..1")

    def allocate(
        self, seen: RowsSeen, total: int, floor: Tensor | None = None, cap: Tensor | None = None
    ) -> Allocation:
        if seen.scores is None or seen.tokens.numel() == 0:
            return divide(seen, total, np.ones((1, 1)), floor, cap)
        layers, rows = seen.tokens.shape
        scores = masses("AdaptiveHeads", seen)
        token_bytes = seen.page_bytes[0].double() / SLOTS
        mean = total / (layers * rows) / token_bytes  # tokens of a row: f64 [L]
        weights = torch.zeros(layers, rows, dtype=torch.float64)
        for layer in range(layers):
            for heads in seen.sequences():
                counts = self._count(scores[layer, heads], seen.tokens[layer, heads], float(mean[layer]))
                weight = (1 - self.alpha) * counts.double() + self.alpha * mean[layer]
                weights[layer, heads] = weight * token_bytes[layer]
        return replace(divide(seen, total, weights.numpy(), floor, cap), nans=count_nans(seen))

    def _count(self, scores: Tensor, tokens: Tensor, mean: float) -> Tensor:
        """Tokens of each head among the top H * mean of a layer: i64 [H] from scores f32 [H, N], -1 where no token is."""
        heads, columns = scores.shape
        if self.normalize:
            own = scores.clamp_min(0).sort(1, descending=True).values
            held = own[:, : int(mean + 1e-9)].sum(1) / own.sum(1).clamp_min(torch.finfo(own.dtype).tiny)
            scores = torch.where(scores < 0, scores, scores * held.unsqueeze(1))
        top = min(int(heads * mean + 1e-9), int(tokens.sum()))
        first = scores.flatten().sort(descending=True, stable=True).indices[:top]
        return torch.bincount(first // columns, minlength=heads)


def masses(who: str, seen: RowsSeen) -> Tensor:
    """scores f32 [L, R, N] with 0 for NaN and -1 where no token is. ValueError for what is no mass: negative, inf."""
    assert seen.scores is not None
    scores = torch.where(seen.scores.isnan(), 0.0, seen.scores)
    if (((scores < 0) | scores.isinf()) & seen.present).any():
        raise ValueError(
            f"{who}: a score is negative or infinite, expected attention mass >= 0 (no key norm, no key diversity)"
        )
    return torch.where(seen.present, scores, -1.0)


def count_nans(seen: RowsSeen) -> int:
    """Scores that are NaN where a token is."""
    return 0 if seen.scores is None else int((seen.scores.isnan() & seen.present).sum())


def refuse_other_scores(allocator: Allocator, scorer: str, is_mass: bool) -> None:
    """Unsupported where an allocator compares scores across rows and the scorer's are no attention mass."""
    if "mass" in allocator.needs and not is_mass:
        raise Unsupported(
            f"{type(allocator).__name__}: compares scores of different heads, and those of {scorer} are no attention mass"
        )
