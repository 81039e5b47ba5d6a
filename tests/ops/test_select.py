"""select and score_pages by other summaries than means: bounds, a share of mass, the zone that is estimated, capped logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from indices import Index, check_selection, make_index
from tolerances import PAGE_SCORE, VOTE_TIE, assert_close
from torch import Tensor

from kvstrata import ops, reference

NAN, INF = float("nan"), float("inf")
EMULATED = 0.6


def page_logits(index: Index, softcap: float) -> Tensor:
    """scale * q . k f64 [R, G, M, 16], capped, -inf of hidden slots."""
    z = torch.einsum("rgd,rmsd->rgms", index.q.double(), index.k.double()) * index.q.shape[-1] ** -0.5
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    slots = (index.visible.long().unsqueeze(-1) >> torch.arange(16)) & 1 == 1
    return z.masked_fill(~slots.unsqueeze(1), -INF)


def check_x(index: Index, **more: Any) -> Tensor:
    got = index.x(**more)
    want = reference.score_pages(index.q, index.blocks, index.visible, kind=index.kind, **more)
    assert torch.equal(got == -INF, want == -INF)
    assert_close(got.masked_fill(got == -INF, 0), want.masked_fill(want == -INF, 0), 2 * PAGE_SCORE)
    return got


# --- Bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("entries", [0, 1, 15, 16, 33, 300])
def test_bounds(isa: str, entries: int, group: int) -> None:
    index = make_index(entries, group=group, kind="bounds")
    x = check_x(index)
    check_selection(index, 7)
    for threads in (2, 8):
        assert torch.equal(index.x(threads=threads), x)


@pytest.mark.parametrize("dim", [32, 48, 96, 128, 512])
def test_bounds_by_head_dim(isa: str, dim: int) -> None:
    index = make_index(33, dim=dim, kind="bounds")
    for dtype in (torch.float32, torch.bfloat16):
        index.q = index.q.to(dtype)
        check_x(index, scale=0.25)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_bounds_are_above_the_mass_of_every_page(isa: str, softcap: float) -> None:
    """6: no exception, but for f32 sums of the bound itself."""
    pairs = 0
    for seed, entries in enumerate((700, 800)):
        index = make_index(entries, rows=4, group=8, seed=seed, kind="bounds")
        index.k[:, ::3] = index.k[:, ::3, :1].bfloat16().float()  # pages of one key: the bound is exact
        slots = (index.visible.long().unsqueeze(-1) >> torch.arange(16)) & 1 == 1
        index.blocks[:, : -(-entries // 16)] = reference.summarize(index.k, slots, "bounds")
        z = page_logits(index, softcap)
        mass = torch.logsumexp(z, -1)
        x = index.x(softcap=softcap).double()
        there = x != -INF
        assert torch.all(x[there] >= mass[there] - 2e-6 * mass[there].abs().clamp_min(1))
        n = torch.log(slots.sum(-1).clamp_min(1).double()).unsqueeze(1)
        assert torch.all((x - n)[there] >= z.amax(-1)[there] - 2e-6 * mass[there].abs().clamp_min(1))
        pairs += int(there.sum())
    assert pairs > 40_000


def test_bounds_that_are_no_numbers_are_refused(isa: str) -> None:
    for softcap in (0.0, 20.0):
        index = make_index(33, rows=3, holes=0.0, kind="bounds")
        lines = index.blocks.view(torch.bfloat16).view(3, 4, 2, 64, 16)
        lines[1, 1, :, 7, 5] = NAN
        with pytest.raises(ValueError, match="select: the logits of row 1, entry 21 are not finite"):
            index.select(4, softcap=softcap)
        index.q[0, 2, 3] = INF
        with pytest.raises(ValueError, match="select: the logits of row 0, entry 0 are not finite"):
            index.select(4, softcap=softcap)


# --- Softcap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "bounds", "mean_value"])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(isa: str, softcap: float, kind: str) -> None:
    index = make_index(40, kind=kind)
    check_x(index, softcap=softcap)
    check_selection(index, 5, softcap=softcap)
    assert not torch.equal(index.x(softcap=softcap), index.x())


# --- A share of the mass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "bounds"])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("entries", [1, 17, 300])
def test_mass(isa: str, entries: int, with_base: bool, kind: str) -> None:
    """The least k that reaches the mass: reaching it with k, not with k - 1, of votes in falling order."""
    index = make_index(entries, rows=4, kind=kind)
    x = index.x().double()
    g = torch.Generator().manual_seed(entries)
    base = torch.logsumexp(x, -1).nan_to_num(neginf=0.0) + torch.randn(4, 4, generator=g) if with_base else None
    base = None if base is None else base.float()
    for mass in (0.2, 0.6, 0.95, 1.0):
        for most, least in ((12, 0), (12, 3), (100, 0), (entries, 5)):
            entries_got, count, _ = index.select(most, lse_base=base, mass=mass, least=least)
            vote = reference.page_votes(x, base)
            for r, n in enumerate(count.tolist()):
                may = (x[r] != -INF).any(0).nonzero().flatten()
                order = may[torch.sort(vote[r, may], descending=True, stable=True).indices]
                chosen, limit = set(entries_got[r, :n].tolist()), min(most, len(order))
                held = reference.held_mass(x[r], vote[r], order[:limit], None if base is None else base[r])
                assert min(least, limit) <= n <= limit
                assert n == limit or held[n] >= mass - 1e-5
                assert n <= least or held[n - 1] <= mass + 1e-5
                for p in chosen ^ set(order[:n].tolist()):
                    assert abs(float(vote[r, p] - vote[r, order[n - 1]])) <= VOTE_TIE * float(vote[r, order[n - 1]])


def test_mass_as_the_reference(isa: str) -> None:
    index = make_index(200, rows=3)
    x = index.x().double()
    base = torch.tensor([[INF * -1] * 4, [30.0] * 4, [2.0] * 4])
    for mass in (0.3, 0.55, 0.9):
        got = index.select(90, lse_base=base, mass=mass, least=2)
        want = reference.select(x, 90, base, mass=mass, least=2)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert got[1][1] == 2, "a row that is content reads the least"
    assert torch.equal(index.select(90, lse_base=base, mass=0.9, least=2, threads=3)[0], got[0])


def test_no_mass_is_all(isa: str) -> None:
    index = make_index(64)
    for a, b in zip(index.select(6, mass=0.0, least=3), index.select(6), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [63, 64, 65, 200, 400])
def test_many_entries(isa: str, k: int) -> None:
    """Of more than 64 the best are parted off, not kept in order: no other selection, ties to the lower index."""
    index = make_index(400, rows=2)
    check_selection(index, k)
    check_selection(index, k, aggregate="max")
    index.q[:] = 0  # votes are counts of slots
    want, count, _ = reference.select(index.x().double(), k)
    got, n, _ = index.select(k)
    assert torch.equal(got, want) and torch.equal(n, count)


# --- The zone ---------------------------------------------------------------------------------------------------------


def zone_of(index: Index, k: int, most: int, **more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zone = torch.full((len(index.q), most), 7, dtype=torch.int32)
    return *index.select(k, zone=zone, **more), zone


@pytest.mark.parametrize("most", [0, 1, 20, 150, 400])
@pytest.mark.parametrize("entries", [1, 16, 300])
def test_zone(isa: str, entries: int, most: int) -> None:
    """The best of what is not selected, but for what was made from other slots; nothing else changes."""
    index = make_index(entries, rows=3, kind="mean_value")
    masks = index.visible.to(torch.int32)
    stale = torch.rand(masks.shape, generator=torch.Generator().manual_seed(most)) < 0.2
    masks[stale & (masks > 1)] = 1  # hidden since
    index.visible = masks.to(torch.uint16)
    mask = reference.summary_values(index.blocks, 64)[2][:, :entries]
    vote = reference.page_votes(index.x().double())
    for k in (0, 5, 70):
        selected, count, rest, zone = zone_of(index, k, most)
        for a, b in zip((selected, count, rest), index.select(k), strict=True):
            assert torch.equal(a, b)
        for r in range(3):
            may = (masks[r] != 0) & (mask[r] == masks[r])
            want = reference.zone(vote[r], may, selected[r], most)
            n = int((want >= 0).sum())
            mine, theirs = set(zone[r, :n].tolist()), set(want[:n].tolist())
            assert torch.all(zone[r, n:] == -1) and zone[r, :n].tolist() == sorted(mine) and len(mine) == n
            for p in mine ^ theirs:
                last = float(vote[r, list(theirs)].min())
                assert bool(may[p]) and abs(float(vote[r, p]) - last) <= VOTE_TIE * last


def test_zone_goes_to_the_lower_of_equals(isa: str) -> None:
    index = make_index(100, rows=1, holes=0.0, kind="mean_value")
    index.visible[:] = 0xFFFF
    slots = torch.ones(1, 100, 16, dtype=torch.bool)
    index.blocks[:, :7] = reference.summarize(index.k[:, :1].expand_as(index.k), slots, "mean_value", index.k)
    selected, _, _, zone = zone_of(index, 10, 30)
    assert selected[0].tolist() == list(range(10)) and zone[0].tolist() == list(range(10, 40))


def test_zone_with_a_mass(isa: str) -> None:
    index = make_index(200, kind="mean_value")
    selected, count, _, zone = zone_of(index, 40, 500, mass=0.5)
    for r in range(2):
        chosen, rest = set(selected[r, : count[r]].tolist()), set(zone[r][zone[r] >= 0].tolist())
        assert not chosen & rest and chosen | rest == set((index.visible[r].long() > 0).nonzero().flatten().tolist())


def test_mean_values_are_scored_as_means(isa: str) -> None:
    index, means = make_index(70, kind="mean_value"), make_index(70)
    assert torch.equal(index.x(), means.x())
    for a, b in zip(index.select(9), means.select(9), strict=True):
        assert torch.equal(a, b)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("mean", {"kind": "median"}, r"select: kind is 'median', expected one of mean, bounds, mean_value"),
    ("mean", {"kind": "bounds"}, r"select: blocks is \[2, 3, 1216\], expected \[R=2, B=3, bytes=4096\]"),
    ("bounds", {"scale": -0.5}, r"select: scale is -0.5, expected 0 or more for kind bounds"),
    ("mean", {"softcap": -1.0}, r"select: softcap is -1, expected 0 \(none\) or more"),
    ("mean", {"mass": 1.5}, r"select: mass is 1.5, expected 0 to 1"),
    ("mean", {"mass": NAN}, r"select: mass is nan, expected 0 to 1"),
    ("mean", {"mass": 0.5, "aggregate": "max"}, r"select: aggregate is max, expected sum with a mass"),
    ("mean", {"mass": 0.5, "least": -1}, r"select: least is -1, expected at least 0"),
    ("mean", {"zone": torch.zeros(2, 3, dtype=torch.int32)}, r"select: kind is mean, expected mean_value for a zone"),
    ("mean_value", {"zone": torch.zeros(2, dtype=torch.int32)}, r"select: zone is \[2\], expected \[R, E\]"),
    ("mean_value", {"zone": torch.zeros(3, 3, dtype=torch.int32)}, r"select: zone is \[3, 3\], expected \[R=2"),
    ("mean_value", {"zone": torch.zeros(2, 3, dtype=torch.int64)}, r"select: zone has dtype i64, expected i32"),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSALS, ids=[m for _, _, m in REFUSALS])
def test_bad_input(kind: str, change: dict[str, Any], message: str) -> None:
    index = make_index(33, more=0, kind=kind)
    arguments: dict[str, Any] = {"kind": kind} | change
    with pytest.raises(ValueError, match=message):
        ops.select(index.q, index.blocks, index.visible, 4, **arguments)
