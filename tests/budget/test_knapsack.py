"""The knapsack: against dynamic programming, a direct greedy loop, and the two inequalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstrata import Unsupported, ops
from kvstrata.budget import Knapsack, RowsSeen
from kvstrata.budget.knapsack import hull

LADDER = [(0, 0.0), (6, 0.905), (11, 0.9935), (20, 1.0)]  # cost, fidelity
PAGES = [(0, 0.0), (9, 0.905), (17, 0.9935), (32, 1.0)]  # in the proportions of int4, int8 and bf16 pages at D 128
F32 = torch.float32


def heavy(rng: np.random.Generator, n: int) -> torch.Tensor:
    return torch.from_numpy(rng.pareto(1.1, n)).to(F32)


def table(ladder: list[tuple[int, float]], copies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    cost = torch.tensor([[c] * copies for c, _ in ladder], dtype=torch.int64)
    return cost, torch.tensor([[f] * copies for _, f in ladder], dtype=F32)


def choose(
    w: torch.Tensor, budget: int, ladder: list[tuple[int, float]] = LADDER
) -> tuple[torch.Tensor, float, int, float]:
    cost, fidelity = table(ladder)
    step, level, held = ops.choose_chunks(w, torch.zeros(len(w), dtype=torch.uint8), cost, fidelity, budget)
    value = float((w.double() * fidelity[step.long(), 0].double()).sum())
    assert held == int(cost[step.long(), 0].sum()) <= budget
    return step, level, held, value


def optimum(w: torch.Tensor, budget: int, ladder: list[tuple[int, float]] = LADDER) -> float:
    best = np.zeros(budget + 1)
    for value in w.double().numpy():
        new = best.copy()
        for c, f in ladder[1:]:
            if c <= budget:
                np.maximum(new[c:], best[: budget + 1 - c] + value * float(np.float32(f)), out=new[c:])
        best = new
    return float(best[-1])


@pytest.mark.parametrize(("n", "least"), [(256, 0.998), (1024, 0.9995)])
def test_near_dynamic_programming(n: int, least: float) -> None:
    """Chunks of 16 of rows of Pareto(1.1) scores, each row sorted and normalised; 10, 25 and 50 % of the Full bytes."""
    rng = np.random.default_rng(n)
    for case in range(100):
        scores = np.sort(rng.pareto(1.1, (4, 4 * n)) + 1, axis=1)[:, ::-1]
        w = torch.from_numpy((scores / scores.sum(1, keepdims=True)).reshape(n, 16).sum(1)).to(F32)
        budget = n * 32 * (10, 25, 50)[case % 3] // 100
        best = optimum(w, budget, PAGES)
        value = choose(w, budget, PAGES)[3]
        assert value <= best * (1 + 1e-9)
        assert value >= least * best


def test_loses_at_most_the_largest_step() -> None:
    rng = np.random.default_rng(7)
    for _ in range(300):
        w = heavy(rng, int(rng.integers(1, 12)))
        budget = int(rng.integers(0, 100))
        assert choose(w, budget)[3] >= optimum(w, budget) - float(w.max()) * 0.905 - 1e-6


def greedy(w: list[float], column: list[int], cost: list[list[int]], fidelity: list[list[float]], budget: int) -> list:  # type: ignore[type-arg]
    """The text of the specification, one item and one step at a time."""

    def density(i: int, j: int) -> float:
        f = column[i]
        rise = cost[j + 1][f] - cost[j][f]
        return w[i] * (fidelity[j + 1][f] - fidelity[j][f]) / rise if rise else -1.0

    def chosen(level: float) -> list[int]:
        steps = []
        for i in range(len(w)):
            j, f = 0, column[i]
            while j + 1 < len(cost) and w[i] * (fidelity[j + 1][f] - fidelity[j][f]) > level * (
                cost[j + 1][f] - cost[j][f]
            ):
                j += 1
            steps.append(j)
        return steps

    def held(steps: list[int]) -> int:
        return sum(cost[j][column[i]] for i, j in enumerate(steps))

    steps = chosen(0.0)
    if held(steps) > budget:
        low, high = 0.0, max(density(i, j) for i in range(len(w)) for j in range(len(cost) - 1)) * (1 + 2.0**-20)
        for _ in range(64):
            middle = (low + high) / 2
            low, high = (low, middle) if held(chosen(middle)) <= budget else (middle, high)
        steps = chosen(high)
    rest = [
        (-density(i, j), i, j)
        for i in range(len(w))
        for j in range(steps[i], len(cost) - 1)
        if cost[j + 1][column[i]] > cost[j][column[i]]
    ]
    room = budget - held(steps)
    for _, i, j in sorted(rest):
        rise = cost[j + 1][column[i]] - cost[j][column[i]]
        if steps[i] == j and rise <= room:
            steps[i], room = j + 1, room - rise
    return steps


@pytest.mark.parametrize("ties", [False, True])
def test_the_vectorised_choice_is_the_direct_one(ties: bool) -> None:
    rng = np.random.default_rng(5)
    cost = [[0, 0, 0], [6, 3, 9], [11, 10, 9], [20, 10, 9]]
    fidelity = torch.tensor([[0, 0, 0], [0.905, 0.5, 1], [0.9935, 1, 1], [1, 1, 1]], dtype=F32)
    for _ in range(200):
        n = int(rng.integers(0, 25))
        w = torch.from_numpy(rng.integers(0, 4, n)).to(F32) if ties else heavy(rng, n)
        column = torch.from_numpy(rng.integers(0, 3, n)).to(torch.uint8)
        budget = int(rng.integers(0, 12 * n + 1))
        step, _, _ = ops.choose_chunks(w, column, torch.tensor(cost), fidelity, budget)
        expected = greedy(w.double().tolist(), column.tolist(), cost, fidelity.double().tolist(), budget)
        assert step.tolist() == expected


def test_three_states_obey_two_inequalities() -> None:
    """Full iff w > lambda (c_F - c_Q) / (1 - f_Q), else Quantized iff w > lambda c_Q / f_Q; filled items only rise."""
    rng = np.random.default_rng(9)
    ladder = [(0, 0.0), (6, 0.905), (20, 1.0)]
    f = float(np.float32(0.905))
    taken = set()
    for _ in range(100):
        w = heavy(rng, 200)
        step, level, _, _ = choose(w, int(rng.integers(50, 3000)), ladder)
        value = w.double()
        expected = (value > level * 6 / f).long() + (value > level * 14 / (1 - f)).long()
        assert (step.long() >= expected).all()
        filled = int((step.long() != expected).sum())
        assert filled <= 2, "less than 14 of room is left by the bisection"
        taken |= set(step.tolist())
    assert taken == {0, 1, 2}


def test_more_formats_never_lose_more_than_a_step() -> None:
    rng = np.random.default_rng(10)
    for _ in range(100):
        w = heavy(rng, 64)
        budget = int(rng.integers(40, 1200))
        few = choose(w, budget, [LADDER[0], LADDER[1], LADDER[3]])[3]
        assert choose(w, budget)[3] >= few - float(w.max()) * 0.905


def test_everything_fits_and_nothing_fits() -> None:
    w = torch.tensor([3.0, 0.0, 1.0])
    assert choose(w, 60)[0].tolist() == [3, 3, 3], "what has no value is kept where there is room"
    assert choose(w, 59)[0].tolist() == [3, 2, 3]
    assert choose(w, 0)[0].tolist() == [0, 0, 0]
    assert choose(torch.zeros(0), 5)[0].tolist() == []
    cost, fidelity = table([(2, 0.1), (5, 1.0)])
    with pytest.raises(ValueError, match="budget is 5, the cheapest steps cost 6"):
        ops.choose_chunks(w, torch.zeros(3, dtype=torch.uint8), cost, fidelity, 5)


def test_hull() -> None:
    ladder = [(0, 0.0, 0), (6, 0.905, 3), (11, 0.9935, 2), (20, 1.0, 1)]
    assert hull(ladder[::-1]) == ladder
    assert hull([(0, 0.0, 0), (10, 0.5, 2), (20, 1.0, 1)]) == [(0, 0.0, 0), (20, 1.0, 1)], "on the line: off the hull"
    assert hull([(0, 0.0, 0), (15, 0.6, 2), (20, 1.0, 1)]) == [(0, 0.0, 0), (20, 1.0, 1)]
    assert hull([(0, 0.0, 0), (5, 0.3, 3), (5, 0.4, 2), (9, 0.35, 1)]) == [(0, 0.0, 0), (5, 0.4, 2)]


def test_chunk_order_against_a_direct_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    for columns in (0, 1, 15, 16, 17, 33, 64, 100):
        value = torch.randint(0, 5, (4, columns), generator=generator).to(F32)
        kind = torch.randint(0, 4, (4, columns), generator=generator).to(torch.uint8)
        kind[3] = 0
        pos = torch.stack([torch.randperm(columns, generator=generator) for _ in range(4)]).to(torch.int32)
        order, w, items = ops.chunk_order(value, kind, pos)
        assert (order.dtype, w.dtype, items.dtype) == (torch.int32, F32, torch.int32)
        for r in range(4):
            direct, sums = [], []
            for k in (1, 2, 3):
                tokens = [i for i in range(columns) if kind[r, i] == k]
                tokens.sort(key=lambda i: (-float(value[r, i]), int(pos[r, i])))
                direct += tokens
                sums += [float(value[r, tokens[a : a + 16]].sum()) for a in range(0, len(tokens), 16)]
            assert order[r].tolist() == direct + [-1] * (columns - len(direct))
            assert int(items[r]) == len(sums)
            assert w[r].tolist() == sums + [0.0] * (w.shape[1] - len(sums))


FORMATS = ("bf16", "int8", "int4")


def sight(seed: int, layers: int = 3, rows: int = 4, columns: int = 70) -> RowsSeen:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, columns + 1, (layers, rows), generator=generator)
    page_bytes = torch.tensor([[8296], [4328], [2280]]).repeat(1, layers)
    page_bytes[:, -1] //= 2  # one layer of another width
    return RowsSeen(
        tokens,
        page_bytes,
        FORMATS,
        scores=torch.rand(layers, rows, columns, generator=generator).clamp_min(1e-4) ** -0.9,
        positions=torch.randperm(columns, generator=generator).to(torch.int32).expand(layers, rows, -1),
        stored=torch.randint(0, 3, (layers, rows, columns), generator=generator).to(torch.uint8),
        sequence=torch.arange(rows) // 2,
    )


def test_the_plan_costs_what_it_says() -> None:
    """Recounted from the tokens: whole pages of each (format now, format then), never above the total."""
    for seed in range(30):
        seen = sight(seed)
        assert seen.stored is not None
        total = int(int(seen.full_bytes.sum()) * (0.02 + 0.03 * seed))
        got = Knapsack(FORMATS).allocate(seen, total)
        assert got.formats is not None and got.formats.dtype == torch.uint8
        now = torch.where(seen.present, seen.stored + 1, 0)
        assert not got.formats[~seen.present].any()
        assert ((got.formats == 0) | (got.formats >= now)).all(), "what is quantized never rises"
        recount = torch.zeros_like(got.bytes)
        for before in (1, 2, 3):
            for after in (1, 2, 3):
                pages = -(-((now == before) & (got.formats == after)).sum(-1) // 16)
                recount += pages * seen.page_bytes[after - 1].unsqueeze(1)
        assert torch.equal(recount, got.bytes)
        assert int(got.bytes.sum()) <= total and got.slack == total - int(got.bytes.sum())


def test_in_a_row_higher_scores_are_stored_better() -> None:
    seen = sight(1, columns=300)
    got = Knapsack(FORMATS).allocate(seen, int(seen.full_bytes.sum()) // 2).formats
    assert got is not None and seen.scores is not None and seen.stored is not None
    assert {0, 1, 2, 3} == set(got[seen.present].tolist())
    rank = torch.tensor([9, 1, 2, 3])[got.long()]
    for layer in range(3):
        for row in range(4):
            n = int(seen.tokens[layer, row])
            for now in range(3):
                mine = [i for i in range(n) if seen.stored[layer, row, i] == now]
                mine.sort(key=lambda i: -float(seen.scores[layer, row, i]))
                ranks = [int(rank[layer, row, i]) for i in mine]
                assert ranks == sorted(ranks)


def test_one_format_is_the_global_top() -> None:
    """Full or evicted, whole chunks: the kept ones are those with the most mass over all layers and rows."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.full((3, 2), 64)
    scores = torch.rand(3, 2, 64, generator=generator) ** -0.9
    seen = RowsSeen(tokens, torch.full((1, 3), 8296), ("bf16",), scores=scores)
    mass = (scores / scores.sum(-1, keepdim=True)).sort(-1, descending=True).values.view(6, 4, 16).sum(-1).flatten()
    for top in range(25):
        got = Knapsack(("bf16",)).allocate(seen, top * 8296 + 8295)
        kept = torch.zeros(24, dtype=torch.int64)
        kept[mass.argsort(descending=True)[:top]] = 1
        assert torch.equal(got.bytes.flatten(), kept.view(6, 4).sum(1) * 8296)


def test_weights_move_bytes() -> None:
    seen = sight(2, columns=300)
    total = int(seen.full_bytes.sum()) // 6
    plain = Knapsack(FORMATS).allocate(seen, total).bytes
    deep = Knapsack(FORMATS, layer_weight=(1, 1, 100)).allocate(seen, total).bytes
    assert deep[2].sum() > plain[2].sum() and deep[0].sum() < plain[0].sum()
    fields = {name: getattr(seen, name) for name in ("tokens", "page_bytes", "formats", "scores", "stored", "sequence")}
    first = RowsSeen(**fields, priority=torch.tensor([100.0, 100, 1, 1], dtype=torch.float64))
    assert Knapsack(FORMATS).allocate(first, total).bytes[:, :2].sum() > plain[:, :2].sum()
    energy = RowsSeen(**fields, norms=torch.ones(seen.present.shape))
    assert not torch.equal(Knapsack(FORMATS, metric="energy").allocate(energy, total).bytes, plain)
    # Protected tokens hold nine tenths of the first layer's mass: its rows count for a tenth.
    scores = torch.where(seen.present, torch.nan_to_num(seen.scores), 0.0).sum(-1)  # type: ignore[arg-type]
    shielded = RowsSeen(**fields, mass=scores * torch.tensor([[10.0], [1], [1]]))
    assert Knapsack(FORMATS).allocate(shielded, total).bytes[0].sum() < plain[0].sum()


def test_scores_are_not_all_that_later_queries_read() -> None:
    """One chunk with all the mass and three with next to none: by scores alone it is bought Full and they go; with a prior the
    same bytes cover them. Each token's value is (1 - prior) of its share, and its part of the prior."""
    scores = torch.full((1, 1, 64), 1e-6)
    scores[..., :16] = 1.0
    seen = RowsSeen(torch.tensor([[64]]), torch.tensor([[100], [25]]), ("bf16", "int4"), scores=scores)
    for prior, kept in ((0.0, [1] * 16 + [0] * 48), (0.2, [2] * 64)):
        got = Knapsack(("bf16", "int4"), prior=prior).allocate(seen, 100)
        assert got.formats is not None and got.formats.flatten().tolist() == kept
    value = Knapsack(("bf16", "int4"), prior=0.2)._value(seen).flatten()
    share = scores.flatten() / scores.sum()
    assert torch.allclose(value, 0.8 * share + 0.2 / 64) and abs(float(value.sum()) - 1) < 1e-6
    with pytest.raises(ValueError, match="Knapsack: prior is 1.5, expected 0 to 1"):
        Knapsack(prior=1.5)


def test_nan_is_worth_nothing() -> None:
    scores = torch.ones(1, 1, 48)
    scores[0, 0, 16:32] = float("nan")
    seen = RowsSeen(torch.tensor([[48]]), torch.tensor([[100]]), ("bf16",), scores=scores)
    got = Knapsack(("bf16",)).allocate(seen, 200)
    assert got.formats is not None and got.formats.flatten().tolist() == [1] * 16 + [0] * 16 + [1] * 16
    assert (got.nans, got.slack) == (16, 0)


def test_nothing_to_divide() -> None:
    for layers, rows, columns in ((0, 0, 0), (2, 0, 3), (2, 3, 0), (2, 3, 5)):
        tokens = torch.zeros(layers, rows, dtype=torch.int64)
        page_bytes = torch.full((1, layers), 100)
        seen = RowsSeen(tokens, page_bytes, ("bf16",), scores=torch.zeros(layers, rows, columns))
        got = Knapsack(("bf16",)).allocate(seen, 1000)
        assert got.bytes.shape == (layers, rows) and not got.bytes.any() and got.slack == 1000


def test_refused() -> None:
    seen = sight(3)
    with pytest.raises(Unsupported, match="no scores yet"):
        Knapsack(FORMATS).allocate(RowsSeen(seen.tokens, seen.page_bytes, FORMATS), 10)
    with pytest.raises(Unsupported, match="floors"):
        Knapsack(FORMATS).allocate(seen, 10, floor=torch.ones_like(seen.tokens))
    with pytest.raises(Unsupported, match="caps below"):
        Knapsack(FORMATS).allocate(seen, 10, cap=seen.full_bytes - 1)
    with pytest.raises(ValueError, match=r"expected some of \('bf16', 'int8', 'int4'\), 'bf16' first"):
        Knapsack(("f32", "int2")).allocate(seen, 10)
    with pytest.raises(ValueError, match="needs seen.norms"):
        Knapsack(FORMATS, metric="energy").allocate(seen, 10)
    for formats in ((), ("bf16", "bf16"), ("int8", "int4"), ("bf16", "int3")):
        with pytest.raises(ValueError, match="Knapsack"):
            Knapsack(formats)
