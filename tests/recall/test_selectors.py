"""Bounds and thresholds of mass: a step of one token reads the pages that they name, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accounts import BUDGET, INT8, Account, accounts, alone, judged, mild, narrowed, policy, reading_of
from archived import EXACT, SHAPE, Fed, error, small
from torch import Tensor

from kvstrata import Cache, LayerSpec, Shape
from kvstrata.recall import Bounds, KMeans, MassThreshold, PageMeans, Position, SplitMeans
from kvstrata.recall.archive import Packer


def differ(some: list[Account], pages: int = 4) -> None:
    """The test would see another selection: what is read is not all, and not the same pages each time."""
    assert all(len(a.chosen) == pages < len(a.made.indexed) for a in some)
    assert len({tuple(a.chosen) for a in some}) > len(some) // 2


# --- parts of pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", ["auto", None])
@pytest.mark.parametrize(("parts", "weight"), [(2, 1.0), (4, 0.5)])
def test_the_pages_of_highest_mass_by_parts_are_read(parts: Any, weight: float, far: str | None) -> None:
    pair = mild(policy(SplitMeans(BUDGET, parts=parts, spread_weight=weight)), far=far)
    seqs = pair.new(2)
    pair.feed(seqs, [1000, 740])
    differ([a for _ in range(4) for a in judged(pair, seqs)])


def test_parts_follow_their_pages() -> None:
    """While decoding seals pages and plans move them; and after forks, crops and drops, which narrow them."""
    pair = mild(policy(SplitMeans(BUDGET, parts=4)))
    seqs = pair.new(2)
    pair.feed(seqs, [500, 333])
    some: list[Account] = []
    for i in range(150):
        some += judged(pair, seqs) if i % 30 == 0 else []
        pair.feed(seqs, [1, 1])
    differ(some)
    narrow = mild(policy(SplitMeans(BUDGET)))
    seqs, born = narrowed(narrow)
    differ([a for _ in range(4) for a in judged(narrow, seqs, born=born)])


def test_what_parts_refuse() -> None:
    with pytest.raises(ValueError, match="SplitMeans: parts is 3, expected 2 or 4"):
        SplitMeans(parts=3)  # type: ignore[arg-type]
    for weight in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"SplitMeans: spread_weight is {weight}, expected a finite number >= 0"):
            SplitMeans(spread_weight=weight)


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", ["auto", None])
@pytest.mark.parametrize(("packer", "aggregate"), [(Position(), "max"), (KMeans(), "max"), (KMeans(), "sum")])
def test_the_pages_of_highest_bounds_are_read(packer: Packer, far: str | None, aggregate: Any) -> None:
    pair = mild(policy(Bounds(BUDGET, aggregate=aggregate), packer), far=far)
    seqs = pair.new(2)
    pair.feed(seqs, [1000, 740])
    differ([a for _ in range(4) for a in judged(pair, seqs)])
    assert (pair.cache.report().far_tokens > 0) == (far is not None)


@pytest.mark.parametrize("dim", [32, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_head_dimensions_and_groups(group: int, dim: int) -> None:
    packer = Position() if group == 3 else KMeans()
    shape = Shape([LayerSpec(1, group, dim)] * 2, torch.float32)
    pair = mild(policy(Bounds(BUDGET), packer), shape)
    (seq,) = pair.new()
    pair.feed([seq], [560])
    differ([a for _ in range(5) for a in judged(pair, [seq])])


@pytest.mark.parametrize("far", ["auto", None])
@pytest.mark.parametrize("packer", [Position(), KMeans()])
def test_bounds_of_keys_of_fewer_bits(packer: Packer, far: str | None) -> None:
    """They are of the decoded keys, of which one may round to another bf16: votes are less clear."""
    pair = mild(policy(Bounds(BUDGET), packer, "int8"), far=far)
    (seq,) = pair.new()
    pair.feed([seq], [700])
    assert pair.cache.report().states["int8"] > 0
    differ([a for _ in range(4) for a in judged(pair, [seq], INT8, clear=2e-3)])


@pytest.mark.parametrize("packer", [Position(), KMeans()])
def test_bounds_follow_their_pages(packer: Packer) -> None:
    """While decoding seals pages and plans move them, to other entries of the table and other lanes of a block."""
    pair = mild(policy(Bounds(BUDGET), packer))
    seqs = pair.new(2)
    pair.feed(seqs, [500, 333])
    archived, some = pair.cache.report().counts["archived"], []
    for i in range(300):
        some += judged(pair, seqs) if i % 30 == 0 else []
        pair.feed(seqs, [1, 1])
    differ(some)
    assert pair.cache.report().counts["archived"] > archived + 1000
    assert any(e > 40 for a in some for e in a.chosen), "new pages are among those that are read"


@pytest.mark.parametrize("packer", [Position(), KMeans()])
def test_after_forks_crops_and_drops(packer: Packer) -> None:
    """Each branch's index follows its own table; a page that was narrowed keeps the bounds it was sealed with."""
    pair = mild(policy(Bounds(BUDGET), packer))
    seqs, born = narrowed(pair)
    some = [a for _ in range(4) for a in judged(pair, seqs, born=born)]
    turned = pair.select([seqs[0], *seqs[2:]], [1, 2, 2])
    some += [a for _ in range(3) for a in judged(pair, turned[1:])]
    differ(some)


@pytest.mark.parametrize(("state", "slack"), [("full", 1e-5), ("int8", 1e-3)])
@pytest.mark.parametrize("packer", [Position(), KMeans()])
def test_what_bounds_report_as_captured_is_a_floor(packer: Packer, state: str, slack: float) -> None:
    """Of one query head, step by step."""
    pair = mild(policy(Bounds(BUDGET), packer, state), Shape([LayerSpec(1, 1, 64)], torch.float32))
    (seq,) = pair.new()
    pair.feed([seq], [700])
    judgements = much = 0
    for _ in range(30):
        before = pair.cache._store.captured()[0]
        (a,) = accounts(pair, [seq], pair.cache.policy.selector.native(32, 16), clear=2e-3)  # type: ignore[union-attr]
        reported, true = pair.cache._store.captured()[0] - before, float(a.made.share(a.chosen))
        judgements += a.clear
        assert not a.clear or 0 < reported <= true * (1 + slack)
        expected = torch.sigmoid(a.made.read(a.chosen)[1] - a.made.rest(a.chosen))
        assert not a.clear or reported == pytest.approx(float(expected), rel=1e-4 + 20 * slack)
        much += true > 0.95
    assert judgements > 20 and much < 10


def test_the_floor_is_the_share_where_keys_of_a_page_are_equal() -> None:
    """But for the rounding of bounds to bf16: keys that are bf16 are their own bounds."""
    pair = mild(policy(Bounds(BUDGET), Position()), Shape([LayerSpec(1, 2, 64)], torch.float32))
    (seq,) = pair.new()
    q, k, v = pair.drawn(0, 720)
    k = k[::16].repeat_interleave(16, 0).bfloat16().float()
    with pair.cache.step([seq], [720]) as step:
        step.attend(0, q, k, v)
    pair.note([seq], [720], [(k, v)])
    for _ in range(4):
        before = pair.cache._store.captured()[0]
        (a,) = judged(pair, [seq])
        true = float(a.made.share(a.chosen).sum())
        assert pair.cache._store.captured()[0] - before == pytest.approx(true, abs=1e-5)
        assert true < 1.99


# --- thresholds of mass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mass", "least"), [(0.5, 1), (0.8, 3), (0.9, 2), (0.3, 6)])
@pytest.mark.parametrize("group", [1, 4])
def test_the_fewest_pages_that_reach_the_mass(mass: float, least: int, group: int) -> None:
    """Of a budget of eight, which no row may pass."""
    selector = MassThreshold(BUDGET + 64, mass=mass, least=least, reach=1.0)
    pair = mild(policy(selector), Shape([LayerSpec(2, 2 * group, 64)] * 2, torch.float32))
    seqs = pair.new(2)
    pair.feed(seqs, [900, 500])
    counts = [len(a.chosen) for _ in range(3) for a in judged(pair, seqs)]
    assert min(counts) >= least and max(counts) <= 8
    assert any(least < n < 8 for n in counts) or mass == 0.3, "rows differ"


@pytest.mark.parametrize(
    ("packer", "mass", "least", "reach"),
    [(Position(), 1.0, 1, 2.0), (KMeans(), 1.0, 3, 3.0), (Position(), 0.7, 1, 2.0), (KMeans(), 0.9, 3, 1.5)],
)
def test_rows_share_the_pages_of_the_budget(packer: Packer, mass: float, least: int, reach: float) -> None:
    """Those of highest vote, K of each row on the average, no row without the least and none beyond its reach."""
    selector = MassThreshold(BUDGET, mass=mass, least=least, reach=reach)
    pair = mild(policy(selector, packer), Shape([LayerSpec(3, 6, 64)] * 2, torch.float32))
    seqs = pair.new(2)
    pair.feed(seqs, [900, 600])
    reading, counts = selector.native(32, 16), []
    for _ in range(4):
        every = accounts(pair, seqs, reading)
        for first in range(0, len(every), 3):
            n = [len(a.chosen) for a in every[first : first + 3]]
            assert sum(n) <= 12 and (mass < 1 or sum(n) == 12)
            assert all(least <= m <= int(4 * reach) for m in n)
            counts += n
        assert sum(a.clear for a in every) >= 6
        assert all(error(a.got, a.made.read(a.chosen)[0]) < EXACT for a in every if a.clear)
    assert min(counts) < 4 < max(counts)


@pytest.mark.parametrize("mass", [1.0, 0.9])
def test_what_rows_give_up_is_of_their_rest(mass: float) -> None:
    """Captured of each query head is 1 / (1 + exp(lse_rest - lse_read)) over the pages that are read in the end."""
    pair = mild(policy(MassThreshold(BUDGET, mass=mass, reach=3.0)), Shape([LayerSpec(3, 12, 64)] * 2, torch.float32))
    seqs, reading, judgements, given = pair.new(2), reading_of(pair), 0, 0
    pair.feed(seqs, [900, 600])
    for _ in range(10):
        before = pair.cache._store.captured()[0]
        every = accounts(pair, seqs, reading)
        if not all(a.clear for a in every):
            continue
        expected = sum(float(torch.sigmoid(a.made.read(a.chosen)[1] - a.made.rest(a.chosen)).sum()) for a in every)
        assert pair.cache._store.captured()[0] - before == pytest.approx(expected, rel=2e-4)
        judgements += 1
        given += sum(len(a.chosen) < len(alone(a.made, a.vote, reading)) for a in every)
    assert judgements >= 2 and given > judgements


class Sharp(Fed):
    """With queries whose attention is all but one token's."""

    def drawn(self, layer: int, n: int) -> list[Tensor]:
        q, k, v = super().drawn(layer, n)
        return [4 * q, k, v]


def walked(selector: Any, kind: type[Fed] = Fed) -> list[Tensor]:
    """Outputs of a prompt and of decoding, and what was read of Far pages."""
    cache = Cache(SHAPE, policy=policy(selector))
    pair = kind(cache, torch.Generator().manual_seed(0))
    seqs = pair.new(2)
    out = pair.feed(seqs, [700, 450])
    for _ in range(30):
        out += pair.feed(seqs, [1, 1])
    return [*out, torch.tensor(cache._store.fetched()), torch.tensor(cache._store.captured(), dtype=torch.float64)]


@pytest.mark.parametrize("kind", [Fed, Sharp])
def test_a_threshold_of_all_within_the_budget_of_each_row_is_none(kind: type[Fed]) -> None:
    """At mass 1 no row stops early, though what it has read rounds to all."""
    one = walked(MassThreshold(BUDGET, mass=1.0, reach=1.0), kind)
    for a, b in zip(one, walked(PageMeans(BUDGET), kind), strict=True):
        assert torch.equal(a, b)
    less = walked(MassThreshold(BUDGET, mass=0.9, reach=1.0), kind)
    assert not torch.equal(less[-2], one[-2]), "at less they do"


@pytest.mark.parametrize("least", [1, 3])
def test_no_mass_is_reached_by_the_least_pages(least: int) -> None:
    pair = mild(policy(MassThreshold(BUDGET, mass=0.0, least=least)))
    (seq,) = pair.new()
    pair.feed([seq], [700])
    for _ in range(4):
        before = sum(pair.cache._store.fetched())
        pair.feed([seq], [1])
        assert sum(pair.cache._store.fetched()) - before == least * 4, "of four rows"


@pytest.mark.parametrize("estimate", [0.0, 0.5])
def test_sequences_of_a_batch_decide_alone(estimate: float) -> None:
    """Four ragged ones are four batches of one, bit for bit."""
    lengths = [900, 300, 612, 90]
    selector = MassThreshold(BUDGET, mass=0.8, reach=2.5, estimate=estimate)

    def walk(which: list[int]) -> list[list[Tensor]]:
        drawn = [mild(small()) for _ in lengths]
        for i, one in enumerate(drawn):
            one.generator.manual_seed(i)
        cache = Cache(SHAPE, policy=policy(selector))
        seqs, out = cache.new(len(which)), [list[Tensor]() for _ in which]
        for n in (None, *[1] * 24):
            counts = [lengths[i] if n is None else n for i in which]
            tokens = [[drawn[i].drawn(layer, c) for layer in range(2)] for i, c in zip(which, counts, strict=True)]
            with cache.step(seqs, counts) as step:
                for layer in range(2):
                    got = step.attend(layer, *(torch.cat([t[layer][j] for t in tokens]) for j in range(3)))
                    for o, part in zip(out, got.split(counts), strict=True):
                        o.append(part)
        return out

    batch = walk([2, 0, 3, 1])
    for i, together in zip([2, 0, 3, 1], batch, strict=True):
        (alone,) = walk([i])
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True)), i
    assert not torch.equal(batch[0][-1], batch[1][-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"near_pages": 7}, "near_pages is 7, expected 0 or at least 8, reach x pages"),
        ({"near_pages": 3}, "near_pages is 3, expected 0, or at least the 4 pages"),
        ({"near_pages": 13, "reach": 3.5}, "near_pages is 13, expected 0 or at least 14, reach x pages"),
        ({"budget": 63 + 16 * 16384}, "reach x pages is 32768, expected at most 32767 Near pages"),
        ({"reach": 1e30}, "reach x pages is .*, expected at most 32767 Near pages"),
        ({"reach": 0.5}, "reach is 0.5, expected a finite number >= 1"),
        ({"reach": float("inf")}, "reach is inf, expected a finite number >= 1"),
        ({"least": 0}, "least is 0, expected at least 1 page"),
        ({"mass": 1.5}, "mass is 1.5, expected 0 to 1"),
        ({"estimate": -0.5}, "estimate is -0.5, expected 0 to 1"),
        ({"aggregate": "max"}, "aggregate is 'max', expected 'sum', a share of the mass"),
    ],
)
def test_thresholds_that_are_refused(settings: dict[str, Any], message: str) -> None:
    """When the policy is made: reading and Near pages go together."""
    with pytest.raises(ValueError, match=message):
        policy(MassThreshold(**({"budget": BUDGET} | settings)))


def test_near_pages_follow_the_reach() -> None:
    for reach, pages in ((1.0, 8), (2.0, 8), (3.5, 14)):
        assert MassThreshold(BUDGET, reach=reach).native(32, 16).near_pages == pages
    assert MassThreshold(BUDGET, reach=3.5, near_pages=14).native(32, 16)[:2] == (4, 14)
