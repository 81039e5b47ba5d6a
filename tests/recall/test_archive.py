"""Archive: which tokens make a segment, that none is lost or changed when pages are put together, and when that happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from archived import SHAPE, Fed, fed, small
from torch import Tensor

from kvstrata import LayerSpec, Sequence, Shape
from kvstrata.config import Unsupported
from kvstrata.policy import icecache
from kvstrata.policy.base import FAR, FULL, INT8, NEAR, Policy, Seen
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
        if found is None:
            assert all(n // 256 * 256 < least for n in some)
            continue
        assert found.dtype == torch.int32 and found.shape == waiting.shape
        for row, taken in zip(waiting, found, strict=True):
            check_row(archive, row, taken)


def seen(positions: Tensor, tail: int, grouped: Tensor | None = None) -> Seen:
    """Rows whose last ``tail`` columns are open, all Near and Full."""
    n = positions.shape[1]
    return Seen(
        0,
        positions.to(torch.int32),
        torch.full((len(positions),), n),
        torch.arange(n).expand(positions.shape) >= n - tail,
        (positions >= 0).to(torch.uint8),
        sinks=32,
        tier=torch.zeros(positions.shape, dtype=torch.uint8),
        grouped=torch.zeros(positions.shape, dtype=torch.bool) if grouped is None else grouped,
    )


@pytest.mark.parametrize(("state", "native"), [("full", FULL), ("int8", INT8)])
def test_the_plan(state: str, native: int) -> None:
    """Sinks, tail, what waits and what is together already stay as they are; the others get a state, a tier and a page."""
    positions = torch.arange(700).repeat(2, 1)
    grouped = torch.zeros(2, 700, dtype=torch.bool)
    grouped[1, 100:400] = True
    plan = Archive(Position(), state, 256, 256).plan(seen(positions, 30, grouped))
    assert plan.state is not None and plan.tier is not None and plan.group is not None
    taken = torch.zeros(2, 700, dtype=torch.bool)
    taken[0, 32 : 32 + 512] = True
    taken[1, [*range(32, 100), *range(400, 400 + 256 - 68)]] = True
    assert torch.equal(plan.group >= 0, taken)
    assert torch.equal(plan.tier, torch.where(taken, FAR, NEAR).to(torch.uint8))
    assert torch.equal(plan.state, torch.where(taken, native, FULL).to(torch.uint8))
    nothing = Archive(Position(), state, 1024, 1024).plan(seen(positions, 30))
    assert (nothing.state, nothing.tier, nothing.group) == (None, None, None)


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


def untouched(pair: Fed, seq: Sequence) -> None:
    """Sinks lie in the first pages and the newest tokens in the tail, both in the order of position; Far pages are whole and of
    one row's clustered tokens, and what waits is less than a segment and an interval."""
    policy = pair.cache.policy
    assert policy.window is not None
    n = pair.cache.logical_length(seq)
    for layer, spec in enumerate(pair.cache.shape.layers):
        _, _, positions = pair.cache.materialize(layer, seq)
        assert torch.equal(positions[:, :32], torch.arange(32, dtype=torch.int32).expand(spec.kv_heads, -1))
        tail = positions[:, -policy.window :]
        assert torch.equal(tail, torch.arange(n - policy.window, n, dtype=torch.int32).expand(spec.kv_heads, -1))
        for h in range(spec.kv_heads):
            pages, alive, _, sealed = pair.cache._store.row(seq.id, layer, h)
            far = [pair.cache._store.pool(page >> 28)["far"] for page in pages]
            assert not any(far[:2]) and not any(far[sealed:])
            assert all(a == 0xFFFF for a, is_far in zip(alive, far, strict=True) if is_far)
        assert pair.cache._store.waiting(layer, [seq.id]) < 256 + 256 + policy.interval


@pytest.mark.parametrize("packer", [KMeans(), Position()])
@pytest.mark.parametrize(("segment", "least"), [(256, 256), (1024, 512)])
def test_no_token_is_lost_or_changed(packer: KMeans | Position, segment: int, least: int) -> None:
    """2,000 decoded tokens of two sequences, with turns in between; judged every 250."""
    policy = replace(small(), planner=Archive(packer, segment=segment, segment_min=least))
    pair = fed(policy, shape=Shape([LayerSpec(1, 2, 32), LayerSpec(2, 2, 32)], torch.bfloat16))
    seqs = pair.new(2)
    pair.feed(seqs, [400, 90])
    for i in range(2000):
        pair.feed(seqs, [1, 1])
        if i % 250 == 249:
            pair.feed(seqs, [5, 130])
            pair.check_contents()
            pair.check_pools()
            if least == 256:
                untouched(pair, seqs[0])
    archived, plans = counts(pair)
    assert archived == pair.cache.report().far_tokens > 0.75 * 3 * (2430 + 3120)
    assert plans > 12
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


def test_a_clustered_page_is_as_the_op_groups_its_segment() -> None:
    """Each segment alone, oldest first: the groups of kvstrata.ops.cluster are the pages."""
    from kvstrata import ops

    pair = fed(small(segment=256))
    (seq,) = pair.new()
    pair.feed([seq], [32 + 512 + 16])
    k, _ = pair.tokens(seq, 1)
    _, _, positions = pair.cache.materialize(1, seq)
    for h in range(2):
        found = positions[h, 32:-16].view(32, 16).tolist()
        for s in range(2):
            first = 32 + 256 * s
            page_of, pages = ops.cluster(k[None, first : first + 256, h].contiguous())
            assert pages.tolist() == [16]
            groups = [(first + (page_of[0] == j).nonzero().flatten()).tolist() for j in range(16)]
            assert found[16 * s : 16 * (s + 1)] == groups


@pytest.mark.parametrize("layers", [1, 3, 16, 20, 33])
def test_plans_are_spread_over_steps(layers: int) -> None:
    """Decoding plans no more than ceil(layers / interval) of them in a step, and each layer once an interval."""
    pair = fed(small(), shape=Shape([LayerSpec(1, 1, 32)] * layers, torch.float32))
    (seq,) = pair.new()
    pair.feed([seq], [16])
    steps = []
    for _ in range(700):
        before = counts(pair)[1]
        pair.feed([seq], [1])
        steps.append(counts(pair)[1] - before)
    assert max(steps) == -(-layers // 16)
    assert sum(steps) == 2 * layers, "two segments of each"
    pair.check_contents()


def test_dense_layers_and_sliding_windows_are_left_alone() -> None:
    spec = LayerSpec(2, 4, 64)
    pair = fed(small(dense_layers=(0,)), shape=Shape([spec, spec, LayerSpec(2, 4, 64, 128)], torch.float32))
    (seq,) = pair.new()
    pair.feed([seq], [900])
    for _ in range(30):
        pair.feed([seq], [1])
    assert pair.cache.report().far_tokens == 2 * 768
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
        ({"near_pages": 11}, "near_pages is 11, expected at least the 12 pages that a step reads"),
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


def test_more_that_is_refused() -> None:
    with pytest.raises(ValueError, match="iters is 0, expected at least 1"):
        KMeans(0)
    with pytest.raises(ValueError, match="mass_floor is 1.5, expected 0 to 1"):
        PageMeans(mass_floor=1.5)
    with pytest.raises(Unsupported, match="a scorer or an allocator with a selector or an archive is not built yet"):
        replace(Policy("mine", scorer=object()), selector=PageMeans(), sinks=32, window=16)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="head_dim 24, summaries of pages need a multiple of 16 in 32..512"):
        fed(shape=Shape([LayerSpec(1, 1, 24)], torch.float32))
    with pytest.raises(ValueError, match="dense has layer 2, expected 0..1"):
        fed(small(dense_layers=(2,)), shape=SHAPE)
