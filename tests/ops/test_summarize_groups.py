"""summarize_groups against the reference on random summaries, with NaN wherever nothing may be read; select by its groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from indices import Index, make_index
from rotary import rotary_pages, summaries_of
from tolerances import CODE_TIE, LSE, SUMMARY, VOTE_TIE, assert_close
from torch import Tensor

from kvstrata import ops, reference

NAN, INF = float("nan"), float("inf")
LEAST = 4


def groups_of(index: Index, **more: Any) -> Tensor:
    return ops.summarize_groups(index.blocks, index.visible, head_dim=index.q.shape[-1], kind=index.kind, **more)


def select(index: Index, k: int, expand: float = 0.25, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return index.select(k, groups=groups_of(index), expand=expand, **more)


# --- summarize_groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "mean_value"])
@pytest.mark.parametrize("entries", [0, 31, 32, 33, 511, 512, 545, 1100])
def test_groups(isa: str, entries: int, kind: str) -> None:
    index = make_index(entries, kind=kind)
    got, want = groups_of(index), reference.summarize_groups(index.blocks, index.visible, 64)
    assert got.shape == want.shape == (2, -(-(entries // 32) // 16), 16 * 64 + 192)
    (code, scale, *rest), (want_code, want_scale, *_) = (reference.summary_codes(b, 64) for b in (got, want))
    assert_close(scale, want_scale.double(), SUMMARY, 1e-3)
    off = (code.int() - want_code.int()).abs()
    assert off.amax() <= 1 if off.numel() else True
    assert off.float().mean() <= 2 * CODE_TIE if off.numel() else True
    assert all(torch.all(part == 0) for part in rest)
    for threads in (2, 8):
        assert torch.equal(groups_of(index, threads=threads), got)


@pytest.mark.parametrize("dim", [32, 48, 96, 128, 512])
def test_groups_by_head_dim(isa: str, dim: int) -> None:
    index = make_index(64, dim=dim)
    got, want = groups_of(index), reference.summarize_groups(index.blocks, index.visible, dim)
    mean, want_mean = (reference.summary_parts(b, dim)[0] for b in (got, want))
    assert torch.all((mean - want_mean).abs() <= 1.001 * reference.summary_codes(want, dim)[1].unsqueeze(-1))


def test_pages_count_as_their_visible_slots(isa: str) -> None:
    """One page of sixteen slots and one of one: the mean lies where their keys' mean does."""
    index = make_index(32, rows=1, holes=0.0)
    visible = torch.zeros(1, 32, dtype=torch.int32)
    visible[0, 3], visible[0, 20] = 0xFFFF, 1
    index.visible = visible.to(torch.uint16)
    mean = reference.summary_parts(index.blocks[:, :2], 64)[0][0]
    got = reference.summary_parts(groups_of(index), 64)[0][0, 0]
    assert_close(got, ((16 * mean[3] + mean[20]) / 17).double(), 0.02)


def test_a_group_without_a_visible_slot(isa: str) -> None:
    index = make_index(64, rows=1)
    index.visible = torch.zeros(1, 64).to(torch.uint16)
    groups = groups_of(index)
    assert torch.all(groups[..., : 16 * 64] == 128) and torch.all(groups[..., 16 * 64 :] == 0)


def test_a_visible_page_that_is_no_number_shows(isa: str) -> None:
    index = make_index(128, rows=1, holes=0.0)
    index.blocks[0, 3, 16 * 64 : 16 * 64 + 64].view(torch.float32)[7] = NAN
    scale = reference.summary_codes(groups_of(index), 64)[1][0, :4]
    assert scale.isnan().tolist() == [False, True, False, False]


# --- select in two levels ---------------------------------------------------------------------------------------------


def levels(index: Index, expand: float, base: Tensor | None, aggregate: str) -> tuple[Tensor, Tensor]:
    """The reference's logits of pages that are looked into, and of the other groups."""
    x = index.x().double()
    groups = reference.score_groups(index.q, groups_of(index), index.visible)
    return reference.look_into(x, groups, expand, base, aggregate)


@pytest.mark.parametrize(("group", "aggregate"), [(1, "sum"), (4, "sum"), (8, "max")])
@pytest.mark.parametrize("entries", [16, 31, 33, 160, 512, 1100])
def test_selection_in_two_levels(isa: str, entries: int, group: int, aggregate: str) -> None:
    index = make_index(entries, group=group)
    some = torch.logsumexp(index.x(), -1) + torch.randn(2, group, generator=torch.Generator().manual_seed(1))
    for expand, base in ((0.25, None), (0.25, some), (0.6, None)):
        x, others = levels(index, expand, base, aggregate)
        for k in (0, 12, 90, entries):
            got, count, rest = select(index, k, expand, lse_base=base, aggregate=aggregate)
            want, want_count, _ = reference.select(x, k, base, aggregate, others=others)
            whole = torch.cat([x, others], -1)
            vote = reference.page_votes(whole, base, aggregate)
            assert torch.equal(count, want_count)
            left = whole.clone()
            for r, n in enumerate(count.tolist()):
                mine, theirs = got[r, :n].tolist(), want[r, :n].tolist()
                assert torch.all(got[r, n:] == -1) and mine == sorted(set(mine))
                for p in set(mine) ^ set(theirs):
                    last = float(vote[r, theirs].min())
                    assert abs(float(vote[r, p]) - last) <= VOTE_TIE * last
                left[r, :, mine] = -INF
            assert_close(rest, torch.logsumexp(left, -1), LSE)


def test_all_groups_are_as_one_level(isa: str) -> None:
    for entries in (130, 1100):
        index = make_index(entries, kind="mean_value")
        zones = [torch.full((2, 50), 7, dtype=torch.int32) for _ in range(2)]
        one, two = index.select(9, zone=zones[0], mass=0.7), select(index, 9, 1.0, zone=zones[1], mass=0.7)
        for a, b in zip((*one[:2], zones[0]), (*two[:2], zones[1]), strict=True):
            assert torch.equal(a, b)
        assert_close(two[2], one[2].double(), LSE)


def test_few_groups_are_all_looked_into(isa: str) -> None:
    index = make_index(LEAST * 32 + 20)
    for a, b in zip(select(index, 9, 0.01)[:2], index.select(9)[:2], strict=True):
        assert torch.equal(a, b)


def test_ties_go_to_the_lower_group(isa: str) -> None:
    index = make_index(1024, holes=0.0, rows=1, more=0)
    slots = torch.ones(1, 1024, 16, dtype=torch.bool)
    index.blocks[:] = reference.summarize(index.k[:, :1].expand_as(index.k), slots)
    index.visible = torch.full((1, 1024), 0xFFFF).to(torch.uint16)
    entries, count, _ = select(index, 400, 0.25)
    assert count.tolist() == [8 * 32] and entries[0, :256].tolist() == list(range(256))


def test_a_row_is_the_same_alone_in_two_levels(isa: str) -> None:
    index = make_index(700, rows=5)
    chosen = select(index, 12)
    for threads in (2, 3, 8):
        for a, b in zip(select(index, 12, threads=threads), chosen, strict=True):
            assert torch.equal(a, b)
    for r in range(5):
        for a, b in zip(select(index.row(r), 12), chosen, strict=True):
            assert torch.equal(a[0], b[r])


def test_the_zone_is_of_what_was_looked_into(isa: str) -> None:
    index = make_index(1024, rows=2, kind="mean_value")
    masks = index.visible.to(torch.int32)
    masks[:, ::5] &= 1  # some hidden since
    index.visible = masks.to(torch.uint16)
    zone = torch.full((2, 1024), 7, dtype=torch.int32)
    selected, count, _ = select(index, 10, 0.25, zone=zone)
    x, _ = levels(index, 0.25, None, "sum")
    made = reference.summary_values(index.blocks, 64)[2][:, :1024]
    for r in range(2):
        may = (x[r] != -INF).any(0) & (made[r] == masks[r])
        may[selected[r, : count[r]].long()] = False
        assert zone[r][zone[r] >= 0].tolist() == may.nonzero().flatten().tolist()


def test_a_page_that_cannot_be_ranked_is_found_in_any_group(isa: str) -> None:
    """Its group is looked into whatever its vote would be; once the page is hidden, nothing is wrong."""
    index = make_index(1024, rows=2, holes=0.0)
    index.blocks[1, 50, 16 * 64 : 16 * 64 + 64].view(torch.float32)[5] = NAN
    groups = groups_of(index)
    with pytest.raises(ValueError, match="select: the logits of row 1, entry 805 are not finite"):
        index.select(4, groups=groups)
    visible = index.visible.to(torch.int32)
    visible[1, 805] = 0
    index.visible = visible.to(torch.uint16)
    entries, count, rest = index.select(4, groups=groups)
    assert count.tolist() == [4, 4] and 805 not in entries[1].tolist() and rest.isfinite().all()
    index.q[0, 2, 3] = INF
    with pytest.raises(ValueError, match="select: the logits of row 0, entry 0 are not finite"):
        index.select(4, groups=groups)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"expand": 0.0}, "select: expand is 0.0, expected above 0 and at most 1"),
    ({"expand": 1.5}, "select: expand is 1.5, expected above 0 and at most 1"),
    ({"groups": torch.zeros(2, 2, 1216, dtype=torch.uint8)}, r"select: groups is \[2, 2, 1216\], expected \[R=2, B=1"),
    ({"groups": torch.zeros(2, 1, 1200, dtype=torch.uint8)}, r"select: groups is .*expected .*bytes=1216"),
    ({"groups": torch.zeros(2, 1, 1216)}, "select: groups has dtype f32, expected u8"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_bad_groups(change: dict[str, Any], message: str) -> None:
    index = make_index(70, more=0)
    with pytest.raises(ValueError, match=message):
        index.select(4, **({"groups": groups_of(index)} | change))


def test_bounds_have_no_groups() -> None:
    index = make_index(70, kind="bounds")
    with pytest.raises(ValueError, match="summarize_groups: kind is 'bounds', expected mean or mean_value"):
        groups_of(index)
    with pytest.raises(ValueError, match="select: kind is bounds, expected mean or mean_value for groups"):
        index.select(4, groups=groups_of(make_index(70)))
    with pytest.raises(ValueError, match=r"summarize_groups: blocks is .*, expected .*bytes=1216"):
        ops.summarize_groups(index.blocks, index.visible, head_dim=64)


# --- What two levels find: the acceptance of specs/recall.md ----------------------------------------------------------


def test_two_levels_find_what_one_does() -> None:
    """17: of the 12 pages that one level chooses, at least 0.90."""
    found = []
    for seed in range(2):
        k, q = rotary_pages(seed)
        blocks, visible = summaries_of(k, len(q))
        groups = ops.summarize_groups(blocks, visible, head_dim=q.shape[1])
        flat, _, _ = ops.select(q.unsqueeze(1), blocks, visible, 12)
        entries, _, _ = ops.select(q.unsqueeze(1), blocks, visible, 12, groups=groups)
        found.append((entries.unsqueeze(2) == flat.unsqueeze(1)).any(2).float().mean().item())
    assert min(found) >= 0.90, found
