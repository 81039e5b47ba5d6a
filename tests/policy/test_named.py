"""Named policies: their parameters, and that roles put together share and plan as their papers say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sight import C_FULL, C_INT4, PAGE_BYTES, seen_of

from kvstrata import policy
from kvstrata.budget import AdaptiveHeads, Allocation, EntropyShare, Knapsack, Pyramid, RowsSeen, Uniform
from kvstrata.policy import (
    NAMED,
    AccumulatedMass,
    KeepTop,
    KeyDiversity,
    KeyNorm,
    MeanSpread,
    Policy,
    QuantizeAll,
    Seen,
    ThreeStates,
    WindowVote,
)
from kvstrata.policy.base import EVICTED, FULL, INT4, Allowance

SCORED = ["h2o", "snapkv", "pyramidkv", "adakv", "keynorm", "keydiff", "arkv"]


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_its_policy(name: str) -> None:
    made = policy.resolve(name)
    assert made.name == name and made == NAMED[name]()
    assert made.window is None or made.window >= made.queries
    assert made.sinks == {"full": 0, "streaming": 4, "icecache": 32, "strata": 32}.get(name, 16)
    hash(made)


def test_roles_and_defaults() -> None:
    """A table of what each is made of: states.md's, in the order scorer, allocator, planner."""
    made = {name: (p.scorer, p.allocator, p.planner) for name, make in NAMED.items() for p in [make()]}
    assert made["h2o"] == (AccumulatedMass(), Uniform(), KeepTop())
    assert made["snapkv"] == (WindowVote(64, 5, "avg"), Uniform(), KeepTop())
    assert made["pyramidkv"] == (WindowVote(64, 5, "avg"), Pyramid(20), KeepTop())
    assert made["adakv"] == (WindowVote(32, 7, "max"), AdaptiveHeads(0.2), KeepTop())
    assert made["kivi"] == (None, None, QuantizeAll("int4"))
    assert made["keynorm"] == (KeyNorm(), Uniform(), KeepTop())
    assert made["keydiff"] == (KeyDiversity(), Uniform(), KeepTop())
    assert made["arkv"] == (KeyDiversity(5), EntropyShare(full_share=0.01), ThreeStates(("int4", "int2"), cover=True))
    assert (policy.h2o().window, policy.h2o().window_share) == (None, 0.5)
    assert (policy.kivi().window, policy.kivi().formats) == (128, ("int4",))
    assert (policy.arkv().combine, policy.arkv().decay, policy.arkv().formats) == ("replace", 0.95, ("int4", "int2"))


def test_settings_of_the_papers() -> None:
    longbench = policy.snapkv(32, 7, "max", "kernel", window=32, sinks=0)
    assert longbench.scorer == WindowVote(32, 7, "max", "kernel") and longbench.sinks == 0
    assert policy.kivi("int2", sinks=0).planner == QuantizeAll("int2")
    assert policy.keydiff(window=None, window_share=0.1).window_share == 0.1
    code = policy.arkv(
        "int8",
        cover=False,
        scorer=MeanSpread(spread="variance", divide="kernel"),
        window=32,
        sinks=0,
        allocator=EntropyShare(stats="code"),
    )
    assert code.scorer == MeanSpread(32, 5, "avg", "kernel", "variance", gamma=263.81)
    assert code.planner == ThreeStates("int8", cover=False) and code.formats == ("int8",)


@pytest.mark.parametrize("name", [n for n in NAMED if n not in ("full", "streaming", "icecache", "strata", "quest")])
def test_every_policy_takes_window_sinks_interval_chunk(name: str) -> None:
    make: Callable[..., Policy] = NAMED[name]
    got = make(window=96, sinks=3, interval=32, chunk=256)
    assert (got.window, got.sinks, got.interval, got.chunk) == (96, 3, 32, 256)
    for field, value in (("window", 40), ("interval", 8), ("chunk", 100)):
        with pytest.raises(ValueError, match=rf"policy {name}: {field} is {value}, expected a positive multiple of 16"):
            make(**{field: value})
    with pytest.raises(ValueError, match=rf"policy {name}: sinks is -1, expected >= 0"):
        make(sinks=-1)


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv"])
def test_a_window_below_the_queries_is_refused(name: str) -> None:
    make: Callable[..., Policy] = NAMED[name]
    with pytest.raises(ValueError, match=r"scores \d+ window queries, expected at most 16"):
        make(window=16)
    assert make(window=16, queries=16).queries == 16
    with pytest.raises(ValueError, match=r"policy arkv: scores 32 window queries, expected at most 16"):
        policy.arkv(window=16)
    assert policy.arkv(window=16, allocator=EntropyShare(queries=16)).queries == 16


# --- From bytes to states -----------------------------------------------------------------------------------------------


def layers_seen(layers: int, made: Policy) -> list[Seen]:
    generator = torch.Generator().manual_seed(7)
    sights = [seen_of(generator, rows=4, tokens=300, queries=16, sinks=made.sinks) for _ in range(layers)]
    assert made.scorer is not None
    return [replace(seen, layer=i, score=made.scorer.score(seen)) for i, seen in enumerate(sights)]


def allocate(made: Policy, sights: list[Seen], total: int) -> Allocation:
    """What a cache does between scoring and planning: scores of the unprotected tokens in front, in order of age."""
    movable = torch.stack([s.stored & ~s.protected for s in sights])
    scores = torch.stack([s.score for s in sights if s.score is not None])
    front = movable.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices
    tokens = movable.sum(2)
    pages = torch.tensor([[C_FULL], [C_INT4]]).expand(2, len(sights))
    oq = torch.linspace(0.2, 1, len(sights)).unsqueeze(1).expand_as(tokens)
    rows = RowsSeen(tokens, pages, ("bf16", "int4"), C_INT4, scores.gather(2, front), oq=oq)
    assert made.allocator is not None
    got = made.allocator.allocate(rows, total)
    assert isinstance(got, Allocation)
    return got


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8, 2.0])
def test_plans_hold_the_total(name: str, share: float) -> None:
    """Score, allocate, plan: within the bytes in every row, nothing revived, the same twice."""
    made = policy.resolve(name)
    sights = layers_seen(4, made)
    movable = torch.stack([s.stored & ~s.protected for s in sights])
    whole = int(((movable.sum(2) + 15) // 16).sum()) * C_FULL
    total = int(whole * share)
    got = allocate(made, sights, total)
    used = 0
    shares = [None] * 4 if got.full_share is None else list(got.full_share)
    for seen, row_bytes, r in zip(sights, got.bytes, shares, strict=True):
        assert made.planner is not None
        told = replace(seen, allowance=Allowance(row_bytes, PAGE_BYTES, r))
        state = made.planner.plan(told).state
        assert state is not None and torch.equal(state, made.planner.plan(told).state)
        assert torch.equal(state[seen.protected], seen.state[seen.protected])
        free = seen.stored & ~seen.protected
        full, quant = (((state == s) & free).sum(1) for s in (FULL, INT4))
        cost = (full + 15) // 16 * C_FULL + (quant + 15) // 16 * C_INT4
        assert (cost <= row_bytes).all()
        used += int(cost.sum())
        if share > 1:
            assert torch.equal(state, seen.state), "all fits: as it is"
        else:
            assert (state[free] != FULL).any()
    assert used <= total
    if name == "arkv" and share == 0.3:
        assert used > 0.9 * total, "quantized pages use what Full ones leave"


def test_arkv_evicts_nothing_at_a_quarter_and_keepers_do() -> None:
    for name, gone in (("arkv", False), ("snapkv", True)):
        made = policy.resolve(name)
        sights = layers_seen(1, made)
        free = sights[0].stored & ~sights[0].protected
        pages = (free.sum(1) + 15) // 16
        assert made.planner is not None
        state = made.planner.plan(replace(sights[0], allowance=Allowance(pages * C_INT4, PAGE_BYTES))).state
        assert state is not None and bool((state[free] == EVICTED).any()) is gone


def test_pyramid_of_the_paper() -> None:
    """C 2048, w 64, 32 layers: 3869 tokens down to 99, 63,488 in all (a page of 16 bytes: a byte is a token)."""
    rows = RowsSeen(torch.full((32, 1), 100_000), torch.full((1, 32), 16))
    allocator = policy.pyramidkv().allocator
    assert isinstance(allocator, Pyramid)
    got = allocator.allocate(rows, 32 * (2048 - 64)).bytes.flatten().tolist()
    assert (got[0], got[-1], sum(got)) == (3869, 99, 63_488)
    assert got == sorted(got, reverse=True)


def test_ada_kv_sums_to_h_times_b() -> None:
    made = policy.adakv()
    sights = layers_seen(3, made)
    for total in range(4 * 3 * C_INT4, 40_000, 3_700):
        got = allocate(made, sights, total)
        assert int(got.bytes.sum()) == total // C_INT4 * C_INT4
    spread = allocate(made, sights, 12_000).bytes
    assert (spread.max(1).values > spread.min(1).values).any(), "heads differ"
    even = allocate(policy.adakv(alpha=1.0), sights, 12_000).bytes
    assert (even == 1000).all()


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_a_knapsack_is_followed(share: float) -> None:
    """Formats token by token, from scores of attention: the plan is the allocation, and costs what it says."""
    made = replace(policy.arkv(scorer=MeanSpread()), allocator=Knapsack(("bf16", "int4")))
    sights = layers_seen(3, made)
    movable = torch.stack([s.stored & ~s.protected for s in sights])
    total = int(((movable.sum(2) + 15) // 16).sum() * C_FULL * share)
    got = allocate(made, sights, total)
    assert got.formats is not None
    front = movable.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices
    states = torch.tensor([EVICTED, FULL, INT4], dtype=torch.uint8)[got.formats.long()]
    formats = torch.zeros_like(states).scatter_(2, front, states)
    used = 0
    for seen, row_bytes, told, free in zip(sights, got.bytes, formats, movable, strict=True):
        assert made.planner is not None
        state = made.planner.plan(replace(seen, allowance=Allowance(row_bytes, PAGE_BYTES, formats=told))).state
        assert state is not None and torch.equal(state, torch.where(free, told, seen.state))
        pages = [(((state == s) & free).sum(1) + 15) // 16 * c for s, c in ((FULL, C_FULL), (INT4, C_INT4))]
        assert torch.equal(sum(pages), row_bytes)
        used += int(row_bytes.sum())
    assert total - C_FULL < used <= total


# --- OQ -----------------------------------------------------------------------------------------------------------------


def test_oq_of_statistics() -> None:
    allocator = EntropyShare(tau=(2.0, 1.0, 0.5))
    statistics = torch.tensor([[[0.5, 0.2, 0.1], [0.3, 0.4, 0.5]], [[1.0, 0.0, 1.0], [1.0, 0.0, float("nan")]]])
    got = allocator.oq(statistics)
    torch.testing.assert_close(got, torch.tensor([0.4**0.5 * 0.3 * 0.3**2, 1e-3 * 0.5**2]))
    known = allocator.known(torch.tensor([7, 8, 8]), torch.tensor([64, 63, 64]))
    assert known.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": 4}, r"EntropyShare: queries is 4, expected 0 or >= 8"),
        ({"stats": "paper"}, r"EntropyShare: stats is 'paper', expected 'sound' or 'code'"),
        ({"tau": (1.0, 0.0, 1.0)}, r"EntropyShare: tau is \(1.0, 0.0, 1.0\), expected three numbers > 0"),
    ],
)
def test_bad_parameters_of_oq_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntropyShare(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_scores_that_are_no_mass_are_not_joined(combine: str) -> None:
    """A token without an old score has 0, more than every score that is negative."""
    with pytest.raises(
        ValueError, match=f"policy arkv: combine is '{combine}', expected replace: scores of KeyDiversity"
    ):
        policy.arkv(combine=combine)  # type: ignore[arg-type]
    assert policy.arkv(scorer=MeanSpread(), combine=combine).combine == combine  # type: ignore[arg-type]
