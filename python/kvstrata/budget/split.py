"""Division by weights between floors and caps. Every division of a budget goes through here.

``level`` divides a real amount, ``split`` a whole number of units without losing or adding one. Both find one level
lambda such that the items clip(lambda * weight, floor, cap) sum to the total. float64; sums are exactly rounded, so that
an item's part does not depend on where it stands in the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvstrata.config import BudgetExceeded

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TIE = 1e-9
"""Fractions of a unit that differ by no more are equal, and the lower index goes first."""
MOST = 1 << 52
"""Units that float64 still tells apart, with a bit to spare."""
_LEAST_WEIGHT = 1e-280
"""Of the largest weight: what a positive weight counts at least, so that no cap / weight overflows."""


def split(
    total: int, weights: ArrayLike, floor: ArrayLike | None = None, cap: ArrayLike | None = None
) -> NDArray[np.int64]:
    """Whole units for n items, in proportion to their weights, between their floors and caps.

    total: units, >= 0; weights: f64 [n], finite, >= 0; floor: i64 [n] (None: 0); cap: i64 [n] (None: no cap). A floor
    above its cap becomes the cap. Items of weight 0 stay on their floor until all others are at their cap, then share
    the rest equally; where all weights are 0, all are 1. What rounding down leaves goes to the largest fractions, ties to
    the lower index.

    Returns i64 [n], whose sum is min(total, sum of caps) exactly. BudgetExceeded if the floors sum above the total;
    ValueError for a bad argument. Source: ours (largest remainder over water-filling).
    """
    w = _weights("split", weights)
    if isinstance(total, bool) or not isinstance(total, int | np.integer) or not 0 <= total <= MOST:
        raise ValueError(f"split: total is {total!r}, expected an int in 0..2^52")
    whole = int(total)
    low, high = _units("floor", floor, len(w), 0), _units("cap", cap, len(w), whole)
    low = low if cap is None else np.minimum(low, high)
    high = np.minimum(high, whole)
    if (least := sum(low.tolist())) > whole:
        raise BudgetExceeded(f"split: floors sum to {least} units, the total is {whole}")
    out = low.copy()
    for group, amount in _groups(min(whole, sum(high.tolist())), w, low, high):
        part = w[group] if w[group].any() else np.ones(len(group))
        x = _water(float(amount), part, low[group].astype(np.float64), high[group].astype(np.float64))
        out[group] = _whole(amount, x, low[group], high[group])
    return out


def level(total: float, weights: ArrayLike, floor: ArrayLike, cap: ArrayLike) -> Floats:
    """The real parts clip(lambda * weight, floor, cap) of ``total``: f64 [n].

    weights, floor, cap: f64 [n], finite; items of weight 0 as in :func:`split`. The sum is min(total, sum of caps), to
    rounding. BudgetExceeded if the floors sum above the total.
    """
    w = _weights("level", weights)
    high = np.broadcast_to(np.asarray(cap, np.float64), w.shape)
    low = np.minimum(np.broadcast_to(np.asarray(floor, np.float64), w.shape), high)
    if not (np.isfinite(high).all() and np.isfinite(low).all() and np.isfinite(total)):
        raise ValueError("level: total, floors and caps must be finite")
    if fsum(low) > total * (1 + 1e-12):
        raise BudgetExceeded(f"level: floors sum to {fsum(low)}, the total is {total}")
    out = low.astype(np.float64)
    for group, amount in _groups(min(total, fsum(high)), w, low, high):
        part = w[group] if w[group].any() else np.ones(len(group))
        out[group] = _water(amount, part, low[group], high[group])
    return out


def _weights(name: str, weights: ArrayLike) -> Floats:
    w = np.asarray(weights, np.float64)
    if w.ndim != 1:
        raise ValueError(f"{name}: weights have shape {list(w.shape)}, expected [n]")
    if not np.isfinite(w).all() or (w < 0).any():
        raise ValueError(f"{name}: a weight is negative or not finite, expected finite weights >= 0")
    largest = w.max(initial=0.0)
    return np.where(w > 0, np.maximum(w / largest, _LEAST_WEIGHT), 0.0) if largest > 0 else w


def _units(name: str, values: ArrayLike | None, n: int, default: int) -> Ints:
    if values is None:
        return np.full(n, default, np.int64)
    v = np.asarray(values)
    if v.shape != (n,) or (n and v.dtype.kind not in "iu"):
        raise ValueError(f"split: {name} is {v.dtype} {list(v.shape)}, expected int64 [{n}]")
    if (v < 0).any():
        raise ValueError(f"split: {name} holds {v.min()}, expected values >= 0")
    return v.astype(np.int64)


def _groups(total: Any, w: Floats, low: Any, high: Any) -> Sequence[tuple[Any, Any]]:
    """(items, amount) of each group that is filled by itself: the weighted first, then those of weight 0."""
    weighted, idle = np.flatnonzero(w > 0), np.flatnonzero(w == 0)
    if not len(weighted) or not len(idle):
        return [(np.arange(len(w)), total)] if len(w) else []
    add = fsum if high.dtype.kind == "f" else lambda values: sum(values.tolist())
    first = min(total - add(low[idle]), add(high[weighted]))
    return [(weighted, first), (idle, total - first)]


def _water(total: float, w: Floats, low: Floats, high: Floats) -> Floats:
    """clip(lambda * w, low, high) with sum ``total``, sum(low) <= total <= sum(high), w > 0."""
    points = np.unique(np.concatenate([[0.0], low / w, high / w]))

    def held(at: float) -> float:
        return fsum(np.clip(at * w, low, high))

    left, right = 0, len(points)  # held(points[left]) <= total, held(points[right]) > total
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if held(points[middle]) <= total else (left, middle)
    at = points[left]
    full = high / w <= at
    free = (low / w <= at) & ~full
    if free.any():
        rest = fsum([total, *(-high[full]), *(-low[~full & ~free])])
        at = rest / fsum(w[free])
    return np.where(full, high, np.where(free, np.clip(at * w, low, high), low))


def _whole(total: int, x: Floats, low: Ints, high: Ints) -> Ints:
    """x rounded to whole units with sum ``total``, within [low, high]."""
    b = np.clip(np.floor(x + TIE).astype(np.int64), low, high)
    missing = total - sum(b.tolist())
    order = _by_fraction(x - b)
    while missing:
        step = 1 if missing > 0 else -1
        for i in order[::step]:
            if missing and (b[i] < high[i] if step > 0 else b[i] > low[i]):
                b[i] += step
                missing -= step
    return b


def _by_fraction(fraction: Floats) -> Ints:
    """Indices by falling fraction; fractions in a chain of gaps of at most TIE are equal, the lower index first."""
    falling = np.argsort(-fraction, kind="stable")
    gap = -np.diff(fraction[falling], prepend=fraction[falling[:1]])
    rank = np.empty(len(fraction), np.int64)
    rank[falling] = np.cumsum(gap > TIE)
    return np.lexsort((np.arange(len(fraction)), rank))
