"""summarize against the reference on what the pages hold, over every format, with NaN wherever nothing may be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, make_case
from tolerances import CODE_TIE, SUMMARY, assert_close
from torch import Tensor
from windows import FULL, Window, make_window

from kvstrata import ops, reference

NAN, INF = float("nan"), float("inf")
EMULATED = 0.4
ALL = (*FULL, *ops.QUANTIZED)
SIZES = [0, 1, 15, 16, 17, 33]


def summarize(case: Window, **more: Any) -> Tensor:
    return ops.summarize(case.pages, case.pools, **{"visible": case.visible, "centre": case.centre} | more)


def ties(exact: Tensor) -> Tensor:
    """Where a value lies so near to the middle between two codes that either may be taken."""
    return (exact - exact.floor() - 0.5).abs() < CODE_TIE


def check(case: Window, blocks: Tensor) -> None:
    """Codes as the reference's but for ties; scale, spread and radius to tolerance, around the op's own mean."""
    rows, entries = case.pages.shape
    dim = case.k.shape[-1]
    assert blocks.shape == (rows, -(-entries // 16), 16 * dim + 192) and blocks.dtype == torch.uint8
    codes, scale, spread, radius = reference.summary_codes(blocks, dim)
    mean = reference.page_means(case.k, case.slots)
    want = mean.abs().amax(-1) / 127
    assert_close(scale[:, :entries], want, SUMMARY, 1e-3)
    exact = torch.where(want.unsqueeze(-1) == 0, mean, mean / want.unsqueeze(-1))
    away = (codes[:, :entries].double() - 128 - torch.round(exact)).abs()
    assert torch.all((away == 0) | (ties(exact) & (away == 1)))
    own = scale.double().unsqueeze(-1) * (codes.double() - 128)
    true_spread, true_radius = reference.page_spreads(case.k, case.slots, own[:, :entries])
    assert_close(spread[:, :entries], true_spread, SUMMARY, 1e-3)
    assert_close(radius[:, :entries], true_radius, SUMMARY)
    nothing = torch.ones(codes.shape[:2], dtype=torch.bool)  # lanes beyond the last entry
    nothing[:, :entries] = ~case.slots.any(-1)
    assert torch.all(codes[nothing] == 128)
    for part in (scale, spread, radius):
        assert torch.all(part[nothing] == 0)


# Formats differ in how they are read, not in which slots count.
@pytest.mark.parametrize(("masks", "fmt"), [("full", "bf16"), ("tail1", "int4"), *(("ragged", fmt) for fmt in ALL)])
@pytest.mark.parametrize("entries", SIZES)
def test_sizes(isa: str, entries: int, masks: str, fmt: str) -> None:
    case = make_window([entries, entries // 2, entries], formats=(fmt,), masks=masks, holes=0.1, seed=entries)
    check(case, summarize(case))


@pytest.mark.parametrize("dim", [32, 48, 80, 96, 112, 128, 160, 192, 256, 496, 512])
def test_head_dims(isa: str, dim: int) -> None:
    for fmt in ALL:
        case = make_window([18, 7], formats=(fmt,), dim=dim, masks="ragged", seed=dim)
        check(case, summarize(case))


def test_a_row_of_all_formats(isa: str) -> None:
    case = make_window([100, 77], formats=ALL, dim=128, masks="ragged", holes=0.05)
    check(case, summarize(case))


@pytest.mark.parametrize("slot", range(16))
def test_each_slot_counts_by_its_own_bit(isa: str, slot: int) -> None:
    for fmt in ALL:
        case = make_window([17], formats=(fmt,), seed=slot)
        case.visible = torch.full(case.pages.shape, 1 << slot, dtype=torch.int64).to(torch.uint16)
        check(case, summarize(case))


def test_decoded_means_are_near_the_true_ones(isa: str) -> None:
    """Half a step of 1/127 of the largest channel; with the blocks' layout undone by hand."""
    dim = 64
    case = make_window([20], formats=("f32",), dim=dim)
    blocks = summarize(case)
    mean, _, _ = reference.summary_parts(blocks, dim)
    want = reference.rotate(case.k.mean(2))
    assert torch.all((mean[:, :20] - want).abs().amax(-1) <= want.abs().amax(-1) / 253)
    block, lane, channel = 1, 3, 37
    code = int(blocks[0, block, channel // 4 * 64 + lane * 4 + channel % 4])
    scale = blocks[0, block, 16 * dim : 16 * dim + 64].clone().view(torch.float32)[lane]
    assert mean[0, 16 * block + lane, channel] == scale * (code - 128)


def test_no_centre_and_a_centre_that_does_not_apply(isa: str) -> None:
    case = make_window([20, 9], formats=("int8", "f32"))
    assert case.centre is not None
    quantized = (case.pages >> 28 == 0)[..., None, None]
    case.k = case.k - torch.where(quantized, case.centre.double()[:, None, None], 0.0)
    check(case, summarize(case, centre=None))
    full = make_window([20, 9], formats=("f32", "bf16"))
    with_centre = summarize(full, centre=torch.full((2, 64), 5.0))
    assert torch.equal(with_centre, summarize(full)), "keys of full pages are whole"


def test_all_slots_are_visible_by_default(isa: str) -> None:
    case = make_window([18, 5], formats=("bf16", "int4"))
    assert torch.equal(summarize(case, visible=None), summarize(case))


def test_zero_and_equal_keys(isa: str) -> None:
    case = make_window([17], formats=("f32",), spread=0.0)
    codes, scale, spread, radius = reference.summary_codes(summarize(case), 64)
    assert torch.all(codes == 128)
    for part in (scale, spread, radius):
        assert torch.all(part == 0)
    pool = ops.Pool.allocate("f32", 64, 1)
    key = torch.randn(64, generator=torch.Generator().manual_seed(0))
    page = torch.zeros(1, dtype=torch.int32)
    ops.pack(key.expand(1, 16, 64).contiguous(), torch.zeros(1, 16, 64), page, [pool])
    mean, spread, radius = reference.summary_parts(ops.summarize(page.view(1, 1), [pool]), 64)
    away = (reference.rotate(key.double()) - mean[0, 0]).norm()
    assert_close(radius[0, 0], away, SUMMARY)
    assert_close(spread[0, 0], away**2 / 64, SUMMARY, 1e-3)


@pytest.mark.parametrize("fmt", ALL)
def test_what_lies_elsewhere_does_not_matter(isa: str, fmt: str) -> None:
    case = make_window([40, 70, 3], formats=(fmt,), masks="ragged")
    once = summarize(case)
    for threads in (2, 3, 8):
        assert torch.equal(summarize(case, threads=threads), once)
    for r, length in enumerate((40, 70, 3)):
        alone = case.row(r, length)
        codes, *facts = reference.summary_codes(summarize(alone), 64)
        want, *wanted = reference.summary_codes(once[r : r + 1], 64)
        assert torch.equal(codes[:, :length], want[:, :length])
        for part, whole in zip(facts, wanted, strict=True):
            assert torch.equal(part[:, :length], whole[:, :length])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_key_shows_in_its_own_page(isa: str, bad: float) -> None:
    case = make_window([20, 20], formats=("f32",))
    before = reference.summary_codes(summarize(case), 64)
    page = case.pages[0, 4]
    k, v = ops.unpack(page.view(1), case.pools)
    k[0, 3, 5] = bad
    ops.pack(k, v, page.view(1), case.pools)
    after = reference.summary_codes(summarize(case), 64)
    assert after[1][0, 4].isnan() and torch.all(after[0][0, 4] == 128)
    others = torch.ones(2, 32, dtype=torch.bool)
    others[0, 4] = False
    for part, was in zip(after, before, strict=True):
        assert torch.equal(part[others], was[others])
    hidden = case.visible.to(torch.int32)
    hidden[0, 4] &= ~(1 << 3)
    case.visible = hidden.to(torch.uint16)
    assert reference.summary_codes(summarize(case), 64)[1].isfinite().all(), "a hidden slot does not enter"


# --- Bounds and value means -------------------------------------------------------------------------------------------


def of_kind(case: Case, kind: Any, **more: Any) -> Tensor:
    return ops.summarize(
        case.pages, case.pools, kind=kind, **{"visible": case.visible, "centre": case.extra.get("centre")} | more
    )


def slots_of(case: Case) -> Tensor:
    return reference.visible_slots(case.pages, case.visible)


def check_bounds(case: Case, blocks: Tensor) -> None:
    """Full pages: the reference's bits. Others: keys are turned back in f32, where a bound may fall on a neighbour."""
    entries, dim = case.pages.shape[1], case.q.shape[-1]
    assert blocks.shape == (case.rows, -(-entries // 16), 64 * dim) and blocks.dtype == torch.uint8
    got = reference.summary_bounds(blocks, dim)
    if not set(case.formats) & set(ops.QUANTIZED):
        assert torch.equal(blocks, reference.summarize(case.k, slots_of(case), "bounds"))
    seen = slots_of(case).any(-1)
    for side, exact, part in zip((1, -1), reference.page_bounds(case.k, slots_of(case)), got, strict=True):
        away = side * (exact[seen] - part[:, :entries][seen])
        step = exact[seen].abs().clamp_min(2.0**-20) * 2.0**-7  # one step of bf16, outwards
        assert torch.all((away >= -1e-6 * exact[seen].abs().amax(-1, keepdim=True)) & (away <= step + 1e-5))
        gone = torch.ones(part.shape[:2], dtype=torch.bool)
        gone[:, :entries] = ~seen
        assert torch.all(part[gone] == 0)


def check_values(case: Case, blocks: Tensor) -> None:
    """The mean's part has the bits of kind mean; codes as the reference's but for ties."""
    entries, dim = case.pages.shape[1], case.q.shape[-1]
    assert blocks.shape == (case.rows, -(-entries // 16), 32 * dim + 320) and blocks.dtype == torch.uint8
    assert torch.equal(blocks[..., : 16 * dim + 192], of_kind(case, "mean"))
    codes, scale, mask = reference.summary_values(blocks, dim)
    seen = slots_of(case)
    mean = reference.page_means(case.v, seen)
    want = mean.abs().amax(-1) / 127
    assert_close(scale[:, :entries], want, SUMMARY, 1e-3)
    exact = torch.where(want.unsqueeze(-1) == 0, mean, mean / want.unsqueeze(-1))
    away = (codes[:, :entries].double() - 128 - torch.round(exact)).abs()
    assert torch.all((away == 0) | (ties(exact) & (away == 1)))
    assert torch.equal(mask[:, :entries], (seen.long() << torch.arange(16)).sum(-1))
    gone = torch.ones(codes.shape[:2], dtype=torch.bool)
    gone[:, :entries] = ~seen.any(-1)
    assert torch.all(codes[gone] == 128) and torch.all(scale[gone] == 0) and torch.all(mask[gone] == 0)


@pytest.mark.parametrize("fmt", ALL)
@pytest.mark.parametrize("entries", [1, 15, 16, 33])
def test_bounds_and_values(isa: str, entries: int, fmt: str) -> None:
    case = make_case([entries, entries // 2, entries], formats=(fmt,), masks="ragged", holes=0.1, seed=entries)
    check_bounds(case, of_kind(case, "bounds"))
    check_values(case, of_kind(case, "mean_value"))


@pytest.mark.parametrize("dim", [32, 48, 96, 128, 256, 512])
def test_bounds_and_values_by_head_dim(isa: str, dim: int) -> None:
    case = make_case([40, 33], formats=ALL, dim=dim, masks="ragged", seed=dim)
    blocks = of_kind(case, "bounds"), of_kind(case, "mean_value")
    check_bounds(case, blocks[0])
    check_values(case, blocks[1])
    for threads in (2, 8):
        assert torch.equal(of_kind(case, "bounds", threads=threads), blocks[0])
        assert torch.equal(of_kind(case, "mean_value", threads=threads), blocks[1])


@pytest.mark.parametrize("slot", [0, 3, 7, 8, 15])
def test_bounds_and_values_of_one_slot(isa: str, slot: int) -> None:
    case = make_case([17 * len(ALL)], formats=ALL, seed=slot)
    case.visible = torch.full(case.pages.shape, 1 << slot, dtype=torch.int64).to(torch.uint16)
    check_bounds(case, of_kind(case, "bounds"))
    check_values(case, of_kind(case, "mean_value"))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bounds_and_values_that_are_no_numbers(isa: str, bad: float) -> None:
    """They show in their own page, and only where a visible slot holds them."""
    case = make_case([20], formats=("f32",))
    bounds, values = of_kind(case, "bounds"), of_kind(case, "mean_value")
    page = case.pages[0, 4].view(1)
    k, v = ops.unpack(page, case.pools)
    k[0, 3, 5], v[0, 3, 9] = bad, bad
    ops.pack(k, v, page, case.pools)
    lo, hi = reference.summary_bounds(of_kind(case, "bounds"), 64)
    codes, scale, _ = reference.summary_values(of_kind(case, "mean_value"), 64)
    assert lo[0, 4].isnan().all() and hi[0, 4].isnan().all()
    assert scale[0, 4].isnan() and torch.all(codes[0, 4] == 128)
    others = torch.arange(32) != 4
    for part, was in zip((lo, hi), reference.summary_bounds(bounds, 64), strict=True):
        assert torch.equal(part[0, others], was[0, others])
    assert torch.equal(codes[0, others], reference.summary_values(values, 64)[0][0, others])
    hidden = torch.full((1, 20), 0xFFFF)
    hidden[0, 4] = 0xFFFF & ~(1 << 3)
    case.visible = hidden.to(torch.uint16)
    assert reference.summary_bounds(of_kind(case, "bounds"), 64)[0].isfinite().all()
    assert reference.summary_values(of_kind(case, "mean_value"), 64)[1].isfinite().all()


def test_bounds_are_rounded_outwards(isa: str) -> None:
    """Around one, between two subnormals, and on a bf16 number, which stays."""
    up, inside = 1 + 2.0**-7, 1 + 2.0**-20
    pool, page = ops.Pool.allocate("f32", 32, 1), torch.zeros(1, dtype=torch.int32)
    k = torch.zeros(1, 16, 32)
    k[..., 0], k[..., 1], k[..., 2], k[..., 3] = inside, -inside, 2.0**-149, 1.5
    ops.pack(k, k, page, [pool])
    lo, hi = reference.summary_bounds(ops.summarize(page.view(1, 1), [pool], kind="bounds"), 32)
    assert lo[0, 0, :5].tolist() == [1.0, -up, 0.0, 1.5, 0.0]
    assert hi[0, 0, :5].tolist() == [up, -1.0, 2.0**-133, 1.5, 0.0]


@pytest.fixture(scope="module")
def on_the_cpu() -> list[tuple[Case, dict[str, Tensor]]]:
    """Pages of every format and their blocks of every kind, made before a test goes to another device."""
    made = [make_case([18, 7], formats=(fmt,), dim=dim, masks="ragged") for fmt in ALL for dim in (48, 128, 256)]
    return [(case, {kind: of_kind(case, kind) for kind in ("mean", "bounds", "mean_value")}) for case in made]


def test_bits_are_the_cpus(on_the_cpu: list[tuple[Case, dict[str, Tensor]]], device: str) -> None:
    for case, blocks in on_the_cpu:
        for kind, want in blocks.items():
            assert torch.equal(of_kind(case, kind), want), (case.formats, case.q.shape[-1], kind)


def masks(*shape: int) -> Tensor:
    return torch.full(shape, 0xFFFF, dtype=torch.int64).to(torch.uint16)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"pages": torch.zeros(4, dtype=torch.int32)}, r"summarize: pages is \[4\], expected \[R, M\]"),
    ({"pages": torch.zeros(2, 4, dtype=torch.int64)}, r"summarize: pages has dtype i64, expected i32"),
    ({"pages": torch.full((2, 4), 1 << 28, dtype=torch.int32)}, r"summarize: pages\[0, 0\] names pool 1, expected one"),
    ({"pages": torch.full((2, 4), -2, dtype=torch.int32)}, r"summarize: pages\[0, 0\] is -2, expected a page or -1"),
    (
        {"pages": torch.full((2, 4), 999, dtype=torch.int32)},
        r"summarize: pages\[0, 0\] names page 999 of pool 0 slab 0",
    ),
    ({"visible": masks(2, 5)}, r"summarize: visible is \[2, 5\], expected \[R=2, M=4\]"),
    ({"visible": torch.zeros(2, 4, dtype=torch.int32)}, r"summarize: visible has dtype i32, expected u16"),
    ({"centre": torch.zeros(2, 5)}, r"summarize: centre is \[2, 5\], expected \[R=2, D=64\]"),
    ({"centre": torch.zeros(2, 64, dtype=torch.bfloat16)}, r"summarize: centre has dtype bf16, expected f32"),
    ({"kind": "means"}, r"summarize: kind is 'means', expected one of mean, bounds, mean_value"),
    ({"threads": -1}, r"summarize: threads is -1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_bad_input(change: dict[str, Any], message: str) -> None:
    case = make_window([4, 2])
    arguments = {"pages": case.pages, "pools": case.pools} | change
    with pytest.raises(ValueError, match=message):
        ops.summarize(arguments.pop("pages"), arguments.pop("pools"), **arguments)


@pytest.mark.parametrize("dim", [8, 16, 40, 72, 528])
def test_head_dims_without_summaries(dim: int) -> None:
    page = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"head_dim.* {dim}|{dim}.*head_dim"):
        ops.summarize(page, [ops.Pool.allocate("f32", dim, 1)])


def test_no_rows(isa: str) -> None:
    pool = ops.Pool.allocate("bf16", 64, 1)
    for kind, size in (("mean", 1216), ("bounds", 4096), ("mean_value", 2368)):
        none = ops.summarize(torch.zeros(0, 4, dtype=torch.int32), [pool], kind=kind)  # type: ignore[arg-type]
        assert none.shape == (0, 1, size) and ops.summary_bytes(64, kind) == size  # type: ignore[arg-type]
        assert ops.summarize(torch.zeros(2, 0, dtype=torch.int32), [pool], kind=kind).shape == (2, 0, size)  # type: ignore[arg-type]
