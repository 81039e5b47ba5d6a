"""More where the error falls faster: water-filling over measured power laws (Plan-and-Budget, arXiv 2505.16122)."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from kvstrata.budget.allocate import Allocation, RowsSeen, divide, limits
from kvstrata.budget.split import Floats
from kvstrata.config import SLOTS, BudgetExceeded

PROBES = (0.10, 0.25, 0.50)
"""Shares of the tokens at which a law is measured."""
LEAST_ALPHA, MOST_ALPHA = 0.05, 4.0
PRECISION = 1e-6
"""Of the total: how near the parts come to it."""


def fill(
    total: float,
    c: ArrayLike,
    alpha: ArrayLike,
    omega: ArrayLike = 1.0,
    floor: ArrayLike = 0.0,
    cap: ArrayLike = np.inf,
) -> Floats:
    """Parts b f64 [n] that minimise sum_i omega_i * c_i * b_i^(-alpha_i), sum b = total, floor <= b <= cap.

    c, omega: f64 [n], >= 0; alpha: f64 [n], > 0; b_i = clip((omega_i c_i alpha_i / lambda)^(1/(alpha_i + 1)), floor, cap),
    log lambda bisected until |sum b - total| <= 1e-6 * total. The sum is less where all caps are met, and where only
    items with omega * c = 0 have room: those stay on their floor. BudgetExceeded if the floors sum above the total.
    Deviation: the paper's normalised form b ~ (c alpha)^(1/(alpha+1)) is right only where all alpha are equal.
    """
    c_, a, o, low, high = (
        np.asarray(v, np.float64) for v in np.broadcast_arrays(np.atleast_1d(c), alpha, omega, floor, cap)
    )
    if not ((c_ >= 0).all() and (o >= 0).all() and (a > 0).all() and np.isfinite(c_ * o * a).all()):
        raise ValueError("power law: expected finite c >= 0, omega >= 0 and alpha > 0")
    low = np.minimum(low, high)
    if fsum(low) > total * (1 + PRECISION):
        raise BudgetExceeded(f"power law: floors sum to {fsum(low)}, the total is {total}")
    active = (c_ * o > 0) & (high > 0)
    target = min(total, float(np.where(active, high, low).sum()))
    if not active.any() or target <= 0:
        return low
    slope = np.log(np.where(active, o * c_ * a, 1.0))

    def parts(log_lambda: float) -> Floats:
        with np.errstate(over="ignore"):
            b = np.exp((slope - log_lambda) / (a + 1))
        return np.clip(np.where(active, b, 0.0), low, high)

    # At the lower end every active part is at least the target, or its cap; upwards until the sum is under it.
    below = float((slope - (a + 1) * np.log(target))[active].min())
    above, step = below, 1.0
    while fsum(parts(above)) > target * (1 + PRECISION) and step < 1e6:
        above, step = above + step, 2 * step
    return _bisect(parts, below, above, target)


def _bisect(parts: object, below: float, above: float, target: float) -> Floats:
    assert callable(parts)
    for _ in range(200):
        middle = (below + above) / 2
        b: Floats = parts(middle)
        held = fsum(b)
        if abs(held - target) <= PRECISION * target:
            return b
        below, above = (middle, above) if held > target else (below, middle)
    return b


def fit(tokens: ArrayLike, error: ArrayLike) -> tuple[Floats, Floats]:
    """(c, alpha) f64 [...] of err(b) = c * b^(-alpha) by least squares on logs.

    tokens: f64 [..., P], tokens kept at each probe, > 0, not all equal; error: f64 [..., P], 1 - the attention mass kept
    for the window queries, >= 0 (under 1e-12 counts as that). alpha is clipped to .05..4, c then fitted anew.
    """
    b, e = np.broadcast_arrays(np.asarray(tokens, np.float64), np.asarray(error, np.float64))
    if b.ndim < 1 or b.shape[-1] < 2 or not (b > 0).all() or not (np.isfinite(e).all() and (e >= 0).all()):
        raise ValueError("power law: expected at least 2 probes with tokens > 0 and finite errors >= 0")
    x, y = np.log(b), np.log(np.maximum(e, 1e-12))
    dx, dy = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    spread = (dx * dx).sum(-1)
    if (spread == 0).any():
        raise ValueError("power law: all probes of a row have the same number of tokens")
    alpha = np.clip(-(dx * dy).sum(-1) / spread, LEAST_ALPHA, MOST_ALPHA)
    return np.exp((y + alpha[..., None] * x).mean(-1)), alpha


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """Bytes that minimise the summed error of laws err(b) = c * b^(-alpha), b in tokens kept of a row.

    c, alpha: f64 [L, R] or [L, 1], from :func:`fit`; omega: weights of the same shapes (None: 1). The parts are found in
    bytes by :func:`fill` and made whole by the splitter, which also gives what caps and zero laws leave over.
    Source: Plan-and-Budget's water-filling, over layers and rows in place of sub-questions (ours).
    """

    c: Tensor
    alpha: Tensor
    omega: Tensor | None = None
    needs: ClassVar[frozenset[str]] = frozenset()

    def allocate(
        self, seen: RowsSeen, total: int, floor: Tensor | None = None, cap: Tensor | None = None
    ) -> Allocation:
        low, high = limits(seen, floor, cap)
        if int(low.sum()) > total:
            raise BudgetExceeded(f"PowerLaw: floors sum to {int(low.sum())} bytes, the total is {total}")
        token_bytes = (seen.page_bytes[0].double() / SLOTS).unsqueeze(1)
        columns = {"c": self.c, "alpha": self.alpha, "omega": torch.ones(1, 1) if self.omega is None else self.omega}
        try:
            c, alpha, omega = (v.double().expand(low.shape) for v in columns.values())
        except RuntimeError as error:
            shapes = {name: list(v.shape) for name, v in columns.items()}
            raise ValueError(f"PowerLaw: {shapes}, expected [L, R] or [L, 1] for {list(low.shape)}") from error
        in_bytes = c * token_bytes**alpha  # c * (bytes / token_bytes)^-alpha
        flat = [v.reshape(-1).numpy() for v in (in_bytes, alpha, omega, low, high)]
        b = fill(float(total), *flat)
        return divide(seen, total, b.reshape(tuple(low.shape)), floor, cap)
