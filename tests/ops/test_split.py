"""summarize, score_pages and select by parts of pages (halves, quarters), whose means have 4 bits, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, make_case
from indices import Index, check_selection, make_index
from tolerances import CODE_TIE, PAGE_SCORE, QUERY_TIE, SUMMARY
from torch import Tensor

from kvstrata import ops, reference

NAN, INF = float("nan"), float("inf")
EMULATED = 0.5
ALL = ("f32", "bf16", "f16", *ops.QUANTIZED)
BF16 = 2.0**-7  # one step
PARTS: dict[Any, int] = {"halves": 2, "quarters": 4}
both = pytest.mark.parametrize("kind", PARTS)


def split(case: Case, kind: Any, **more: Any) -> Tensor:
    settings = {"visible": case.visible, "centre": case.extra.get("centre")} | more
    return ops.summarize(case.pages, case.pools, kind=kind, **settings)


def check(case: Case, blocks: Tensor, kind: str) -> None:
    """Parts as the reference's; of each part scale, codes and spread, around the op's own mean."""
    entries, dim = case.pages.shape[1], case.q.shape[-1]
    size = 8 * PARTS[kind] * (dim + 8) + 64
    assert blocks.shape == (case.rows, -(-entries // 16), size) and blocks.dtype == torch.uint8
    slots = reference.visible_slots(case.pages, case.visible)
    codes, scale, spread, parts = (part[:, :entries] for part in reference.summary_split(blocks, dim))
    mine = parts & slots.unsqueeze(2)
    assert torch.equal(mine, reference.part_slots(case.k, slots, PARTS[kind]))
    some = mine.any(-1)
    for part in (codes, scale, spread):
        assert torch.all(part[~some] == 0)
    k = torch.where(slots.unsqueeze(-1), case.k, 0.0)
    mean = reference.rotate(torch.einsum("rmps,rmsd->rmpd", mine.double(), k)) / mine.sum(-1, keepdim=True)
    want = mean.abs().amax(-1)[some] / 7
    assert torch.all((scale[some] >= want * (1 - SUMMARY)) & (scale[some] <= want * (1 + BF16 + SUMMARY) + 1e-38))
    exact = (mean / scale.double().unsqueeze(-1))[some]
    away = (codes[some].double() - torch.round(exact)).abs()
    ties = (exact - exact.floor() - 0.5).abs() < CODE_TIE
    assert torch.all((away == 0) | (ties & (away == 1))) and codes.abs().max() <= 7
    own = scale.double().unsqueeze(-1) * codes.double()
    square = ((reference.rotate(k).unsqueeze(2) - own.unsqueeze(3)) ** 2).sum(-1).masked_fill(~mine, 0.0).sum(-1)
    wide = (square / (mine.sum(-1).clamp_min(1) * dim))[some]
    assert torch.all((spread[some] >= wide * (1 - 1e-3)) & (spread[some] <= wide * (1 + BF16 + 1e-3)))
    beyond = reference.summary_split(blocks, dim)
    assert all(torch.all(part[:, entries:] == 0) for part in beyond[:3])


@both
@pytest.mark.parametrize("fmt", ALL)
@pytest.mark.parametrize("entries", [1, 33])
def test_parts(isa: str, entries: int, fmt: str, kind: str) -> None:
    case = make_case([entries, entries // 2, entries], formats=(fmt,), masks="ragged", holes=0.1, seed=entries)
    blocks = split(case, kind)
    check(case, blocks, kind)
    assert torch.equal(split(case, kind, threads=3), blocks)


@both
@pytest.mark.parametrize("dim", [32, 48, 96, 128, 512])
def test_parts_by_head_dim(isa: str, dim: int, kind: str) -> None:
    case = make_case([20, 17], formats=ALL, dim=dim, masks="ragged", seed=dim)
    check(case, split(case, kind), kind)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_slots(isa: str, count: int) -> None:
    """Up to four keys have a part each, but for two halves of which one holds three."""
    case = make_case([17], formats=("f32",), seed=count)
    case.visible = torch.full(case.pages.shape, (1 << count) - 1 << 5).to(torch.uint16)
    check(case, split(case, "quarters"), "quarters")
    n = parts_of(case).sum(-1).sort(-1).values
    assert torch.all(n[..., -1] <= (1 if count < 4 else 2)) and torch.all(n.sum(-1) == count)


def parts_of(case: Case) -> Tensor:
    slots = reference.visible_slots(case.pages, case.visible)
    parts = reference.summary_split(split(case, "quarters"), case.q.shape[-1])[3]
    return parts[:, : case.pages.shape[1]] & slots.unsqueeze(2)


def one_page(k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is known of a page of keys [16, D]."""
    pool, page = ops.Pool.allocate("f32", k.shape[1], 1), torch.zeros(1, dtype=torch.int32)
    ops.pack(k[None].contiguous(), torch.zeros(1, *k.shape), page, [pool])
    codes, scale, spread, parts = reference.summary_split(
        ops.summarize(page.view(1, 1), [pool], kind="quarters"), k.shape[1]
    )
    return codes[0, 0], scale[0, 0], spread[0, 0], parts[0, 0]


def test_equal_keys_are_one_part(isa: str) -> None:
    key = torch.randn(64, generator=torch.Generator().manual_seed(0))
    codes, scale, spread, parts = one_page(key.expand(16, 64))
    assert parts.sum(-1).tolist() == [16, 0, 0, 0]
    assert torch.all(codes[1:] == 0) and torch.all(scale[1:] == 0) and torch.all(spread[1:] == 0)
    off = reference.rotate(key.double()) - scale[0].double() * codes[0].double()
    assert off.abs().max() <= 0.5 * scale[0] * (1 + 1e-5)
    assert torch.all(one_page(torch.zeros(16, 64))[1] == 0)


def test_groups_are_found_and_a_key_alone(isa: str) -> None:
    """Three groups far apart and one key unlike all others: four parts."""
    g = torch.Generator().manual_seed(3)
    group = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 0, 1, 2, 1, 0, 2, 2, 1])
    k = 10 * torch.randn(4, 64, generator=g)[group] + 0.1 * torch.randn(16, 64, generator=g)
    parts = one_page(k)[3]
    assert {frozenset(p.nonzero().flatten().tolist()) for p in parts} == {
        frozenset((group == i).nonzero().flatten().tolist()) for i in range(4)
    }


@both
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_keys_that_are_no_numbers(isa: str, bad: float, kind: str) -> None:
    """They show in their own page, and only where a visible slot holds them."""
    case = make_case([20], formats=("f32",))
    before = reference.summary_split(split(case, kind), 64)
    page = case.pages[0, 4].view(1)
    k, v = ops.unpack(page, case.pools)
    k[0, 3, 5] = bad
    ops.pack(k, v, page, case.pools)
    after = reference.summary_split(split(case, kind), 64)
    assert after[1][0, 4].isnan().all() and torch.all(after[0][0, 4] == 0)
    others = torch.arange(32) != 4
    for part, was in zip(after, before, strict=True):
        assert torch.equal(part[0, others], was[0, others])
    hidden = torch.full((1, 20), 0xFFFF)
    hidden[0, 4] = 0xFFFF & ~(1 << 3)
    case.visible = hidden.to(torch.uint16)
    check(case, split(case, kind), kind)


@pytest.fixture(scope="module")
def on_the_cpu() -> list[tuple[Case, str, Tensor]]:
    """Pages of every format and their blocks, made before a test goes to another device."""
    made = [make_case([18, 7], formats=(fmt,), dim=dim, masks="ragged") for fmt in ALL for dim in (48, 128)]
    return [(case, kind, split(case, kind)) for case in made for kind in PARTS]


def test_bits_are_the_cpus(on_the_cpu: list[tuple[Case, str, Tensor]], device: str) -> None:
    for case, kind, blocks in on_the_cpu:
        assert torch.equal(split(case, kind), blocks), (case.formats, case.q.shape[-1], kind)


# --- score_pages and select -------------------------------------------------------------------------------------------


def check_x(index: Index, scale: float | None = None, **more: Any) -> Tensor:
    got = index.x(scale=scale, **more)
    want = reference.score_pages(index.q, index.blocks, index.visible, scale, kind=index.kind, **more)
    assert torch.equal(got == -INF, want == -INF) and not got.isnan().any()
    seen = want != -INF
    off = (got.double() - want).masked_fill(~seen, 0.0).abs()
    exact, delta = reference.query_codes(index.q)
    near = (exact - exact.floor() - 0.5).abs() < QUERY_TIE
    codes, step, _, _ = reference.summary_split(index.blocks, index.q.shape[-1])
    largest = (step.unsqueeze(-1) * codes.abs()).nan_to_num().amax(2)[:, : index.visible.shape[1]]
    slack = (
        abs(index.q.shape[-1] ** -0.5 if scale is None else scale) * delta.unsqueeze(-1) * (near.float() @ largest.mT)
    )
    assert torch.all(off <= PAGE_SCORE * want.masked_fill(~seen, 0.0).abs().clamp_min(1.0) + slack)
    return got


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("entries", [0, 1, 17, 300])
@both
def test_x(isa: str, entries: int, group: int, kind: str) -> None:
    index = make_index(entries, group=group, kind=kind)
    x = check_x(index)
    check_selection(index, 7)
    assert torch.equal(index.x(threads=3), x)


@pytest.mark.parametrize("dim", [32, 48, 96, 128, 512])
@both
def test_x_by_head_dim(isa: str, dim: int, kind: str) -> None:
    index = make_index(33, dim=dim, kind=kind)
    for dtype in (torch.float32, torch.bfloat16):
        index.q = index.q.to(dtype)
        check_x(index, scale=0.25)


@pytest.mark.parametrize("group", [2, 5, 7, 12, 16])
@both
def test_groups_of_any_size(isa: str, group: int, kind: str) -> None:
    index = make_index(50, group=group, rows=1, kind=kind)
    x = check_x(index)
    for g in range(group):
        assert torch.equal(replace(index, q=index.q[:, g : g + 1]).x(), x[:, g : g + 1])


@pytest.mark.parametrize(("softcap", "weight"), [(0.5, 1.0), (30.0, 1.0), (0.0, 0.0), (0.0, 2.0)])
@both
def test_softcap_and_weight(isa: str, softcap: float, weight: float, kind: str) -> None:
    index = make_index(40, kind=kind)
    check_x(index, softcap=softcap, spread_weight=weight)
    check_selection(index, 5, softcap=softcap, spread_weight=weight)


def test_large_logits_of_either_sign(isa: str) -> None:
    """The log of a sum of numbers that overflow: the largest part says it all."""
    index = make_index(33, kind="quarters", holes=0.0)
    for size in (-100.0, 100.0):
        check_x(index, scale=size)


@both
def test_hidden_parts_do_not_count(isa: str, kind: str) -> None:
    """Of a page whose first part alone is visible: what kind mean says of that part's mean."""
    index = make_index(16, rows=1, kind=kind, holes=0.0, more=0)
    codes, step, spread, parts = reference.summary_split(index.blocks, 64)
    for part in range(PARTS[kind]):
        index.visible = (parts[:, :, part].long() << torch.arange(16)).sum(-1).to(torch.uint16)
        x = check_x(index)
        mean = step[:, :, part, None] * codes[:, :, part]
        exact, delta = reference.query_codes(index.q)
        q = delta.unsqueeze(-1) * torch.round(exact)
        want = 0.125 * q @ mean.mT + 0.5 / 64 * torch.einsum("rg,rp->rgp", (index.q**2).sum(-1), spread[:, :, part])
        want = want + parts[:, :, part].sum(-1).float().log().unsqueeze(1)
        seen = index.visible.long() > 0
        assert seen.any() and torch.all(
            (x - want).abs()[:, :, seen[0]] < 1e-3 * want.abs()[:, :, seen[0]].clamp_min(1.0)
        )


def test_parts_say_more_of_a_page_than_its_mean(isa: str) -> None:
    """One key of sixteen that a query seeks: its mean drowns in that of its page, not in that of its part."""
    g = torch.Generator().manual_seed(5)
    k = torch.randn(1, 200, 16, 64, generator=g)
    slots = torch.ones(1, 200, 16, dtype=torch.bool)
    visible = torch.full((1, 200), 0xFFFF).to(torch.uint16)
    hits = {}
    for kind in ("mean", "halves", "quarters"):
        blocks = reference.summarize(k.double(), slots, kind)
        q = 3.0 * k[0, :60, 7].view(60, 1, 64)
        every = blocks.expand(60, -1, -1).contiguous()
        chosen, _, _ = ops.select(q, every, visible.expand(60, -1).contiguous(), 4, kind=kind)  # type: ignore[arg-type]
        hits[kind] = int((chosen.long() == torch.arange(60).unsqueeze(1)).any(1).sum())
    assert hits["mean"] + 6 <= hits["halves"] <= hits["quarters"] - 3, hits


@both
def test_parts_that_are_no_numbers_are_refused(isa: str, kind: str) -> None:
    pairs = PARTS[kind] // 2
    for softcap in (0.0, 20.0):
        index = make_index(33, rows=3, holes=0.0, kind=kind)
        index.visible = torch.full((3, 33), 0xFFFF).to(torch.uint16)
        scales = index.blocks[..., pairs * 1024 : pairs * 1088].view(torch.bfloat16).view(3, -1, pairs, 16, 2)
        parts = reference.summary_split(index.blocks, 64)[3]
        part = int(parts[1, 21].any(-1).nonzero()[-1])
        scales[1, 1, part // 2, 5, part % 2] = NAN
        with pytest.raises(ValueError, match="select: the logits of row 1, entry 21 are not finite"):
            index.select(4, softcap=softcap)
        index.q[0, 2, 3] = INF
        with pytest.raises(ValueError, match="select: the logits of row 0, entry 0 are not finite"):
            index.select(4, softcap=softcap)
