"""What is not read stands in by the means of its pages, in a cache."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from accounts import BUDGET, INT8, ROUNDED, accounts, estimated, merged, mild, narrowed, policy, reading_of
from archived import ALL, EXACT, SHAPE, Fed, error, exact, fed, worst
from torch import Tensor

from kvstrata import Cache, LayerSpec, Shape, reference
from kvstrata.recall import KMeans, MassThreshold, PageMeans, Position


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize(("packer", "far"), [(Position(), "auto"), (KMeans(), "auto"), (KMeans(), None)])
def test_the_rest_stands_in_by_its_means(share: float, packer: Any, far: str | None) -> None:
    pair = mild(policy(PageMeans(BUDGET, estimate=share), packer), far=far)
    seqs = pair.new(2)
    pair.feed(seqs, [900, 600])
    for _ in range(3):
        for a, zone in estimated(pair, seqs):
            rest = len(a.made.indexed) - 4
            assert len(zone) == ceil(share * rest) and not set(zone) & set(a.chosen)


@pytest.mark.parametrize(("group", "dim"), [(1, 32), (3, 96), (8, 128)])
def test_head_dimensions_and_groups(group: int, dim: int) -> None:
    pair = mild(policy(PageMeans(BUDGET, estimate=0.5)), Shape([LayerSpec(1, group, dim)] * 2, torch.float32))
    (seq,) = pair.new()
    pair.feed([seq], [560])
    assert all(zone for _ in range(4) for _, zone in estimated(pair, [seq]))


def test_means_of_fewer_bits() -> None:
    pair = mild(policy(PageMeans(BUDGET, estimate=1.0), state="int8"))
    (seq,) = pair.new()
    pair.feed([seq], [700])
    for _ in range(4):
        for a in accounts(pair, [seq], reading_of(pair), clear=2e-3):
            want, zone = merged(a, reading_of(pair))
            assert len(zone) == len(a.made.indexed) - 4
            assert not a.clear or error(a.got, want) < INT8 < error(a.got, a.made.read(a.chosen)[0])


def test_pages_that_were_narrowed_take_no_part() -> None:
    """By drops and crops; they may be read all the same."""
    pair = mild(policy(PageMeans(BUDGET, estimate=1.0)))
    seqs, born = narrowed(pair)
    left = 0
    for _ in range(4):
        for a, zone in estimated(pair, seqs, born=born):
            whole = {i for i, e in enumerate(a.made.indexed.tolist()) if a.made.row.slots[e].all()}
            assert set(zone) == whole - set(a.chosen)
            left += len(a.made.indexed) - len(whole)
    assert left > 50


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_dropped_token_shows_in_no_output(share: float) -> None:
    """Not though its value is larger than all others: a cache with another value in its place answers alike."""

    def answers(value: float) -> list[Tensor]:
        cache = Cache(SHAPE, policy=policy(PageMeans(BUDGET, estimate=share)))
        pair = Fed(cache, torch.Generator().manual_seed(0))
        (seq,) = pair.new()
        with cache.step([seq], [700]) as step:
            for layer in range(2):
                q, k, v = pair.drawn(layer, 700)
                v[100:600:50] += value
                step.attend(layer, q, k, v)
        before = pair.feed([seq], [1])
        for layer in range(2):
            positions = cache.materialize(layer, seq)[2]
            cache.drop(layer, seq, ~((positions >= 100) & (positions < 600) & (positions % 50 == 0)))
        return before + [x for _ in range(8) for x in pair.feed([seq], [1])]

    one, other = answers(0.0), answers(1e4)
    assert not torch.equal(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[2:], other[2:], strict=True))


def test_where_all_is_read_nothing_is_estimated() -> None:
    """Bit for bit."""
    out = []
    for share in (0.0, 1.0):
        pair = mild(policy(PageMeans(63 + 16 * ALL, estimate=share)))
        seqs = pair.new(2)
        out.append(pair.feed(seqs, [700, 300]) + [x for _ in range(20) for x in pair.feed(seqs, [1, 1])])
        assert worst(pair, seqs, [1, 1]) < EXACT
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


@pytest.mark.parametrize("selector", [PageMeans(BUDGET), MassThreshold(BUDGET, mass=0.7)])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_what_is_captured_is_what_was_read(selector: Any, share: float) -> None:
    """The same with an estimate of the rest as without."""
    reports, out = [], []
    for estimate in (0.0, share):
        pair = mild(policy(replace(selector, estimate=estimate)))
        seqs = pair.new(2)
        pair.feed(seqs, [700, 300])
        out.append([x for _ in range(20) for x in pair.feed(seqs, [1, 1])])
        reports.append((pair.cache._store.captured(), pair.cache._store.fetched()))
    assert reports[0] == reports[1]
    assert reports[0][0][0] < 0.95 * reports[0][0][2]
    assert not any(torch.equal(a, b) for a, b in zip(*out, strict=True))


def coded(shape: tuple[int, ...], size: float, generator: torch.Generator) -> Tensor:
    """Vectors [.., D] that 8 bits hold as they are, once rotated."""
    codes = torch.randint(-127, 128, shape, generator=generator).double()
    codes[..., 0] = 127
    return (reference.rotate(codes, inverse=True) * size / 127).float()


@pytest.mark.parametrize("selector", [PageMeans(79, estimate=1.0), MassThreshold(79, estimate=1.0)])
@pytest.mark.parametrize(("state", "tolerance"), [("full", 1e-4), ("int8", INT8)])
def test_pages_of_equal_tokens_lose_nothing(selector: Any, state: str, tolerance: float) -> None:
    """Equal to full attention whatever is selected; without the estimate it is not near it."""
    errors = []
    for one in (selector, replace(selector, estimate=0.0)):
        pair = fed(policy(one, Position(), state), Shape([LayerSpec(2, 4, 64)], torch.float32))
        (seq,) = pair.new()
        k, v = (coded((43, 2, 64), 1.0, pair.generator).repeat_interleave(16, 0) for _ in range(2))
        with pair.cache.step([seq], [len(k)]) as step:
            step.attend(0, torch.zeros(len(k), 4, 64), k, v)
        pair.note([seq], [len(k)], [(k, v)])
        for _ in range(8):
            q, k, v = (coded((1, h, 64), 0.8, pair.generator) for h in (4, 2, 2))
            with pair.cache.step([seq], [1]) as step:
                out = step.attend(0, q, k, v)
            pair.note([seq], [1], [(k, v)])
            errors.append(error(out, exact(q, *pair.tokens(seq, 0))))
    assert max(errors[:8]) < tolerance and min(errors[8:]) > 0.1


@pytest.mark.parametrize(("mass", "reach"), [(1.0, 1.0), (1.0, 3.0), (0.4, 1.0), (0.7, 2.0)])
def test_all_that_a_threshold_leaves_is_estimated(mass: float, reach: float) -> None:
    """At share 1, however few pages a row reads."""
    pair = mild(policy(MassThreshold(BUDGET, mass=mass, reach=reach, estimate=1.0)))
    seqs = pair.new(2)
    pair.feed(seqs, [900, 600])
    counts = []
    for _ in range(4):
        for a in accounts(pair, seqs, reading_of(pair)):
            zone = a.made.zone(a.chosen, len(a.made.indexed), a.vote)
            counts.append(len(a.chosen))
            assert not a.clear or error(a.got, a.made.with_rest(a.chosen, zone, 1.0)) < ROUNDED
    assert len(set(counts)) > 1 or mass == reach == 1
