"""Water-filling over power laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstrata import BudgetExceeded
from kvstrata.budget import PowerLaw, RowsSeen
from kvstrata.budget.powerlaw import fill, fit

C, ALPHA = np.array([1.0, 2, 4, 8]), np.array([1, 0.8, 0.5, 0.2])


def objective(b: np.ndarray, c: np.ndarray, alpha: np.ndarray) -> float:  # type: ignore[type-arg]
    return float((c * b**-alpha).sum())


def normalised(total: float, c: np.ndarray, alpha: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    weight = (c * alpha) ** (1 / (alpha + 1))
    return total * weight / weight.sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("total", "shares"), [(2, [0.23, 0.28, 0.29, 0.21]), (100, [0.08, 0.14, 0.27, 0.51])])
def test_shares_of_the_example(total: float, shares: list[float]) -> None:
    assert np.abs(fill(total, C, ALPHA) / total - shares).max() <= 0.0051


@pytest.mark.parametrize(("total", "worse"), [(100, 0.06), (1000, 0.13)])
def test_the_normalised_form_is_worse_by_what_was_said(total: float, worse: float) -> None:
    ratio = objective(normalised(total, C, ALPHA), C, ALPHA) / objective(fill(total, C, ALPHA), C, ALPHA)
    assert abs(ratio - 1 - worse) < 0.01


def test_never_above_the_normalised_form() -> None:
    rng = np.random.default_rng(0)
    better = 0
    for _ in range(1000):
        n = int(rng.integers(1, 12))
        c, alpha, total = rng.exponential(size=n) + 1e-6, rng.uniform(0.05, 4, n), float(10 ** rng.uniform(-1, 5))
        b = fill(total, c, alpha)
        assert abs(b.sum() - total) <= 1e-6 * total
        mine, theirs = objective(b, c, alpha), objective(normalised(total, c, alpha), c, alpha)
        assert mine <= theirs * (1 + 1e-5)
        better += mine < theirs * 0.999
    assert better > 500


def test_equal_alpha_is_the_normalised_form() -> None:
    alpha = np.full(4, 0.7)
    assert np.allclose(fill(50, C, alpha), normalised(50, C, alpha), rtol=1e-5)


def test_floors_caps_and_zero_laws() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        n = int(rng.integers(1, 8))
        c = rng.exponential(size=n) * (rng.random(n) < 0.8)
        low = rng.uniform(0, 3, n)
        high = low + rng.uniform(0, 20, n)
        total = float(low.sum() + rng.uniform(0, 60))
        b = fill(total, c, rng.uniform(0.05, 4, n), floor=low, cap=high)
        assert (b >= low).all() and (b <= high).all()
        reachable = min(total, np.where(c > 0, high, low).sum())
        assert abs(b.sum() - reachable) <= 2e-6 * total
    assert fill(5, [0.0, 0.0], 1.0).tolist() == [0, 0]
    with pytest.raises(BudgetExceeded, match="floors sum to"):
        fill(5, [1.0, 1.0], 1.0, floor=3.0)
    with pytest.raises(ValueError, match="alpha > 0"):
        fill(5, [1.0, 1.0], 0.0)


def test_fit_finds_the_law() -> None:
    rng = np.random.default_rng(2)
    c, alpha = rng.exponential(size=(3, 2)) + 0.1, rng.uniform(0.05, 4, (3, 2))
    tokens = np.array([100.0, 250, 500])
    got = fit(tokens, c[..., None] * tokens ** -alpha[..., None])
    assert np.allclose(got[0], c) and np.allclose(got[1], alpha)
    flat_c, flat_alpha = fit(tokens, [0.3, 0.3, 0.3])
    assert flat_alpha == 0.05 and np.isclose(np.log(flat_c), np.log(0.3) + 0.05 * np.log(tokens).mean())
    assert fit(tokens, [0.5, 0.1, 0.0])[1] == 4
    with pytest.raises(ValueError, match="same number of tokens"):
        fit([5.0, 5.0], [0.1, 0.2])


def test_bytes_follow_the_cost_of_a_token() -> None:
    """Two rows of one law, tokens of the second layer cost four times as much: the parts minimise the error per byte."""
    seen = RowsSeen(torch.full((2, 1), 100_000), torch.tensor([[16, 64]]))
    got = PowerLaw(torch.ones(1, 1).expand(2, 1), torch.ones(2, 1)).allocate(seen, 30_000).bytes.flatten()
    assert got.tolist() == [10_000, 20_000], "b_i ~ sqrt(bytes of a token)"
    with pytest.raises(ValueError, match=r"expected \[L, R\] or \[L, 1\]"):
        PowerLaw(torch.ones(3, 1), torch.ones(2, 1)).allocate(seen, 10)
