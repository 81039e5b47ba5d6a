"""Archive: which tokens make a segment, that none is lost or changed when pages are put together, and when that happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from archived import SHAPE, Fed, Rule, fed, seen, small
from torch import Tensor

from kvstrata import LayerSpec, Shape, ops
from kvstrata.config import Unsupported
from kvstrata.policy import icecache
from kvstrata.policy.base import (
    FAR,
    FULL,
    GROUPED,
    INT8,
    PROVISIONAL,
    PROVISIONAL_GROUP,
    UNGROUPED,
    Policy,
)
from kvstrata.recall import Archive, KMeans, PageMeans, Position

# --- segments ------------------------------------------------------------------------------------------------------------


def sizes(segment: Tensor) -> list[int]:
    """Tokens of each segment of a row, by number."""
    numbers = segment[segment >= 0]
    return torch.bincount(numbers.long()).tolist() if len(numbers) else []


def check_row(archive: Archive, waiting: Tensor, segment: Tensor) -> None:
    """The properties of one row."""
    n, found = int(waiting.sum()), sizes(segment)
    assert (segment[~waiting] == -1).all(), "only waiting tokens are taken"
    if n // 256 * 256 < archive.segment_min:
        assert not found
        return
    assert sum(found) == n // 256 * 256, "a rest below 256 waits"
    assert all(size % 256 == 0 and 0 < size <= archive.segment for size in found)
    assert len(found) == -(-sum(found) // archive.segment), "no more segments than are needed"
    assert max(found) - min(found) <= 256, "as equal as possible"
    assert found == sorted(found, reverse=True), "larger first"
    taken = segment[waiting]
    assert (taken[: sum(found)].diff() >= 0).all() and (taken[: sum(found)] >= 0).all(), "the oldest first"
    assert (taken[sum(found) :] == -1).all()


@pytest.mark.parametrize(("segment", "least"), [(256, 256), (512, 256), (1024, 1024), (4096, 1024), (768, 512)])
def test_segments(segment: int, least: int) -> None:
    """Ragged rows, waiting tokens anywhere in them, among them every count around the grains."""
    archive, generator = Archive(segment=segment, segment_min=least), torch.Generator().manual_seed(segment)
    counts = [0, 1, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1279, 1280, 4095, 4096, 4097, 4352, 9000]
    for _ in range(20):
        some = [counts[i] for i in torch.randint(0, len(counts), (4,), generator=generator)]
        waiting = torch.zeros(4, max(some) + 300, dtype=torch.bool)
        for row, n in zip(waiting, some, strict=True):
            row[torch.randperm(len(row), generator=generator)[:n]] = True
        found = archive.segments(waiting)
        assert found.dtype == torch.int32 and found.shape == waiting.shape
        for row, taken in zip(waiting, found, strict=True):
            check_row(archive, row, taken)


def powers(n: int) -> list[int]:
    """n as powers of two, the largest first."""
    return [1 << b for b in reversed(range(n.bit_length())) if n >> b & 1]


@pytest.mark.parametrize("before", [*range(17), 31])
@pytest.mark.parametrize("more", [1, 2, 3, 4, 9])
def test_what_waits_is_put_together_as_a_counter_carries(before: int, more: int) -> None:
    """64 tokens a unit, in groups of powers of two: those that a larger count has too stay, the others join what is new."""
    n, old = 32 + 64 * (before + more), 32 + 64 * before
    grouped = torch.zeros(1, n + 16, dtype=torch.uint8)
    grouped[0, 32:old] = PROVISIONAL
    sight = seen(torch.arange(n + 16)[None], 16, grouped)
    archive = Archive(Position(), segment=4096, segment_min=4096)
    stay = 0
    for a, b in zip(powers(before), powers(before + more), strict=False):
        if a != b:
            break
        stay += a
    found = archive.fresh(sight, archive.waiting(sight))
    assert found.nonzero()[:, 1].tolist() == list(range(32 + 64 * stay, n))


@pytest.mark.parametrize(("state", "native"), [("full", FULL), ("int8", INT8)])
@pytest.mark.parametrize("least", [256, 512, 1024])
def test_the_plan(state: str, native: int, least: int) -> None:
    """Sinks, tail and what is together for good stay as they are. Of the others, multiples of 256 get pages for good, the
    oldest first, where they are enough; the rest get pages for the time being. All of them are Far, in one state."""
    positions, grouped = torch.arange(700).repeat(2, 1), torch.zeros(2, 700, dtype=torch.uint8)
    grouped[1, 32:96], grouped[1, 96:400] = PROVISIONAL, GROUPED
    before = seen(positions, 30, grouped, native)
    plan = Archive(Position(), state, 1024, least).plan(before)
    assert plan.state is not None and plan.tier is not None and plan.group is not None
    waits = [list(range(32, 670)), [*range(32, 96), *range(400, 670)]]
    group, moved = torch.full((2, 700), -1, dtype=torch.int32), torch.zeros(2, 700, dtype=torch.bool)
    for r, columns in enumerate(waits):
        good = len(columns) // 256 * 256 if len(columns) // 256 * 256 >= least else 0
        for i, c in enumerate(columns):  # the counter carries all the way
            group[r, c] = i // 16 + (0 if i < good else PROVISIONAL_GROUP)
        moved[r, columns] = True
    assert torch.equal(plan.group, group)
    assert before.tier is not None
    assert torch.equal(plan.tier, torch.where(moved, FAR, before.tier.long()).to(torch.uint8))
    assert torch.equal(plan.state, torch.where(moved, native, before.state.long()).to(torch.uint8))


def test_a_plan_without_newcomers() -> None:
    """What is together for the time being, and not enough for a segment, stays."""
    grouped = torch.full((2, 700), PROVISIONAL, dtype=torch.uint8)
    grouped[:, :32] = grouped[:, -30:] = UNGROUPED
    before = seen(torch.arange(700).repeat(2, 1), 30, grouped)
    plan = Archive(Position(), "full", 1024, 1024).plan(before)
    assert plan.group is not None and plan.tier is not None and plan.state is not None and before.tier is not None
    assert (plan.group == -1).all()
    assert torch.equal(plan.tier, before.tier) and torch.equal(plan.state, before.state)


def test_position_packs_what_follows_each_other() -> None:
    segment = torch.full((2, 600), -1, dtype=torch.int32)
    segment[0, 40:296], segment[0, 300:556] = 0, 1
    segment[1, 10:266] = 0
    group = Position().group(seen(torch.arange(600).repeat(2, 1), 0), segment)
    assert group.dtype == torch.int32
    assert torch.equal(group >= 0, segment >= 0)
    for row in range(2):
        pages = group[row][group[row] >= 0]
        assert torch.equal(pages, (torch.arange(len(pages)) // 16).to(torch.int32))


# --- in a cache ------------------------------------------------------------------------------------------------------------


def counts(pair: Fed) -> list[int]:
    return [pair.cache.report().counts[what] for what in ("archived", "plans")]


@pytest.mark.parametrize("packer", [KMeans(), Position()])
@pytest.mark.parametrize(("segment", "least"), [(256, 256), (1024, 512)])
def test_no_token_is_lost_or_changed(packer: KMeans | Position, segment: int, least: int) -> None:
    """2,000 decoded tokens of two sequences, with turns in between; judged every 250."""
    policy = replace(small(), planner=Archive(packer, segment=segment, segment_min=least))
    pair = fed(policy, shape=Shape([LayerSpec(1, 2, 32), LayerSpec(2, 2, 32)], torch.bfloat16))
    seqs = pair.new(2)
    rules = [[Rule(layer, least=least) for layer in range(2)] for _ in seqs]

    def feed(*lengths: int) -> None:
        pair.feed(seqs, list(lengths))
        for n, both in zip(lengths, rules, strict=True):
            for rule in both:
                rule.feed(n)

    feed(400, 90)
    for i in range(2000):
        feed(1, 1)
        if i % 250 == 249:
            feed(5, 130)
            pair.check_contents()
            pair.check_pools()
            for seq, both in zip(seqs, rules, strict=True):
                for layer, rule in enumerate(both):
                    pair.check_rule(seq, layer, rule)
    archived, plans = counts(pair)
    assert (
        archived == pair.cache.report().far_tokens == sum((1, 2)[r.layer] * r.archived for both in rules for r in both)
    )
    assert plans > 2 * 2000 // 16
    pair.check_empty()


def test_pages_by_meaning() -> None:
    """A clustered page holds keys that resemble each other, and not the positions that follow each other."""
    apart = []
    for packer in (KMeans(), Position()):
        pair = fed(replace(small(), planner=Archive(packer, segment=1024, segment_min=1024)))
        (seq,) = pair.new()
        pair.feed([seq], [32 + 1024 + 16])
        k, _, positions = pair.cache.materialize(0, seq)
        far = slice(32, -16)
        pages = k[0, far].view(64, 16, 64)
        apart.append(float((pages - pages.mean(1, keepdim=True)).square().mean()))
        runs = positions[0, far].view(64, 16).diff(dim=1)
        assert (runs > 0).all(), "slots by position"
        assert bool((runs == 1).all()) == isinstance(packer, Position)
    assert apart[0] < 0.8 * apart[1]


def clustered(k: Tensor, positions: list[int]) -> list[list[int]]:
    """The groups of kvstrata.ops.cluster, as pages of positions; k [N, D]."""
    page_of, pages = ops.cluster(k[None, positions].contiguous())
    assert pages.tolist() == [len(positions) // 16]
    return [sorted(positions[int(t)] for t in (page_of[0] == j).nonzero()) for j in range(len(positions) // 16)]


def test_a_clustered_page_is_as_the_op_groups_its_segment() -> None:
    """Each segment alone, the oldest first, then the rest alone for the time being: the groups of kvstrata.ops.cluster are the
    pages. A later plan clusters what was in such pages, page after page, and newcomers after it."""
    pair = fed(small(segment=256, chunk=1024))
    (seq,) = pair.new()
    pair.feed([seq], [32 + 512 + 80 + 16])
    keys, _ = pair.tokens(seq, 1)
    first = [
        [clustered(keys[:, h], list(range(a, b))) for a, b in ((32, 288), (288, 544), (544, 624))] for h in range(2)
    ]
    _, _, positions = pair.cache.materialize(1, seq)
    for h in range(2):
        assert positions[h, 32:-16].view(37, 16).tolist() == sum(first[h], [])
    pair.feed([seq], [160 + 48 + 16])
    keys, _ = pair.tokens(seq, 1)
    _, _, positions = pair.cache.materialize(1, seq)
    for h, (one, two, rest) in enumerate(first):
        segment = [*sum(rest, []), *range(624, 624 + 176)]
        more = clustered(keys[:, h], segment), clustered(keys[:, h], list(range(800, 848)))
        assert positions[h, 32:-16].view(51, 16).tolist() == [*one, *two, *more[0], *more[1]]


@pytest.mark.parametrize("layers", [1, 3, 16, 20, 33])
def test_plans_are_spread_over_steps(layers: int) -> None:
    """Decoding plans no more than ceil(layers / interval) of them in a step, and each layer once an interval, from the first
    page on that leaves the tail."""
    pair = fed(small(), shape=Shape([LayerSpec(1, 1, 32)] * layers, torch.float32))
    (seq,) = pair.new()
    pair.feed([seq], [16])
    steps = []
    for _ in range(330):
        before = counts(pair)[1]
        pair.feed([seq], [1])
        steps.append(counts(pair)[1] - before)
    assert max(steps) == -(-layers // 16)
    shifts = [layer * 16 // layers for layer in range(layers)]
    assert sum(steps) == sum((346 + shift) // 16 - (63 + shift) // 16 for shift in shifts)
    pair.check_contents()
    for layer in range(layers):
        rule = Rule(layer, layers)
        for n in [16] + [1] * 330:
            rule.feed(n)
        assert rule.good == 256
        pair.check_rule(seq, layer, rule)


def test_dense_layers_and_sliding_windows_are_left_alone() -> None:
    spec = LayerSpec(2, 4, 64)
    pair = fed(small(dense_layers=(0,)), shape=Shape([spec, spec, LayerSpec(2, 4, 64, 128)], torch.float32))
    (seq,) = pair.new()
    pair.feed([seq], [900])
    for _ in range(30):
        pair.feed([seq], [1])
    rule = Rule(layers=1)
    for n in [900] + [1] * 30:
        rule.feed(n)
    assert pair.cache.report().far_tokens == 2 * rule.archived
    pair.check_rule(seq, 1, rule)
    k, v = pair.tokens(seq, 0)
    stored_k, stored_v, positions = pair.cache.materialize(0, seq)
    assert positions[0].tolist() == list(range(930)), "a dense layer stays in order"
    assert torch.equal(stored_k, k.transpose(0, 1)) and torch.equal(stored_v, v.transpose(0, 1))
    assert pair.cache.materialize(2, seq)[2].max() == 929 and pair.cache.stored_length(2, seq, 0) < 300


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state": "bf16"}, "state is 'bf16', expected 'full' or one of int8, int4, int2"),
        ({"segment": 300}, "segment is 300, expected a positive multiple of 256"),
        ({"segment": 0}, "segment is 0, expected a positive multiple of 256"),
        ({"segment_min": -256}, "segment_min is -256, expected a positive multiple of 256"),
        ({"segment_min": 257}, "segment_min is 257, expected a positive multiple of 256"),
        ({"segment": 65536 + 256}, "segment is 65792, expected at most 65536"),
        ({"segment": 512, "segment_min": 768}, "segment_min is 768, expected at most segment=512"),
    ],
)
def test_parameters_that_are_refused(settings: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        Archive(**settings)
    with pytest.raises(ValueError, match=message):
        icecache(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 78}, "budget is 78 tokens, expected at least 79"),
        ({"budget": 0}, "budget is 0, expected at least 1 token"),
        ({"near_pages": 11}, "near_pages is 11, expected 0, or at least the 12 pages that a step reads"),
        (
            {"near_pages": 32768},
            "near_pages is 32768, expected 0, or at least the 12 pages that a step reads and at most 32767",
        ),
        ({"aggregate": "mean"}, "aggregate is 'mean', expected 'sum' or 'max'"),
        ({"spread_weight": -0.5}, "spread_weight is -0.5, expected a finite number >= 0"),
        ({"spread_weight": float("nan")}, "spread_weight is nan, expected a finite number"),
        ({"sinks": 24}, "sinks is 24, window 16, expected multiples of 16"),
        ({"window": 40}, "window is 40, expected a positive multiple of 16"),
    ],
)
def test_selectors_that_are_refused(settings: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        icecache(**settings)


def test_the_largest_parameters_that_are_not_refused() -> None:
    """A segment as long as the op can cluster, and Near copies by default as many as can be numbered."""
    assert Archive(segment=65536, segment_min=65536).segment == 65536
    assert PageMeans(79 + 16 * 20000).native(32, 16)[:2] == (20001, 32767)
    most = 32 + 16 + 15 + 16 * 32767 + 15
    assert PageMeans(most).native(32, 16)[:2] == (32767, 32767)
    for near in (32767, 40000):
        with pytest.raises(ValueError, match=f"near_pages is {near}, expected 0, or at least the 32768 pages"):
            PageMeans(most + 1, near_pages=near).native(32, 16)
    with pytest.raises(
        ValueError, match=f"PageMeans: budget is {most + 1} tokens, expected at most {most}, 32767 pages"
    ):
        PageMeans(most + 1).native(32, 16)
    assert PageMeans(most + 1, near_pages=0).native(32, 16)[:2] == (32768, 0)


def test_more_that_is_refused() -> None:
    with pytest.raises(ValueError, match="iters is 0, expected at least 1"):
        KMeans(0)
    with pytest.raises(ValueError, match="mass_floor is 1.5, expected 0 to 1"):
        PageMeans(mass_floor=1.5)
    with pytest.raises(Unsupported, match="scores of object with a selector or an archive are not built yet"):
        replace(Policy("mine", scorer=object()), selector=PageMeans(), sinks=32, window=16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"formats is \(\), expected it to have 'int8', in which its planner archives"):
        Policy("mine", Archive(state="int8"), selector=PageMeans(), sinks=32, window=16)
    with pytest.raises(ValueError, match=r"formats is \('int4',\), expected it to have 'int8'"):
        Policy("mine", Archive(state="int8"), formats=("int4",))
    with pytest.raises(Unsupported, match="head_dim 24, summaries of pages need a multiple of 16 in 32..512"):
        fed(shape=Shape([LayerSpec(1, 1, 24)], torch.float32))
    with pytest.raises(ValueError, match="dense has layer 2, expected 0..1"):
        fed(small(dense_layers=(2,)), shape=SHAPE)
