"""Regimes: once per crossing and direction, in order, outside the lock."""

from __future__ import annotations

import pytest

from kvstrata.budget import Hold, Ledger, Regime, Scope
from kvstrata.budget.regime import regime


@pytest.mark.parametrize("cut", [0.7, 0.3, 0.1])
def test_a_sawtooth_fires_once_per_crossing_and_direction(cut: float) -> None:
    ledger = Ledger(near=1000)
    seen: list[tuple[Regime, Regime]] = []
    ledger.on_regime(ledger.root, lambda scope, old, new: seen.append((old, new)))
    base = 1000 - int(cut * 1000) - 50
    ledger.reserve(ledger.root, near_bytes=base).commit()
    seen.clear()
    for _ in range(5):
        for _ in range(10):
            ledger.reserve(ledger.root, near_bytes=10).commit()
        for _ in range(10):
            ledger.free(ledger.root, near_bytes=10)
    upper = {0.7: Regime.HIGH, 0.3: Regime.MEDIUM, 0.1: Regime.LOW}[cut]
    down = (upper, Regime(upper + 1))
    assert seen == [down, down[::-1]] * 5


@pytest.mark.parametrize("cut", [0.7, 0.3, 0.1])
def test_noise_around_a_cut_fires_once(cut: float) -> None:
    ledger = Ledger(near=1000)
    seen: list[Regime] = []
    base = 1000 - int(cut * 1000)
    ledger.reserve(ledger.root, near_bytes=base - 20).commit()
    ledger.on_regime(ledger.root, lambda scope, old, new: seen.append(new))
    hold = ledger.reserve(ledger.root, near_bytes=10)
    for _ in range(20):
        ledger.reserve(ledger.root, near_bytes=20).rollback()
    assert hold.left("near_bytes") == 10
    assert len(seen) == 1


def test_regime_cuts() -> None:
    assert [regime(x) for x in (1, 0.7, 0.69, 0.3, 0.29, 0.1, 0.09, 0, -1)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert regime(0.71, Regime.MEDIUM) == Regime.MEDIUM and regime(0.72, Regime.MEDIUM) == Regime.HIGH
    assert regime(0.11, Regime.CRITICAL) == Regime.CRITICAL and regime(0.5, Regime.CRITICAL) == Regime.MEDIUM
    assert regime(0.71, Regime.CRITICAL) == Regime.MEDIUM, "over several cuts, each by its own hysteresis"


def test_the_worst_resource_decides() -> None:
    ledger = Ledger(near=1000, plans=2, decode_tokens=0)
    assert ledger.report().regime == Regime.CRITICAL, "of one limited resource nothing is left"
    ledger.set_limit(ledger.root, decode_tokens=None)
    assert ledger.report().regime == Regime.HIGH
    ledger.reserve(ledger.root, plans=1, near_bytes=1).commit()
    assert ledger.report().regime == Regime.MEDIUM
    assert ledger.report(ledger.open()).regime == Regime.HIGH, "a scope without limits of its own"


def test_callbacks_run_in_order_outside_the_lock(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(near=100)
    scope = ledger.open(near_bytes=100)
    seen: list[tuple[str, Regime]] = []

    def call(owner: Scope, old: Regime, new: Regime) -> None:
        seen.append((owner.level, new))
        assert ledger.report(owner).near_bytes.limit == 100, "the lock is free"
        if old == Regime.HIGH and owner.level == "cache":
            ledger.reserve(scope, near_bytes=50).commit()  # crosses again, inside the callback
            raise OSError("of the callback")

    ledger.on_regime(scope, call)
    ledger.on_regime(ledger.root, call)
    hold = ledger.reserve(scope, near_bytes=40)
    assert isinstance(hold, Hold) and hold.left("near_bytes") == 40, "an error of a callback loses no hold"
    assert seen == [("cache", 1), ("global", 1), ("cache", 2), ("global", 2)]
    assert "the callback of cache 1 raised at HIGH -> MEDIUM" in caplog.text
    seen.clear()
    hold.rollback()
    assert [new for _, new in seen] == [1, 1]
