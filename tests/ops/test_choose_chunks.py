"""choose_chunks: equal to the reference, lambda included. Against a loop and the optimum: tests/budget/test_knapsack.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvstrata import ops, reference

SIZES = [0, 1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 1000]
NAN, INF = float("nan"), float("inf")
EMULATED = 0.6
COST = [[0, 0, 5, 0], [6, 3, 9, 1], [11, 10, 9, 2], [20, 10, 9, 3]]  # the second and third are shorter
FIDELITY = [[0.0, 0.0, 0.1, 0.0], [0.905, 0.5, 1.0, 0.3333], [0.9935, 1.0, 1.0, 0.6667], [1.0, 1.0, 1.0, 1.0]]


def tables() -> tuple[Tensor, Tensor]:
    """The fourth ladder's gains per byte rise by a hair, as rounding may have it."""
    return torch.tensor(COST), torch.tensor(FIDELITY)


def weights(g: torch.Generator, which: str, n: int) -> Tensor:
    if which == "heavy":
        return torch.rand(n, generator=g) ** -2
    if which == "equal":
        return torch.full((n,), 0.1)
    if which == "ties":
        return torch.tensor([-0.0, 0.0, 0.5, 1.0, 2.0])[torch.randint(0, 5, (n,), generator=g)]
    return torch.tensor([3.4e38, 1e-45, 1.2e-38, 1.0])[torch.randint(0, 4, (n,), generator=g)]


def same(w: Tensor, ladder: Tensor, cost: Tensor, fidelity: Tensor, budget: int) -> Tensor:
    step, level, held = ops.choose_chunks(w, ladder, cost, fidelity, budget)
    expected = reference.choose_chunks(w, ladder, cost, fidelity, budget)
    assert torch.equal(step, expected[0]) and step.dtype == torch.uint8
    assert (level, held) == expected[1:], "to the bit"
    return step


@pytest.mark.parametrize("which", ["heavy", "equal", "ties", "extreme"])
def test_is_the_reference(device: str, which: str) -> None:
    cost, fidelity = tables()
    seen = set()
    for n in SIZES:
        g = torch.Generator().manual_seed(n)
        w = weights(g, which, n)
        ladder = torch.randint(0, 4, (n,), generator=g).to(torch.uint8)
        low, high = (int(cost[j][ladder.long()].sum()) for j in (0, -1))
        for part in range(12) if device == "cpu" else (0, 3, 7, 11):  # 64 rounds each take their time emulated
            seen |= set(same(w, ladder, cost, fidelity, low + (high - low) * part // 10).tolist())
    assert seen == {0, 1, 2, 3}


def test_one_step_and_many(device: str) -> None:
    """A ladder without a step up; one of 256 steps."""
    w = torch.rand(40, generator=torch.Generator().manual_seed(2))
    ladder = torch.zeros(40, dtype=torch.uint8)
    assert not same(w, ladder, torch.tensor([[3]]), torch.tensor([[0.5]]), 120).any()
    cost = torch.arange(256).unsqueeze(1) * 3
    fidelity = torch.linspace(0, 1, 256).sqrt().unsqueeze(1)
    for budget in (0, 1, 700, 9000, 40 * 255 * 3):
        same(w, ladder, cost, fidelity, budget)


def test_fidelity_that_falls_is_taken_last(device: str) -> None:
    w = torch.rand(30, generator=torch.Generator().manual_seed(3))
    ladder = torch.zeros(30, dtype=torch.uint8)
    for budget in (0, 55, 100, 180, 290, 300):
        same(w, ladder, torch.tensor([[0], [5], [10]]), torch.tensor([[0.0], [0.9], [0.5]]), budget)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"w": torch.tensor([1.0, NAN, 0.0])}, r"w\[1\] is nan, expected a finite number, 0 or more"),
        ({"w": torch.tensor([1.0, 0.0, INF])}, r"w\[2\] is inf, expected a finite number, 0 or more"),
        ({"w": torch.tensor([-1.0, 0.0, 1.0])}, r"w\[0\] is -1, expected a finite number, 0 or more"),
        ({"w": torch.zeros(2, 3)}, r"w is \[2, 3\], expected \[n\]"),
        ({"w": torch.zeros(3, dtype=torch.float64)}, "w has dtype torch.float64, expected one of"),
        ({"ladder": torch.tensor([0, 4, 0], dtype=torch.uint8)}, r"ladder\[1\] is 4, expected 0 to 3"),
        ({"ladder": torch.zeros(2, dtype=torch.uint8)}, r"ladder is \[2\], expected \[n=3\] \(set by w\)"),
        ({"cost": torch.tensor(COST).T.contiguous().T}, "cost has stride 1 in dimension|cost has stride 4 in its last"),
        ({"cost": torch.tensor(COST[::-1])}, r"cost\[1, 0\] is 11, expected at least 20"),
        ({"cost": torch.tensor([[0] * 4, [1] * 4, [1] * 4, [2] * 4])}, r"cost\[3, 0\] is 2, expected the last of a shorter"),
        ({"cost": torch.zeros(0, 4, dtype=torch.int64), "fidelity": torch.zeros(0, 4)}, r"cost is \[0, 4\], expected 1 to"),
        ({"fidelity": torch.zeros(3, 4)}, r"fidelity is \[3, 4\], expected \[J=4, F=4\] \(set by cost\)"),
        ({"fidelity": torch.full((4, 4), NAN)}, r"fidelity\[0, 0\] is nan, expected a finite number"),
        ({"budget": 14}, "budget is 14, the cheapest steps cost 15"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], expected: str) -> None:
    cost, fidelity = tables()
    ladder = torch.full((3,), 2, dtype=torch.uint8)
    good = {"w": torch.ones(3), "ladder": ladder, "cost": cost, "fidelity": fidelity, "budget": 99}
    assert ops.choose_chunks(**good)[2] == 27
    with pytest.raises(ValueError, match=f"choose_chunks: ({expected})"):
        ops.choose_chunks(**(good | change))
