"""pool against the reference and torch's own pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SLOTS
from tolerances import POOL, assert_close
from torch import Tensor
from windows import FULL, Window, make_window

from kvstrata import ops, reference

NAN = float("nan")
KINDS = [("avg", "present"), ("avg", "kernel"), ("max", "present")]
EMULATED = 1.0


def scores(case: Window, group: int = 3) -> Tensor:
    """f32 [R, G, K, 16], NaN where nothing may be read."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(case.pages.shape[0], group, case.pages.shape[1], SLOTS, generator=g)
    return x.masked_fill(~case.slots.unsqueeze(1), NAN)


def pool(case: Window, score: Tensor, **more: Any) -> Tensor:
    out = torch.full((score.shape[0], *score.shape[2:]), NAN)
    return ops.pool(score, case.pages, case.pools, visible=case.visible, out=out, **more)


@pytest.mark.parametrize(("kind", "divide"), KINDS)
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 63, 10_001])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_parity(isa: str, shuffle: bool, kernel: int, kind: str, divide: str) -> None:
    case = make_window([0, 1, 3, 7, 16, 33], dim=4, masks="ragged", holes=0.1, shuffle=shuffle, formats=FULL)
    score = scores(case)
    got = pool(case, score, kernel=kernel, kind=kind, divide=divide)
    ref = reference.pool(score.nan_to_num(0.0).double(), case.positions, case.slots, kernel, kind, divide)
    assert_close(got, ref, POOL, floor=1e-3)
    assert torch.all(got[~case.slots] == 0)


def contiguous(tokens: int) -> Window:
    """One row whose positions are 0, 1, 2, ..., its last page not full."""
    case = make_window([-(-tokens // SLOTS)], dim=4)
    for page, at in zip(case.pages[0].tolist(), torch.arange(case.pages.numel() * SLOTS).view(-1, SLOTS), strict=True):
        case.pools[0].positions()[page & 0xFFFF] = at.to(torch.int32)
    if tokens % SLOTS:
        masks = case.visible.to(torch.int32)
        masks[0, -1] = (1 << tokens % SLOTS) - 1
        case.visible = masks.to(torch.uint16)
    return case


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 21])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100, 1000])
def test_a_contiguous_row_is_torch_pooling(isa: str, tokens: int, kernel: int) -> None:
    case = contiguous(tokens)
    score = scores(case, 4)
    flat = score.flatten(2)[..., :tokens]
    average = torch.nn.functional.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    got = pool(case, score, kernel=kernel, divide="kernel").flatten()[:tokens]
    assert_close(got, average.mean(1)[0], POOL, floor=1e-3)
    most = torch.nn.functional.max_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    assert_close(pool(case, score, kernel=kernel, kind="max").flatten()[:tokens], most.mean(1)[0], POOL)


def test_order_of_slots_does_not_matter(isa: str) -> None:
    """The same tokens in another order of pages get the same bits, from one head."""
    case = make_window([40], dim=4, masks="ragged")
    score = scores(case, 1)
    order = torch.randperm(40)
    got = pool(case, score, kernel=7)
    case.pages, case.visible = case.pages[:, order], case.visible[:, order]
    assert torch.equal(pool(case, score[:, :, order].contiguous(), kernel=7), got[:, order])


def test_nan_stays_near(isa: str) -> None:
    case = contiguous(64)
    score = scores(case, 2)
    score[0, 1, 2, 5] = NAN
    for kind in ("avg", "max"):
        got = pool(case, score, kernel=5, kind=kind).flatten()
        assert got.isnan().nonzero().flatten().tolist() == [35, 36, 37, 38, 39]


def test_bits_do_not_depend_on_threads_or_neighbours(isa: str) -> None:
    case = make_window([40, 3, 20], dim=4, shuffle=True)
    score = scores(case)
    once = pool(case, score, threads=1)
    for threads in (2, 3, 8):
        assert torch.equal(pool(case, score, threads=threads), once)
    for r in range(3):
        assert torch.equal(pool(case.row(r), score[r : r + 1].contiguous()), once[r : r + 1])


@pytest.mark.parametrize("kernel", [0, -1, 2, 4])
def test_bad_input(kernel: int) -> None:
    case = make_window([4, 2], dim=4)
    with pytest.raises(ValueError, match=f"pool: kernel is {kernel}, expected an odd number"):
        pool(case, scores(case), kernel=kernel)
    with pytest.raises(ValueError, match="pool: kind is 'mean', expected one of avg, max"):
        pool(case, scores(case), kind="mean")
    with pytest.raises(ValueError, match=r"pool: score is \[2, 3, 3, 16\], expected \[R=2, G=3, K=4, 16\]"):
        pool(case, scores(case)[:, :, :3].contiguous())
    with pytest.raises(ValueError, match="pool: group is 17 query heads"):
        pool(case, scores(case, 17))
