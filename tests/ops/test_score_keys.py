"""score_keys against the reference, over every format and their mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import KEYS, assert_close
from torch import Tensor
from windows import FULL, Window, make_window

from kvstrata import ops, reference

LENGTHS = [0, 1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64]
NAN, INF = float("nan"), float("inf")
MIXED = [*((f,) for f in (*FULL, *ops.QUANTIZED)), ("bf16", "int4"), ("f32", "int8", "int4", "int2")]
EMULATED = 0.3


def score(case: Window, kind: str, **more: Any) -> Tensor:
    out = torch.full((*case.pages.shape, 16), NAN)
    arguments = {"visible": case.visible, "centre": case.centre, "out": out} | more
    return ops.score_keys(case.pages, case.pools, kind, **arguments)  # type: ignore[arg-type]


def check(case: Window, kind: str) -> None:
    got = score(case, kind)
    assert_close(got, reference.score_keys(case.k, case.slots, kind), KEYS)
    assert torch.all(got[~case.slots] == 0)


@pytest.mark.parametrize("kind", ["norm", "diversity"])
@pytest.mark.parametrize("formats", MIXED, ids="+".join)
@pytest.mark.parametrize("masks", ["full", "tail1", "ragged"])
def test_lengths(isa: str, masks: str, formats: tuple[str, ...], kind: str) -> None:
    check(make_window(LENGTHS, formats=formats, masks=masks, holes=0.1 if masks == "ragged" else 0.0), kind)


@pytest.mark.parametrize("kind", ["norm", "diversity"])
@pytest.mark.parametrize("formats", MIXED, ids="+".join)
@pytest.mark.parametrize("dim", [32, 48, 80, 96, 112, 128, 160, 192, 256, 512])
def test_head_dims(isa: str, dim: int, formats: tuple[str, ...], kind: str) -> None:
    check(make_window([9, 4], formats=formats, dim=dim, masks="ragged", seed=dim), kind)


@pytest.mark.parametrize("kind", ["norm", "diversity"])
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 17, 40, 333])
def test_any_head_dim_of_full_pages(isa: str, dim: int, kind: str) -> None:
    check(make_window([9, 4], formats=FULL, dim=dim, masks="ragged", seed=dim), kind)


@pytest.mark.parametrize("kind", ["norm", "diversity"])
def test_a_real_row(isa: str, kind: str) -> None:
    check(make_window([256, 200], formats=("bf16", "int8"), dim=128, masks="ragged"), kind)


def test_key_diff_of_one_row_is_naive_torch(isa: str) -> None:
    case = make_window([20], formats=("f32",))
    k = case.k[0].flatten(0, 1)
    anchor = torch.nn.functional.normalize(k, dim=-1).mean(0)
    naive = -torch.nn.functional.cosine_similarity(k, anchor.unsqueeze(0), dim=-1)
    assert_close(score(case, "diversity").flatten(), naive, KEYS)
    assert_close(score(case, "norm").flatten(), -k.norm(dim=-1), KEYS)


def test_without_centre(isa: str) -> None:
    case = make_window([5, 9], formats=("int8", "f32"))
    quantized = case.pages >> 28 == 0
    assert case.centre is not None
    moved = case.k - torch.where(quantized[..., None, None], case.centre.double()[:, None, None], 0.0)
    for kind in ("norm", "diversity"):
        assert_close(score(case, kind, centre=None), reference.score_keys(moved, case.slots, kind), KEYS)


def test_zero_keys(isa: str) -> None:
    case = make_window([4], formats=("f32",), spread=0.0)
    assert torch.all(score(case, "diversity") == 0) and torch.all(score(case, "norm") == 0)


def test_one_key_is_its_own_anchor(isa: str) -> None:
    case = make_window([1], formats=("f32",), masks="tail1")
    assert_close(score(case, "diversity")[0, 0, :1], torch.tensor([-1.0]), KEYS)


@pytest.mark.parametrize("kind", ["norm", "diversity"])
def test_what_lies_elsewhere_does_not_matter(isa: str, kind: str) -> None:
    case = make_window([40, 70, 3], formats=("bf16", "int4"), masks="ragged")
    once = score(case, kind)
    for threads in (2, 3, 8):
        assert torch.equal(score(case, kind, threads=threads), once)
    for r, length in enumerate((40, 70, 3)):
        assert torch.equal(score(case.row(r, length), kind)[0], once[r, :length])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_key_shows_in_its_own_place(isa: str, bad: float) -> None:
    case = make_window([9, 9], formats=("f32",))
    before = {kind: score(case, kind) for kind in ("norm", "diversity")}
    page = case.pages[0, 4]
    k, v = ops.unpack(page.view(1), case.pools)
    k[0, 3, 5] = bad
    ops.pack(k, v, page.view(1), case.pools)
    norm, diversity = score(case, "norm"), score(case, "diversity")
    assert not norm[0, 4, 3].isfinite()
    norm[0, 4, 3] = before["norm"][0, 4, 3]
    assert torch.equal(norm, before["norm"])
    assert diversity[0].isnan().all() and torch.equal(diversity[1], before["diversity"][1])
    hidden = case.visible.to(torch.int32)
    hidden[0, 4] &= ~(1 << 3)
    case.visible = hidden.to(torch.uint16)
    assert score(case, "diversity").isfinite().all(), "a hidden slot does not enter"


def test_bad_input() -> None:
    case = make_window([4, 2])
    with pytest.raises(ValueError, match="kind is 'age', expected one of norm, diversity"):
        score(case, "age")
    with pytest.raises(ValueError, match=r"centre is \[2, 5\], expected \[R=2, D=64\]"):
        score(case, "norm", centre=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"pages\[0, 0\] names pool 1, expected one of 1 pools"):
        ops.score_keys(torch.full((1, 1), 1 << 28, dtype=torch.int32), case.pools, "norm")
    assert ops.score_keys(case.pages[:0], case.pools, "norm").shape == (0, 4, 16)
