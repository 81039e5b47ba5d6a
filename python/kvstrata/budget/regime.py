"""How much is left, in four words (BATS, arXiv 2511.17006; the hysteresis is ours)."""

from __future__ import annotations

from enum import IntEnum

CUTS = (0.7, 0.3, 0.1)
"""A scope is HIGH, MEDIUM, LOW from these shares of its limit on; below the last it is CRITICAL."""
HYSTERESIS = 0.02
"""A regime is left downwards at its cut, upwards at the next cut plus this."""


class Regime(IntEnum):
    """From plenty to nothing."""

    HIGH = 0
    MEDIUM = 1
    LOW = 2
    CRITICAL = 3


_WITH_CUT = (Regime.HIGH, Regime.MEDIUM, Regime.LOW)


def regime(left: float, old: Regime | None = None) -> Regime:
    """The regime at a share ``left`` (remaining / limit) for a scope that was ``old`` (None: new)."""
    down = _cut(left, 0.0)
    if old is None or down > old:
        return down
    return min(old, _cut(left, HYSTERESIS))


def _cut(left: float, above: float) -> Regime:
    for one, cut in zip(_WITH_CUT, CUTS, strict=True):
        if left >= cut + above:
            return one
    return Regime.CRITICAL
