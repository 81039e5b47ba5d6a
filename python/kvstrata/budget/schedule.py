"""How a limit falls while tokens are decoded, and how bytes fall over depth: a profile, sampled at an interval.

Source: budgeted training (REX, arXiv 2107.04197), whose learning rate is here a limit in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, exp, fsum, pi

import numpy as np
from numpy.typing import ArrayLike

from kvstrata.budget.sizes import size
from kvstrata.budget.split import Ints, split
from kvstrata.config import SLOTS

_FORMULAS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda x, _: 1.0,
    "linear": lambda x, _: 1 - x,
    "poly": lambda x, k: (1 - x) ** k,
    "exp": lambda x, k: (exp(-k * x) - exp(-k)) / (1 - exp(-k)),
    "cosine": lambda x, _: (1 + cos(pi * x)) / 2,
    "rex": lambda x, d: (1 - x) / ((1 - d) + d * (1 - x)),
}
_DEFAULTS = {"poly": 2.0, "exp": 3.0, "rex": 0.5}


@dataclass(frozen=True)
class Profile:
    """p(x) for x in [0, 1], p(0) = 1, p(1) = 0 but for ``constant``, which is 1 throughout.

    name: constant, linear (1 - x), poly ((1 - x)^k, k = 2), exp ((e^-kx - e^-k) / (1 - e^-k), k = 3), cosine
    ((1 + cos pi x) / 2) or rex ((1 - x) / (1 - d + d(1 - x)), d = .5); parameter: k > 0, or 0 <= d < 1 (None: the default).
    """

    name: str
    parameter: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _FORMULAS:
            raise ValueError(f"Profile: name is {self.name!r}, expected one of {', '.join(_FORMULAS)}")
        p = self.parameter
        if p is not None and self.name not in _DEFAULTS:
            raise ValueError(f"Profile: {self.name} takes no parameter, got {p}")
        if p is not None and not (0 <= p < 1 if self.name == "rex" else 0 < p <= 500):
            expected = "0 <= d < 1" if self.name == "rex" else "0 < k <= 500"
            raise ValueError(f"Profile: parameter of {self.name} is {p}, expected {expected}")

    def __call__(self, x: float) -> float:
        """p(x); ValueError outside [0, 1]."""
        if not 0 <= x <= 1:
            raise ValueError(f"Profile: x is {x}, expected 0..1")
        parameter = _DEFAULTS.get(self.name, 0.0) if self.parameter is None else self.parameter
        return _FORMULAS[self.name](x, parameter)


@dataclass(frozen=True)
class Schedule:
    """limit(t) = end + (start - end) * p(min(1, I * floor(t / I) / horizon)), t decoded tokens.

    profile: a :class:`Profile` or the name of one; interval: I, tokens between changes of the limit, a multiple of 16;
    horizon: tokens until the limit is ``end``, >= interval; end: bytes (an int, or a string such as "1GiB"). ``constant``
    needs neither horizon nor end. equal_area: p is divided by its mean over the horizon as sampled, so that schedules of
    the same start and end hold equal byte-steps; ``start`` is then the mean, and the first limit lies above it.
    """

    profile: Profile | str = "constant"
    interval: int = 64
    horizon: int | None = None
    end: int | str | None = None
    equal_area: bool = False
    _scale: float = field(init=False, repr=False, compare=False, default=1.0)

    def __post_init__(self) -> None:
        if isinstance(self.profile, str):
            object.__setattr__(self, "profile", Profile(self.profile))
        if self.interval < SLOTS or self.interval % SLOTS:
            raise ValueError(f"Schedule: interval is {self.interval}, expected a positive multiple of {SLOTS}")
        object.__setattr__(self, "end", size("Schedule: end", self.end))
        if self.constant:
            return
        if self.horizon is None or self.end is None:
            raise ValueError(f"Schedule: {self._p.name} needs horizon and end, got {self.horizon} and {self.end}")
        if self.horizon < self.interval:
            raise ValueError(f"Schedule: horizon is {self.horizon}, expected at least the interval, {self.interval}")
        if self.equal_area:
            object.__setattr__(self, "_scale", 1 / self.mean())

    @property
    def constant(self) -> bool:
        """Whether the limit never changes."""
        return self._p.name == "constant"

    @property
    def _p(self) -> Profile:
        assert isinstance(self.profile, Profile)
        return self.profile

    def share(self, tokens: int) -> float:
        """p at ``tokens`` decoded tokens, divided by its mean where ``equal_area``; it changes at multiples of I only."""
        if tokens < 0:
            raise ValueError(f"Schedule: tokens is {tokens}, expected >= 0")
        if self.constant:
            return 1.0
        assert self.horizon is not None
        return self._p(min(1.0, tokens // self.interval * self.interval / self.horizon)) * self._scale

    def limit(self, start: int, tokens: int) -> int:
        """Bytes allowed at ``tokens`` decoded tokens, from ``start`` bytes on; rounded down. ValueError if end > start."""
        if self.constant:
            return start
        assert isinstance(self.end, int)
        if self.end > start:
            raise ValueError(f"Schedule: end is {self.end} bytes, expected at most the start, {start}")
        return self.end + int((start - self.end) * self.share(tokens))

    def mean(self) -> float:
        """Mean of p over the tokens 0..horizon-1, as sampled: each value counts for as long as it holds."""
        if self.constant:
            return 1.0
        assert self.horizon is not None
        starts = range(0, self.horizon, self.interval)
        return fsum(self._p(t / self.horizon) * min(self.interval, self.horizon - t) for t in starts) / self.horizon


def over_depth(profile: Profile | str, total: int, floor: ArrayLike, cap: ArrayLike) -> Ints:
    """Units for each of L layers, i64 [L], in proportion to p(l / L): much for the first, little for the last.

    total: units; floor, cap: i64 [L]. Sum and errors as :func:`kvstrata.budget.split.split`.
    """
    p = Profile(profile) if isinstance(profile, str) else profile
    layers = len(np.asarray(cap))
    return split(total, [p(layer / layers) for layer in range(layers)], floor, cap)
