"""Allocators: exact sums, and the shapes of their papers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from seen import rows_seen

from kvstrata import BudgetExceeded, Unsupported
from kvstrata.budget import (
    AdaptiveHeads,
    EntropyShare,
    PowerLaw,
    Pyramid,
    RowsSeen,
    Sensitivity,
    SensitivityProfile,
    Uniform,
)
from kvstrata.budget.allocate import refuse_other_scores

MODEL, TEXT, OTHER = "a" * 64, "b" * 64, "c" * 64


def profile(sigma: list[float]) -> SensitivityProfile:
    return SensitivityProfile(tuple(sigma), (0.01,) * len(sigma), 8192, TEXT, MODEL)


def plain(tokens: torch.Tensor, scores: torch.Tensor | None = None) -> RowsSeen:
    """A page costs 16 bytes, so a byte is a token."""
    return RowsSeen(tokens, torch.full((1, tokens.shape[0]), 16), scores=scores)


def allocators(generator: torch.Generator, layers: int, rows: int) -> list:  # type: ignore[type-arg]
    c, alpha = torch.rand(layers, rows, generator=generator), 0.05 + torch.rand(layers, 1, generator=generator)
    return [
        Uniform(),
        Pyramid(beta=1 + 30 * float(torch.rand(1, generator=generator))),
        AdaptiveHeads(),
        AdaptiveHeads(alpha=0, normalize=True),
        EntropyShare(),
        EntropyShare(full_share=0.4, per_head=True, capacity=True),
        Sensitivity(profile(torch.rand(layers, generator=generator).tolist())),
        PowerLaw(c, alpha),
    ]


@pytest.mark.parametrize("index", range(8))
def test_sums_floors_and_caps_are_exact(index: int) -> None:
    """1,000 random inputs over all allocators; most have a cap that binds, and some a floor."""
    generator = torch.Generator().manual_seed(index)
    for case in range(125):
        layers, rows = int(torch.randint(1, 6, (1,), generator=generator)), 1 + case % 4
        seen = rows_seen(generator, layers, rows, sequences=1 + case % 2)
        cap = seen.full_bytes - torch.randint(0, 9, seen.tokens.shape, generator=generator).clamp_max(seen.full_bytes)
        floor = torch.randint(0, 6, seen.tokens.shape, generator=generator) if case % 3 == 0 else torch.zeros_like(cap)
        total = int(floor.sum()) + int(torch.randint(0, 2 + 20 * layers * rows, (1,), generator=generator))
        got = allocators(generator, layers, rows)[index].allocate(seen, total, floor, cap)
        assert got.bytes.dtype == torch.int64 and got.bytes.shape == seen.tokens.shape
        assert int(got.bytes.sum()) == min(total, int(cap.sum())) == total - got.slack
        assert (got.bytes <= cap).all() and (got.bytes >= torch.minimum(floor, cap)).all()


@pytest.mark.parametrize("index", range(8))
def test_units_are_whole(index: int) -> None:
    """Bytes come in units of the cheapest page; only a row at its cap takes its last unit in part."""
    generator = torch.Generator().manual_seed(50 + index)
    for _ in range(30):
        base = rows_seen(generator, 3, 2, page_bytes=320)
        seen = RowsSeen(base.tokens, base.page_bytes, unit=96, scores=base.scores, oq=base.oq)
        total, cap = int(torch.randint(0, 4000, (1,), generator=generator)), seen.full_bytes
        got = allocators(generator, 3, 2)[index].allocate(seen, total)
        assert ((got.bytes % 96 == 0) | (got.bytes == cap)).all()
        units = -(-got.bytes // 96)
        assert int(units.sum()) == min(total // 96, int((-(-cap // 96)).sum()))


def test_pyramid_is_the_papers() -> None:
    got = Pyramid(beta=20).allocate(plain(torch.full((32, 1), 100_000)), 1984 * 32).bytes.flatten().tolist()
    assert got[0] == 3869 and got[-1] == 99 and sum(got) == 63_488
    steps = -np.diff(got)
    assert steps.min() >= 121 and steps.max() <= 122, "a straight line: (3868.8 - 99.2) / 31 = 121.6"


def test_pyramid_at_its_cap_turns_flatter() -> None:
    got = Pyramid(beta=20).allocate(plain(torch.full((4, 2), 160)), 100 * 8).bytes
    assert got[0].tolist() == [160, 160] and got[-1].tolist() == [40, 40], "hi = cap, lo = 2B - cap"
    assert Pyramid().allocate(plain(torch.full((1, 3), 160)), 90).bytes.tolist() == [[30, 30, 30]]


def direct_top(scores: torch.Tensor, tokens: torch.Tensor, top: int) -> list[int]:
    pairs = [(-float(scores[h, i]), h, i) for h in range(len(tokens)) for i in range(int(tokens[h]))]
    chosen = [h for _, h, _ in sorted(pairs)[:top]]
    return [chosen.count(h) for h in range(len(tokens))]


@pytest.mark.parametrize("ties", [False, True])
def test_adaptive_heads_count_a_direct_top_k(ties: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    checked = 0
    for _ in range(60):
        seen = rows_seen(generator, 2, 4, sequences=2)
        groups = [(layer, heads) for layer in range(2) for heads in ([0, 2], [1, 3])]  # heads of one sequence
        if any(int(seen.tokens[layer, heads].sum()) < 10 for layer, heads in groups):
            continue
        assert seen.scores is not None
        scores = seen.scores.round() if ties else seen.scores
        seen = RowsSeen(seen.tokens, seen.page_bytes, scores=scores, sequence=seen.sequence)
        got = AdaptiveHeads(alpha=0).allocate(seen, 5 * 8, cap=torch.full((2, 4), 1000)).bytes
        for layer, heads in groups:
            assert got[layer, heads].tolist() == direct_top(scores[layer, heads], seen.tokens[layer, heads], 2 * 5)
        checked += 1
    assert checked > 30


def test_adaptive_heads_mix_and_normalise() -> None:
    scores = torch.tensor([[[8.0, 4, 2, 1], [0.5, 0.5, 0.5, 0.5]]])
    seen = plain(torch.tensor([[4, 4]]), scores)
    cap = torch.full((1, 2), 100)
    assert AdaptiveHeads(alpha=0).allocate(seen, 4, cap=cap).bytes.tolist() == [[4, 0]]
    assert AdaptiveHeads(alpha=0.5).allocate(seen, 4, cap=cap).bytes.tolist() == [[3, 1]]
    assert AdaptiveHeads(alpha=1).allocate(seen, 4, cap=cap).bytes.tolist() == [[2, 2]]
    scores = torch.tensor([[[4.0, 4, 0, 0], [5, 5, 5, 5]]])  # whole: head 1 wins all; its top 2 hold half: 2.5 < 4
    seen = plain(torch.tensor([[4, 4]]), scores)
    assert AdaptiveHeads(alpha=0).allocate(seen, 4, cap=cap).bytes.tolist() == [[0, 4]]
    assert AdaptiveHeads(alpha=0, normalize=True).allocate(seen, 4, cap=cap).bytes.tolist() == [[2, 2]]


def test_adaptive_heads_refuse_what_is_no_mass() -> None:
    for wrong in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="a score is negative or infinite"):
            AdaptiveHeads().allocate(plain(torch.tensor([[2]]), torch.tensor([[[wrong, 2.0]]])), 1)
    with pytest.raises(Unsupported, match="AdaptiveHeads: compares scores of different heads, and those of key norm"):
        refuse_other_scores(AdaptiveHeads(), "key norm", is_mass=False)
    refuse_other_scores(AdaptiveHeads(), "window vote", is_mass=True)
    refuse_other_scores(Uniform(), "key norm", is_mass=False)


def test_without_scores_or_statistics_all_is_uniform() -> None:
    seen = plain(torch.full((2, 3), 50))
    for allocator in (AdaptiveHeads(), EntropyShare(capacity=True)):
        assert allocator.allocate(seen, 60).bytes.tolist() == [[10] * 3] * 2  # type: ignore[attr-defined]
    share = EntropyShare().allocate(seen, 60).full_share
    assert share is not None and (share == 1).all()


def test_entropy_share_by_layer_head_and_mean() -> None:
    oq = torch.tensor([[0.2, 0.6, 9.0], [0.1, 0.1, 3.0]])  # rows 0, 1 of one sequence, row 2 of another
    seen = RowsSeen(torch.full((2, 3), 50), torch.full((1, 2), 16), oq=oq, sequence=torch.tensor([0, 0, 1]))

    def share(allocator: EntropyShare) -> list[list[float]]:
        got = allocator.allocate(seen, 60)
        assert got.full_share is not None and got.full_share.dtype == torch.float32
        return got.full_share.double().numpy().round(4).tolist()  # type: ignore[no-any-return]

    assert share(EntropyShare()) == [[1, 1, 1], [0.25, 0.25, 0.3333]]
    assert share(EntropyShare(per_head=True)) == [[0.3333, 1, 1], [0.1667, 0.1667, 0.3333]]
    assert share(EntropyShare(full_share=0.5)) == [[0.8, 0.8, 0.75], [0.2, 0.2, 0.25]]
    assert share(EntropyShare(full_share=0.8)) == [[1, 1, 1], [0.6, 0.6, 0.6]], "min(1, .) with the mean kept"
    by_oq = EntropyShare(capacity=True).allocate(seen, 130).bytes  # weights .4 .4 9 / .1 .1 3, cap 64
    assert by_oq.tolist() == [[7, 6, 64], [2, 2, 49]]
    with pytest.raises(ValueError, match="oq holds a value"):
        EntropyShare().allocate(RowsSeen(torch.ones(1, 1).long(), torch.ones(1, 1), oq=torch.tensor([[-1.0]])), 1)


def test_sensitivity_profile_round_trip_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile([0.9, 1 / 3, 1.0]).save(path)
    assert SensitivityProfile.load(path, MODEL, TEXT) == profile([0.9, 1 / 3, 1.0])
    with pytest.raises(ValueError, match="measured with another model"):
        SensitivityProfile.load(path, OTHER)
    with pytest.raises(ValueError, match="measured with another text"):
        SensitivityProfile.load(path, MODEL, OTHER)
    for text, message in [("{}", "is none"), ("[1]", "is none"), ("x", "is none")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            SensitivityProfile.load(path, MODEL)
    profile([0.5]).save(path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version 2, expected 1"):
        SensitivityProfile.load(path, MODEL)
    with pytest.raises(ValueError, match="text_hash is 'short', expected 64 hex digits"):
        SensitivityProfile((0.5,), (0.0,), 10, "short", MODEL)


def test_sensitivity_weights_and_floor() -> None:
    seen = plain(torch.full((3, 2), 1000))
    got = Sensitivity(profile([0.8, 0.6, 1.0])).allocate(seen, 1200).bytes  # s = .2, .4, 0: 1 to 4, the last its floor
    assert got.tolist() == [[110, 110], [440, 440], [50, 50]]
    assert Sensitivity(profile([1.0, 1.0, 1 - 5e-7])).allocate(seen, 1200).bytes.tolist() == [[200, 200]] * 3
    tight = torch.tensor([[500, 500], [100, 0], [0, 0]])
    got = Sensitivity(profile([0.9, 0.9, 0.9])).allocate(seen, 1150, floor=tight).bytes
    assert int(got.sum()) == 1150 and (got >= tight).all(), "floors above the total are lowered, the caller's are not"
    with pytest.raises(BudgetExceeded):
        Sensitivity(profile([0.9, 0.9, 0.9])).allocate(seen, 1000, floor=tight)
    with pytest.raises(ValueError, match="the profile has 2 layers, the cache 3"):
        Sensitivity(profile([0.9, 0.9])).allocate(seen, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"page_bytes": torch.ones(2, 2)}, r"page_bytes is \[2, 2\], expected \[1, 2\]"),
        ({"scores": torch.ones(2, 2, 5)}, r"scores is \[2, 2, 5\], expected \[2, 1, 5\]"),
        ({"scores": torch.ones(2, 1, 2)}, "a row has 3 tokens, scores are given for 2"),
        ({"unit": 0}, "unit and page_bytes"),
        ({"priority": torch.ones(3)}, r"priority is \[3\], expected \[1\]"),
        ({"priority": -torch.ones(1)}, "a priority is negative"),
    ],
)
def test_sights_that_do_not_agree(fields: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        RowsSeen(**{"tokens": torch.full((2, 1), 3), "page_bytes": torch.ones(1, 2)} | fields)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pyramid(0.5),
        lambda: AdaptiveHeads(1.5),
        lambda: EntropyShare(0.0),
        lambda: Sensitivity(profile([0.5]), 0.0),
    ],
)
def test_parameters_are_checked(make: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()  # type: ignore[operator]
