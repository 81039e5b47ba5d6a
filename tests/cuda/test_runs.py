"""Which block takes which move (csrc/cuda/device/runs.cuh), emulated: each page has one owner, which writes all of it."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

PART = 16


def owners(cuda: ctypes.CDLL, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Of moves i32 [n, 4]: the block that takes each, -1 if none does, and how often, i32 [n]."""
    owner, times = torch.full((len(moves),), -1, dtype=torch.int32), torch.zeros(len(moves), dtype=torch.int32)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (moves, owner, times)]
    assert cuda.kvstrata_cuda_selftest_runs(pointers[0], len(moves), *pointers[1:]) == 0
    return owner, times


def listed(counts: list[int], gaps: list[int]) -> Tensor:
    """Moves into pages 0, 1, ... of so many slots each, in any order; before each of them as many skipped ones as gaps says."""
    g = torch.Generator().manual_seed(sum(counts))
    gap = iter(gaps)
    rows = []
    for page, count in enumerate(counts):
        for slot in torch.randperm(16, generator=g)[:count].tolist():
            rows += [[-1, 99, page, -5], [7, 3, -1, 1 << 30]] * next(gap, 0)
            rows.append([1000, 0, page, slot])
    rows += [[-1, -1, -1, -1]] * next(gap, 0)
    return torch.tensor(rows, dtype=torch.int32).view(-1, 4)


CASES = {
    "whole pages": ([16] * 5, []),
    "a short page first": ([5] + [16] * 4, []),
    "short pages": ([1, 2, 3, 1, 1, 15, 16, 1, 7, 9, 4, 1], []),
    "skipped ones everywhere": ([16, 3, 16, 1, 5], [1] * 41),
    "a stretch inside a page": ([16, 9, 16], [0] * 20 + [60] + [0] * 20),
    "a stretch between pages": ([4, 5], [0] * 4 + [50]),
    "stretches at both ends": ([3], [40, 0, 0, 70]),
    "stretches inside one page": ([16], [30] * 17),
}


@pytest.mark.parametrize("case", CASES)
def test_a_page_has_one_owner(emulated_cuda: ctypes.CDLL, case: str) -> None:
    moves = listed(*CASES[case])
    owner, times = owners(emulated_cuda, moves)
    named = (moves[:, 0] >= 0) & (moves[:, 2] >= 0)
    assert torch.equal(times, named.int())
    for page in moves[named, 2].unique().tolist():
        at = (named & (moves[:, 2] == page)).nonzero()[:, 0]
        assert (owner[at] == at[0] // PART).all()  # the block in whose part its moves begin


def test_nothing_to_take(emulated_cuda: ctypes.CDLL) -> None:
    owner, times = owners(emulated_cuda, torch.full((100, 4), -1, dtype=torch.int32))
    assert (owner == -1).all() and not times.any()
