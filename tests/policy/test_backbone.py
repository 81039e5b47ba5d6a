"""Backbone and private sets: against loops that say the same, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvstrata.config import BudgetExceeded
from kvstrata.policy import Backbone, Plan, Seen, epicache
from kvstrata.policy.backbone import choose_own, choose_sets, halve
from kvstrata.policy.base import BACKBONE, EVICTED, FULL, INT8, LESSER_HALF, PENDING, Grouping


def looped(score, free, guard, want, backbone, private):  # type: ignore[no-untyped-def]
    """One row, lists: the set of each token."""
    episodes, n = len(score), len(free)
    among = [i for i in range(n) if free[i]]
    wanted = [set(sorted(among, key=lambda i: (-score[e][i], i))[:want]) for e in range(episodes)]
    total = [sum(score[e][i] for i in among) for e in range(episodes)]
    share = [[score[e][i] / total[e] if total[e] > 0 else 0.0 for i in range(n)] for e in range(episodes)]

    def rank(i):  # type: ignore[no-untyped-def]
        votes = sum(i in w for w in wanted)
        return (not guard[i], -votes, -sum(share[e][i] for e in range(episodes)), i)

    chosen = [-1] * n
    for i in sorted(among, key=rank)[:backbone]:
        chosen[i] = 0
    if episodes == 1:
        return chosen
    owner = {}
    for i in among:
        claims = [(-share[e][i], e) for e in range(episodes) if i in wanted[e]]
        if chosen[i] < 0 and claims:
            owner[i] = min(claims)[1]
    for e in range(episodes):
        mine = sorted((i for i in owner if owner[i] == e), key=lambda i: (-score[e][i], i))
        for i in mine[:private]:
            chosen[i] = e + 1
    for e in range(episodes):
        room = private - chosen.count(e + 1)
        for i in sorted((i for i in among if chosen[i] < 0), key=lambda i: (-score[e][i], i))[:room]:
            chosen[i] = e + 1
    return chosen


def drawn(seed: int) -> tuple[torch.Tensor, ...]:
    """Scores in eighths, so that many are equal and their sums exact; some rows have fewer tokens than their sets take."""
    g = torch.Generator().manual_seed(seed)
    episodes, rows, n = (int(torch.randint(1, most, (), generator=g)) for most in (6, 4, 200))
    score = torch.randint(0, 4, (episodes, rows, n), generator=g) / 8
    score[:, :, torch.rand(n, generator=g) < 0.3] = 0
    free = torch.rand(rows, n, generator=g) < 0.9
    guard = (torch.arange(n) < 10) & free
    want = torch.randint(1, 12, (rows,), generator=g) * 16
    backbone = torch.minimum(torch.randint(1, 8, (rows,), generator=g) * 16, want)
    if episodes == 1:
        backbone = want
    return score, free, guard, want, backbone, want - backbone


def test_sets_equal_the_loops() -> None:
    for seed in range(1000):
        score, free, guard, want, backbone, private = drawn(seed)
        found = choose_sets(score, free, guard, want, backbone, private)
        for r in range(score.shape[1]):
            expected = looped(
                score[:, r].tolist(),
                free[r].tolist(),
                guard[r].tolist(),
                *(int(x[r]) for x in (want, backbone, private)),
            )
            assert found[r].tolist() == expected, seed


def test_sets_are_disjoint_sized_and_halved() -> None:
    for seed in range(200):
        score, free, guard, want, backbone, private = drawn(seed)
        found = choose_sets(score, free, guard, want, backbone, private)
        halved = halve(found, score)
        for r in range(found.shape[0]):
            tokens = int(free[r].sum())
            assert int((found[r] == 0).sum()) == min(tokens, int(backbone[r]))
            assert not (found[r] >= 0)[~free[r]].any()
            if int(guard[r].sum()) <= int(backbone[r]):
                assert (found[r][guard[r]] == 0).all()
            left = tokens - min(tokens, int(backbone[r]))
            most = int(private[r]) if len(score) > 1 else 0
            assert int((found[r] > 0).sum()) == min(left, len(score) * most)
            for e in range(len(score)):
                mine = found[r] == e + 1
                size = int(mine.sum())
                assert size <= most
                lesser = halved[r] == e + 1 + LESSER_HALF
                pages = -(-size // 16)
                assert int(lesser.sum()) == size - min(size, pages // 2 * 16)
                if lesser.any() and (mine & ~lesser).any():
                    assert score[e, r][mine & ~lesser].min() >= score[e, r][lesser].max()


class Patched:
    """A reader that knows the scores."""

    def __init__(self, score: torch.Tensor, positions: torch.Tensor) -> None:
        self.score, self.positions = score, positions

    def patched(self) -> torch.Tensor:
        return self.score

    def pool(self, score: torch.Tensor, kernel: int, kind: str, divide: str) -> torch.Tensor:
        """The largest of stored tokens at most kernel // 2 positions away."""
        assert (kind, divide) == ("max", "present") and self.positions is not None
        near = (self.positions[:, :, None] - self.positions[:, None]).abs() <= kernel // 2
        return torch.where(near, score[:, None], 0.0).amax(2)


def seen_of(score: torch.Tensor, tail: int = 20, sinks: int = 16) -> Seen:
    """Tokens of each row in an order of its own, the tail last."""
    _, rows, n = score.shape
    g = torch.Generator().manual_seed(n)
    positions = torch.stack(
        [torch.cat([torch.randperm(n - tail, generator=g), torch.arange(n - tail, n)]) for _ in range(rows)]
    )
    wide = torch.arange(n).expand(rows, n)
    return Seen(
        0, positions.int(), torch.full((rows,), n), wide >= n - tail, torch.full((rows, n), FULL, dtype=torch.uint8), sinks,
        read=Patched(score, positions),  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_plan_has_columns_of_the_table() -> None:
    """Scores go with their tokens, the tail stays pending, sinks are of the backbone, the rest is evicted."""
    score = torch.rand(3, 2, 400, generator=torch.Generator().manual_seed(1))
    seen = seen_of(score)
    planner = Backbone(192, 64, heads="uniform", kernel=1)
    plan = planner.plan(seen)
    assert plan.state is not None and plan.set is not None and plan.set.dtype == torch.uint16
    sets = plan.set.int()
    assert (sets[seen.open] == PENDING).all() and not (sets[~seen.open] == PENDING).any()
    backbone, private = planner.sizes(192, 3)
    assert (backbone, private) == (96, 32)
    for r in range(2):
        order = seen.positions[r].argsort()
        free = (~seen.open[r])[order]
        guard = (torch.arange(400) < 16) & free
        expected = looped(
            score[:, r][:, order].tolist(), free.tolist(), guard.tolist(), 128, backbone, private
        )  # fmt: skip
        kept = plan.state[r][order] == FULL
        assert kept.tolist() == [s >= 0 or not f for s, f in zip(expected, free.tolist(), strict=True)]
        whole = torch.where(sets[r] == PENDING, -1, sets[r] & 0x7FFF)[order]
        assert [s for s, k in zip(whole.tolist(), kept.tolist(), strict=True) if k] == [
            s for s, k in zip(expected, kept.tolist(), strict=True) if k
        ]


def test_private_sets_take_their_format_and_bits_only_fall() -> None:
    score = torch.rand(2, 1, 300, generator=torch.Generator().manual_seed(2))
    seen = seen_of(score)
    was = seen.state.clone()
    was[0, :100] = INT8
    plan = Backbone(192, 64, private="int8", kernel=1).plan(replace(seen, state=was))
    assert plan.state is not None and plan.set is not None
    sets = plan.set.int()
    private = (sets > 0) & (sets != PENDING)
    assert (plan.state[private] == INT8).all() and private.any()
    common = (sets == 0) & (plan.state != EVICTED)
    assert torch.equal(plan.state[common], was[common]) and (was[common] == INT8).any()


def test_neighbours_lend_their_scores() -> None:
    """What lies at most 8 positions from a token that is attended to stays with it."""
    score = torch.zeros(1, 1, 400)
    seen = seen_of(score)
    at = [40, 120, 200, 280]
    score[0, 0] = torch.isin(seen.positions[0], torch.tensor(at)).float()
    for kernel, around in ((1, 0), (17, 8)):
        plan = Backbone(160, 64, kernel=kernel).plan(seen)
        assert plan.state is not None
        kept = set(seen.positions[0][plan.state[0] != EVICTED].tolist())
        assert all(set(range(p - around, p + around + 1)) <= kept for p in at)
    assert not set(range(272, 289)) <= set(
        seen.positions[0][Backbone(160, 64, kernel=1).plan(seen).state[0] != EVICTED].tolist()
    )  # type: ignore[index]


def test_pair_heads_divide_exactly_and_keep_floors() -> None:
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        score = torch.rand(3, 4, 900, generator=g) ** torch.tensor([1.0, 2.0, 8.0, 40.0]).view(1, 4, 1)
        planner = Backbone(320, 64)
        seen = seen_of(score)
        b = planner._rows(seen, score.amax(0), ~seen.open, 3)
        assert int(b.sum()) == 4 * 320 and not (b % 16).any()
        assert int(b.min()) >= planner.floor(0, 16, 3) == max(80, planner.least(16, 3))
        assert b.tolist() == sorted(b.tolist(), reverse=True) and b[0] > b[3]


def own(score, of, free, guard, backbone, private, episodes):  # type: ignore[no-untyped-def]
    """One row, lists: the set of each token, where each has one score and is of one episode."""
    among = [i for i in range(len(free)) if free[i]]
    chosen = [-1] * len(free)
    for i in sorted(among, key=lambda i: (not guard[i], -score[i] if not guard[i] else 0, i))[:backbone]:
        chosen[i] = 0
    if episodes == 1:
        return chosen
    for e in range(episodes):
        left = [i for i in among if chosen[i] < 0 and of[i] == e and score[i] > 0]
        for i in sorted(left, key=lambda i: (-score[i], i))[:private]:
            chosen[i] = e + 1
    for e in range(episodes):
        room = private - chosen.count(e + 1)
        for i in sorted((i for i in among if chosen[i] < 0), key=lambda i: (-score[i], i))[:room]:
            chosen[i] = e + 1
    return chosen


def test_own_sets_equal_the_loops() -> None:
    for seed in range(500):
        score, free, guard, _, backbone, private = drawn(seed)
        episodes, rows, n = score.shape
        of = torch.randint(0, episodes, (rows, n), generator=torch.Generator().manual_seed(seed))
        one = score[0]
        apart = torch.where(of == torch.arange(episodes).view(-1, 1, 1), one, 0.0)
        found = choose_own(apart, free, guard, backbone, private)
        for r in range(rows):
            lists = (x[r].tolist() for x in (one, of, free, guard))
            assert found[r].tolist() == own(*lists, int(backbone[r]), int(private[r]), episodes), seed


def test_all_layers_share_one_budget() -> None:
    """Exactly as many tokens as all rows have, between floors and caps, the more the better a row's tokens are."""
    planner = Backbone(320, 64, heads="model", kernel=1, head_cap=1.5)
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        found = []
        for layer, power in enumerate((1.0, 6.0, 60.0)):
            score = torch.rand(1, 2, 900, generator=g) ** power
            of = torch.randint(0, 3, (2, 900), generator=g, dtype=torch.int32)
            found.append(replace(seen_of(score), layer=layer, score=score[0], grouping=Grouping(3, of)))
        rows = planner.over_layers(found)
        b = torch.cat(rows)
        assert [len(r) for r in rows] == [2, 2, 2] and int(b.sum()) == 6 * 320 and not (b % 16).any()
        assert int(b.min()) >= planner.floor(0, 16, 3) and int(b.max()) <= planner.row_cap == 480
        assert rows[0].min() > rows[1].max() > rows[2].max()
        plan = planner.plan(replace(found[0], grouping=replace(found[0].grouping, rows=rows[0])))  # type: ignore[type-var]
        assert plan.state is not None and plan.set is not None
        sets = plan.set.int()
        for r in range(2):
            backbone, private = planner.sizes(int(rows[0][r]), 3)
            kept = plan.state[r] != EVICTED
            assert int(((sets[r] == BACKBONE) & kept).sum()) == backbone
            assert int((kept & (sets[r] > 0) & (sets[r] != PENDING)).sum()) == 3 * private


def test_the_backbone_takes_its_format_but_for_sinks() -> None:
    score = torch.rand(1, 1, 400, generator=torch.Generator().manual_seed(3))
    of = torch.arange(400, dtype=torch.int32).view(1, -1) % 2
    seen = replace(seen_of(score), score=score[0], grouping=Grouping(2, of))
    plan = Backbone(192, 64, private="int8", common="int8", kernel=1, heads="uniform").plan(seen)
    assert plan.state is not None and plan.set is not None
    kept = plan.state[0] != EVICTED
    sink = seen.positions[0] < 16
    assert (plan.state[0][sink | seen.open[0]] == FULL).all()
    assert (plan.state[0][kept & ~sink & ~seen.open[0]] == INT8).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": 100}, "budget has 100, expected a positive multiple of 16"),
        ({"budget": 160, "recent": 8}, "recent has 8"),
        ({"budget": 160, "share": 1.0}, "share is 1.0, expected 0 < share < 1"),
        ({"budget": 160, "heads": "all"}, "heads is 'all'"),
        ({"budget": 160, "heads": "model", "layers": (160, 160)}, "with heads 'model', expected None"),
        ({"budget": 160, "head_cap": 0.5}, "head_cap is 0.5, expected at least 1"),
        ({"budget": 160, "common": "int8"}, "common is 'int8', expected 'full' or, as private is, 'full'"),
        ({"budget": 160, "head_floor": 2}, "head_floor is 2"),
        ({"budget": 160, "private": "int3"}, "private is 'int3'"),
        ({"budget": 160, "layers": (160, 20)}, "layers has 20"),
        ({"budget": 160, "kernel": 4}, "kernel is 4, expected odd"),
    ],
)
def test_bad_parameters(options: dict, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        Backbone(**options)


def test_a_budget_without_room_for_the_guards() -> None:
    with pytest.raises(ValueError, match="budget is 160 tokens, expected at least 304"):
        epicache(160, guards=100, recent=128)
    assert epicache(304, guards=100, recent=128).sinks == 100


def test_one_budget_for_all_layers_needs_scores_that_are_kept() -> None:
    with pytest.raises(ValueError, match="heads is 'model', expected 'pair' or 'uniform' where scores are not kept"):
        epicache(304, heads="model")
    assert epicache(304, heads="model", keeps=True).combine == "max"


def test_floors_above_the_layer_are_refused() -> None:
    """What the constructor of a policy refuses already."""
    score = torch.rand(2, 2, 300)
    with pytest.raises(BudgetExceeded):
        Backbone(112, 64).plan(seen_of(score, sinks=64))


def test_no_tokens_to_plan() -> None:
    plan = Backbone(192, 64).plan(seen_of(torch.rand(2, 1, 20)))
    assert isinstance(plan, Plan) and plan.state is not None
    assert (plan.state == FULL).all()
