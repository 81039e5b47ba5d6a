"""Schedules: profiles, sampling, equal areas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvstrata.budget.schedule import Profile, Schedule, over_depth

ALL = ["constant", "linear", "poly", "exp", "cosine", "rex"]


def test_ends() -> None:
    for name in ALL:
        assert Profile(name)(0) == pytest.approx(1, abs=1e-12)
        assert Profile(name)(1) == pytest.approx(1 if name == "constant" else 0, abs=1e-12)


@pytest.mark.parametrize(("x", "value"), [(0.25, 0.857), (0.5, 0.667), (0.75, 0.400), (0.9, 0.182)])
def test_rex_values(x: float, value: float) -> None:
    assert abs(Profile("rex")(x) - value) <= 1e-3
    assert Profile("rex")(x) == pytest.approx(2 * (1 - x) / (2 - x))


@pytest.mark.parametrize(
    ("profile", "mean"),
    [
        (Profile("constant"), 1.0),
        (Profile("linear"), 0.5),
        (Profile("poly"), 1 / 3),
        (Profile("poly", 4), 0.2),
        (Profile("exp"), 0.281),
        (Profile("cosine"), 0.5),
        (Profile("rex"), 0.614),
        (Profile("rex", 0.9), 0.827),
        (Profile("rex", 0), 0.5),
    ],
)
def test_means(profile: Profile, mean: float) -> None:
    integral = np.mean([profile((i + 0.5) / 20_000) for i in range(20_000)])
    assert abs(integral - mean) <= 1e-3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("equal_area", [False, True])
def test_the_limit_changes_at_multiples_of_the_interval_only(name: str, equal_area: bool) -> None:
    schedule = Schedule(name, interval=48, horizon=1000, end=10_000, equal_area=equal_area)
    limits = [schedule.limit(1_000_000, t) for t in range(1200)]
    changes = [t for t in range(1, 1200) if limits[t] != limits[t - 1]]
    assert all(t % 48 == 0 for t in changes)
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == (1_000_000 if name == "constant" else 10_000)
    assert name == "constant" or len(changes) == 21, "every multiple of 48 up to 1008, where x is 1"
    if not equal_area:
        assert limits[0] == 1_000_000
        x = 48 * 10 / 1000
        assert limits[500] == 10_000 + int(990_000 * Profile(name)(x)) or name == "constant"


def test_equal_areas() -> None:
    """Byte-steps over the horizon, whatever the profile, the interval and the rest of the last one."""
    start, end = 1 << 34, 1 << 30
    areas = [
        math.fsum(Schedule(name, interval, 1000, end, equal_area=True).limit(start, t) for t in range(1000))
        for name in ALL[1:]
        for interval in (16, 48, 512)
    ]
    assert np.ptp(areas) <= 1e-6 * areas[0]
    assert areas[0] == pytest.approx(1000 * start, rel=1e-6)
    plain = [math.fsum(Schedule(n, 16, 4096, 0).limit(start, t) for t in range(4096)) for n in ("rex", "linear")]
    assert plain[0] / plain[1] == pytest.approx(1.23, abs=0.01), "REX is 23 % larger than linear"


def test_sizes_are_read() -> None:
    schedule = Schedule("rex", interval=256, horizon=4096, end="1GiB")
    assert schedule.end == 1 << 30
    assert schedule.limit(2 << 30, 0) == 2 << 30 and schedule.limit(2 << 30, 5000) == 1 << 30
    assert schedule == Schedule(Profile("rex"), 256, 4096, 1 << 30)


def test_over_depth() -> None:
    assert over_depth("linear", 100, [0] * 4, [1000] * 4).tolist() == [40, 30, 20, 10]
    assert over_depth("constant", 10, [0] * 3, [10] * 3).tolist() == [4, 3, 3]
    assert over_depth("linear", 100, [0, 0, 0, 25], [30, 1000, 1000, 1000]).tolist() == [30, 27, 18, 25]
    for name in ALL:
        assert over_depth(name, 12_345, [3] * 7, [5000] * 7).sum() == 12_345


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 40}, "interval is 40, expected a positive multiple of 16"),
        ({"interval": 0}, "interval is 0"),
        ({"profile": "step"}, "name is 'step', expected one of constant"),
        ({"profile": "linear"}, "linear needs horizon and end"),
        ({"profile": "linear", "end": 1, "horizon": 32}, "horizon is 32, expected at least the interval, 64"),
        ({"profile": "linear", "horizon": 64, "end": "1 gig"}, "'1 gig' is not understood"),
        ({"profile": "linear", "horizon": 64, "end": -1}, "end is -1"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


def test_refused_profiles_and_limits() -> None:
    for name, parameter in [("rex", 1.0), ("rex", -0.1), ("poly", 0.0), ("exp", -1.0), ("linear", 2.0)]:
        with pytest.raises(ValueError, match="parameter"):
            Profile(name, parameter)
    with pytest.raises(ValueError, match=r"x is 1\.5"):
        Profile("linear")(1.5)
    with pytest.raises(ValueError, match="end is 200 bytes, expected at most the start, 100"):
        Schedule("linear", 16, 64, 200).limit(100, 0)
    with pytest.raises(ValueError, match="tokens is -1"):
        Schedule("linear", 16, 64, 0).limit(100, -1)
