"""The splitter: exact sums, floors, caps, ties."""

from __future__ import annotations

import numpy as np
import pytest

from kvstrata import BudgetExceeded
from kvstrata.budget.split import TIE, level, split


@pytest.mark.parametrize(
    ("total", "weights", "floor", "cap", "expected"),
    [
        (100, [1, 2, 3, 4], None, None, [10, 20, 30, 40]),
        (7, [1, 1, 1], None, None, [3, 2, 2]),
        (101, [0.1, 0.1, 0.1, 0], [5] * 4, [30, 30, 30, 100], [30, 30, 30, 11]),
        (0, [1, 2], None, None, [0, 0]),
        (9, [0, 0, 0], None, None, [3, 3, 3]),
        (5, [3], None, [9], [5]),
        (50, [3], None, [9], [9]),
        (10, [1, 0, 0], None, [4, 9, 1], [4, 5, 1]),  # weight 0: the rest, equally, up to the cap
        (10, [1, 0], [0, 3], [20, 20], [7, 3]),  # weight 0: its floor while others have room
        (12, [1, 1], [8, 8], [3, 20], [3, 9]),  # a floor above its cap becomes the cap
        (100, [1e300, 1, 1], None, None, [100, 0, 0]),
        (100, [1e100, 1e-100, 1], None, [50, 100, 100], [50, 0, 50]),
        (1, [0.3, 0.3, 0.4], None, None, [0, 0, 1]),
    ],
)
def test_examples(total: int, weights: list, floor: list | None, cap: list | None, expected: list) -> None:  # type: ignore[type-arg]
    assert split(total, weights, floor, cap).tolist() == expected


def test_floors_above_the_total() -> None:
    with pytest.raises(BudgetExceeded, match="floors sum to 11 units, the total is 10"):
        split(10, [1, 1], [8, 8], [3, 20])
    with pytest.raises(BudgetExceeded, match="floors sum to"):
        level(10.0, [1, 1], [8, 8], [20, 20])


def draw(rng: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    n = int(rng.choice([1, 2, 3, 5, 17]))
    w = rng.exponential(size=n) ** rng.choice([1, 4])
    kind = rng.integers(6)
    if kind == 0:
        w[rng.random(n) < 0.5] = 0
    if kind == 1:
        w[rng.integers(n)] = 1e18
    floor = rng.integers(0, 50, n) * (rng.random(n) < 0.5)
    cap = floor + rng.integers(0, 400, n)
    if kind == 2:
        floor = cap.copy()
    total = int(floor.sum() + rng.integers(0, 2000))
    return (0, w, np.zeros_like(floor), cap) if kind == 3 else (total, w, floor, cap)


def test_random_inputs_are_split_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        total, w, floor, cap = draw(rng)
        got = split(total, w, floor, cap)
        assert got.dtype == np.int64
        assert got.sum() == min(total, cap.sum())
        assert (got >= floor).all() and (got <= cap).all()


def test_parts_are_the_level_rounded() -> None:
    """Every part lies within a unit of the real one, and the rounded-up have the larger fractions."""
    rng = np.random.default_rng(1)
    for _ in range(1000):
        total, w, floor, cap = draw(rng)
        real = level(total, w, floor, cap)
        got = split(total, w, floor, cap)
        assert abs(real.sum() - min(total, cap.sum())) < 1e-6
        assert np.abs(got - real).max() < 1 + TIE
        up, down = got > real + 1e-6, got < real - 1e-6
        for i in np.flatnonzero(up):
            for j in np.flatnonzero(down & (w > 0)):
                assert real[i] % 1 >= real[j] % 1 - 1e-6


def test_the_level_is_one() -> None:
    """Unclipped items of positive weight stand at one multiple of their weight: what makes it a proportion."""
    rng = np.random.default_rng(2)
    checked = 0
    for _ in range(1000):
        total, w, floor, cap = draw(rng)
        real = level(total, w, floor, cap)
        free = (real > floor + 1e-6) & (real < cap - 1e-6) & (w > 0)
        if free.sum() > 1:
            ratio = real[free] / w[free]
            assert ratio.max() <= ratio.min() * (1 + 1e-9)
            checked += 1
    assert checked > 100


def test_permuted_items_keep_their_parts() -> None:
    rng = np.random.default_rng(3)
    for _ in range(2000):
        total, w, floor, cap = draw(rng)
        order = rng.permutation(len(w))
        plain, permuted = split(total, w, floor, cap), split(total, w[order], floor[order], cap[order])
        differ = plain[order] != permuted
        if differ.any():  # only items whose fractions tie may trade a unit
            fraction = (level(total, w, floor, cap)[order] + TIE) % 1
            assert np.ptp(fraction[differ]) <= 3 * TIE


def test_huge_totals_stay_exact() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        w = rng.random(40)
        total = int(rng.integers(1 << 40, 1 << 52))
        assert sum(split(total, w).tolist()) == total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, [1.0]), "total is -1"),
        ((1.5, [1.0]), r"total is 1\.5"),
        ((True, [1.0]), "total is True"),
        ((1, [-1.0]), "negative or not finite"),
        ((1, [float("nan")]), "negative or not finite"),
        ((1, [float("inf")]), "negative or not finite"),
        ((1, [1.0, 1.0], [0]), r"floor is int64 \[1\], expected int64 \[2\]"),
        ((1, [1.0], [0], [0.5]), "cap is float64"),
        ((1, [1.0], [-2]), "floor holds -2"),
        ((1, [[1.0]]), r"shape \[1, 1\]"),
    ],
)
def test_refused(arguments: tuple, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        split(*arguments)
