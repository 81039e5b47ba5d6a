"""Every policy under a budget of bytes: the limit holds at every step, and the bytes are used."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from feeding import feed

from kvstrata import Budget, Cache, LayerSpec, Policy, Shape
from kvstrata.budget import Knapsack
from kvstrata.budget.costs import page_costs
from kvstrata.budget.protect import limit_bytes
from kvstrata.budget.room import fit, room
from kvstrata.config import BudgetExceeded, Unsupported
from kvstrata.policy import NAMED, MeanSpread, SinksAndTail, ThreeStates, arkv
from kvstrata.policy.choose import at_most

LAYERS = [LayerSpec(2, 8, 64)] * 3
COMPRESSING = sorted(name for name in set(NAMED) - {"full", "streaming"} if not NAMED[name]().archives)


def allocated(cache: Cache) -> int:
    """Bytes of the slabs' storages, as the allocator has them: independent of what the cache says of itself."""
    gc.collect()
    mine = set(map(id, cache._slabs._tensors.values()))
    return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if id(t) in mine)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", COMPRESSING)
def test_a_share_holds_at_every_step(name: str, batch: int) -> None:
    """At 25 %, ragged prompts, turns and decoding: held bytes, metadata included, stay within the share of the dense cache of
    what has been seen, at every step after the prompt; the peak within the limit of its time."""
    cache = Cache(Shape(LAYERS, torch.bfloat16), budget="25%", policy=name)
    seqs = cache.new(batch)
    generator = torch.Generator().manual_seed(0)
    prompts = [2050, 700, 1100, 900][:batch]
    feed(cache, seqs, prompts, generator)
    dense = sum(prompts) * cache.shape.token_bytes()
    for n in (*[1] * 34, 40, 7, 90, *[1] * 18):
        feed(cache, seqs, [n] * batch, generator)
        dense += n * batch * cache.shape.token_bytes()
        assert cache.nbytes() <= 0.25 * dense
    report = cache.report()
    assert report.dense_bytes == dense
    assert report.peak_bytes <= 0.25 * dense
    assert allocated(cache) == report.allocator_bytes
    assert report.nbytes >= 0.15 * report.dense_bytes, "the budget is used"
    assert report.states["evicted"] > 0 or sum(report.states.values()) == sum(report.logical_tokens) * cache.shape.rows


@pytest.mark.parametrize("kib", [360, 500, 1000])
@pytest.mark.parametrize("name", COMPRESSING)
def test_a_byte_limit_holds(name: str, kib: int) -> None:
    """From little more than sinks and tail upwards, the peak included; the rows' tokens are conserved."""
    cache = Cache(Shape(LAYERS, torch.bfloat16), budget=f"{kib}KiB", policy=name)
    (seq,) = cache.new()
    generator = torch.Generator().manual_seed(1)
    for n in (700, *[1] * 20, 200, 5, 16, 17, *[1] * 20):
        feed(cache, [seq], [n], generator)
        assert cache._slabs.note_peak() <= kib << 10
    report = cache.report()
    assert sum(report.states.values()) == sum(report.logical_tokens) * cache.shape.rows


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_limit_below_sinks_and_tail_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"budget: 60000 bytes for 1 sequence\(s\), expected at least \d+"):
        Cache(Shape(LAYERS, torch.bfloat16), budget=Budget.bytes(60000), policy=name)


@pytest.mark.parametrize("name", ["arkv", "h2o", "keydiff", "kivi", "snapkv", "streaming"])
def test_from_the_least_limit_upwards(name: str) -> None:
    """512 tokens under five limits: held bytes never above, prompt included. A byte under the least, which the refusal names,
    is refused."""
    shape = Shape([LayerSpec(2, 4, 32)] * 2, torch.bfloat16)
    with pytest.raises(ValueError, match="expected at least") as refused:
        Cache(shape, Budget.bytes(1000), name)
    least = int(str(refused.value).split()[-1])
    with pytest.raises(ValueError, match=f"budget: {least - 1} bytes .* at least {least}"):
        Cache(shape, Budget.bytes(least - 1), name)
    for limit in (least, least * 11 // 10, least * 3 // 2, 2 * least, 4 * least):
        cache = Cache(shape, Budget.bytes(limit), name)
        seqs, generator = cache.new(), torch.Generator().manual_seed(8)
        for n in (300, *[1] * 512):
            feed(cache, seqs, [n], generator)
            assert cache._slabs.note_peak() <= limit
        assert allocated(cache) == cache._slabs.held
        if limit >= least * 3 // 2:  # the least one leaves content nothing, by its definition
            assert cache.report().peak_bytes > 0.6 * limit, "the limit is used"


def test_a_slab_leaves_another_pool_what_it_still_needs() -> None:
    """Where books take more for a page than its entry, as scores do: a first pool's slab, as large as may be, leaves room for
    the second pool's pages."""
    policy, near = arkv(scorer=MeanSpread(), combine="max"), 0
    for limit in range(600_000, 660_000, 211):
        cache = Cache(Shape(LAYERS, torch.bfloat16), Budget.bytes(limit), policy)
        cache.new()
        slabs = cache._slabs
        slabs.bind(limit, policy, cache.shape, 1)
        slabs.reserve_pages([80, 0, 0])
        needed = [slabs._store.pool(0)["free"] + 1, 11, 0]
        if slabs._room(0, limit, needed) > 0:
            slabs.reserve_pages(needed)
            assert slabs.nbytes() <= limit
            near += slabs._left(limit) < 5 * 4096
    assert near > 20


@pytest.mark.parametrize("name", COMPRESSING)
def test_what_fits_is_exact(name: str) -> None:
    """Under a budget that holds everything, a policy that only evicts gives the very bits of ``full``."""
    outs = []
    for policy, budget in (("full", None), (name, "64MiB")):
        cache = Cache(Shape(LAYERS, torch.float32), budget=budget, policy=policy)
        if cache.policy.formats and name == "kivi":
            pytest.skip("kivi quantizes whatever the budget")
        (seq,) = cache.new()
        generator = torch.Generator().manual_seed(2)
        for n in (300, 1, 1):
            total = n
            with cache.step([seq], [n]) as step:
                for layer in range(3):
                    q, k, v = (torch.randn(total, h, 64, generator=generator) for h in (8, 2, 2))
                    outs.append(step.attend(layer, q, k, v))
        assert cache.report().states["evicted"] == 0
    half = len(outs) // 2
    for a, b in zip(outs[:half], outs[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_two_runs_keep_the_same_tokens() -> None:
    found = []
    for _ in range(2):
        cache = Cache(Shape(LAYERS, torch.bfloat16), budget="400KiB", policy="keydiff")
        (seq,) = cache.new()
        generator = torch.Generator().manual_seed(3)
        for n in (700, *[1] * 80):
            feed(cache, [seq], [n], generator)
        found.append([cache.materialize(layer, seq)[2].tolist() for layer in range(3)])
    assert found[0] == found[1]


def test_a_step_that_cannot_fit_raises_and_changes_nothing() -> None:
    """Twenty more sequences than the limit was fitted to: refused before a page is taken."""
    cache = Cache(Shape(LAYERS, torch.bfloat16), budget="400KiB", policy="keydiff")
    (seq,) = cache.new()
    generator = torch.Generator().manual_seed(4)
    feed(cache, [seq], [300], generator)
    before = [cache.materialize(layer, seq)[2].tolist() for layer in range(3)]
    more = cache.new(40)
    with pytest.raises((BudgetExceeded, ValueError), match="budget"):
        feed(cache, more, [16] * 40, generator)
    assert before == [cache.materialize(layer, seq)[2].tolist() for layer in range(3)]


@pytest.mark.parametrize("name", COMPRESSING)
def test_who_comes_later_finds_room(name: str) -> None:
    """One sequence fills the limit, then a prompt comes, then a fork parts from it: those that hold more than their share give
    it up before the step, and the limit holds."""
    cache = Cache(Shape(LAYERS, torch.bfloat16), budget="900KiB", policy=name)
    (first,) = cache.new()
    generator = torch.Generator().manual_seed(5)
    feed(cache, [first], [2048], generator)
    assert cache.nbytes() > 0.75 * (900 << 10), "it is full"
    (second,) = cache.new()
    feed(cache, [second], [300], generator)
    (fork,) = cache.fork(first)
    feed(cache, [first, fork], [3, 9], generator)
    for _ in range(70):
        feed(cache, [first, second, fork], [1] * 3, generator)
    report = cache.report()
    assert report.peak_bytes <= 900 << 10
    assert sum(report.states.values()) == sum(report.logical_tokens) * cache.shape.rows


@pytest.mark.parametrize("name", ["keydiff", "snapkv", "arkv"])
def test_forks_keep_to_a_full_limit(name: str) -> None:
    """Three sequences in the room of one: each is cut to its share before they part."""
    cache = Cache(Shape(LAYERS, torch.bfloat16), budget="700KiB", policy=name)
    seqs = cache.new()
    generator = torch.Generator().manual_seed(5)
    feed(cache, seqs, [900], generator)
    seqs += cache.fork(seqs[0])
    seqs = cache.select(seqs, [0, 1, 1])
    for _ in range(90):
        feed(cache, seqs, [1] * 3, generator)
        assert cache.nbytes() <= 700 << 10
    assert cache.report().peak_bytes <= 700 << 10
    with pytest.raises(BudgetExceeded, match="716800 bytes are too few for 43 sequences"):
        cache.fork(seqs[0], 40)


@pytest.mark.parametrize("name", ["adakv", "arkv", "h2o", "kivi", "snapkv", "streaming"])
@pytest.mark.parametrize("n", [128, 300])
def test_counted_tokens(name: str, n: int) -> None:
    """Never more than n stored in a row, of any state, after prompts, short steps and single tokens; most of them are used."""
    cache = Cache(Shape(LAYERS, torch.bfloat16), Budget.tokens(n, count=True), name)
    seqs = cache.new(2)
    generator = torch.Generator().manual_seed(6)
    most = 0
    for lengths in ([700, 90], *[[1, 1]] * 150, [16, 3], [200, 40], *[[7, 1]] * 20, *[[1, 1]] * 70):
        feed(cache, seqs, lengths, generator)
        stored = [[cache.stored_length(i, s, h) for s in seqs for h in range(2)] for i in range(3)]
        assert max(map(max, stored)) <= n
        most = max(most, min(row[0] for row in stored))
    assert n == 128 or most > 0.65 * n, (
        "interval and scores take their part of the bytes, the short row lends none of its own"
    )
    assert sum(cache.report().states.values()) == sum(cache.report().logical_tokens) * cache.shape.rows


def test_the_worst_go_first() -> None:
    """Not finite before finite, of equal scores the newest; protected tokens and empty places are left alone."""
    nan = float("nan")
    score = torch.tensor([[0.5, nan, 0.1, 0.1, 0.0, 0.0], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]])
    positions = torch.tensor([[0, 1, 2, 3, 9, -1], [5, 4, 3, 2, 1, 0]], dtype=torch.int32)
    state = torch.tensor([[1, 1, 3, 3, 1, 0], [1, 1, 1, 1, 1, 0]], dtype=torch.uint8)
    protect = torch.tensor([[False] * 4 + [True, False], [True] * 6])
    kept = [at_most(state, score, positions, protect, n)[0].tolist() for n in (5, 4, 3, 2, 0)]
    assert kept == [[1, 1, 3, 3, 1, 0], [1, 0, 3, 3, 1, 0], [1, 0, 3, 0, 1, 0], [1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0]]
    assert at_most(state, score, positions, protect, 0)[1].tolist() == state[1].tolist()


def test_counted_tokens_of_a_window() -> None:
    """What comes before the next plan has its place beside sinks and window."""
    policy = Policy("slow", SinksAndTail(4), sinks=4, window=None, interval=64)
    with pytest.raises(ValueError, match="budget: 82 tokens per row, expected at least 83 "):
        Cache(Shape(LAYERS, torch.bfloat16), Budget.tokens(82, count=True), policy)
    cache = Cache(Shape(LAYERS, torch.bfloat16), Budget.tokens(100, count=True), policy)
    seqs, most = cache.new(), 0
    generator = torch.Generator().manual_seed(7)
    for n in (300, *[1] * 200):
        feed(cache, seqs, [n], generator)
        most = max(most, cache.stored_length(0, seqs[0], 0))
    assert most == 4 + 32 + 63


def test_layers_of_different_heads_are_refused_at_once() -> None:
    shape = Shape([LayerSpec(2, 8, 64), LayerSpec(4, 8, 64)], torch.bfloat16)
    with pytest.raises(Unsupported, match=r"layers have \[2, 4\] KV heads"):
        Cache(shape, budget="1MiB", policy="keydiff")
    assert Cache(shape, policy="kivi").policy.formats == ("int4",), "without a division they are served"


def test_a_knapsack_chooses_inside_prompts() -> None:
    """A prompt in pieces, whose cuts have no bytes for all in int4: they go by mass per byte as the last plan does, where the
    planner by itself would keep few tokens, Full."""
    formats = ("int4", "int2")
    policy = Policy(
        "knapsack", ThreeStates("int4"), MeanSpread(16), Knapsack(("bf16", *formats)), formats, sinks=16, combine="max"
    )
    shape = Shape(LAYERS, torch.bfloat16)
    cache = Cache(shape, budget=Budget.bytes(420 << 10), policy=policy)
    (seq,) = cache.new()
    feed(cache, [seq], [2000], torch.Generator().manual_seed(3))
    states = cache.report().states
    assert cache.report().stored_tokens > 1.5 * (420 << 10) / shape.token_bytes() * shape.rows
    assert states["int2"] + states["int4"] > states["full"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_knapsack_holds_its_limit(dtype: torch.dtype) -> None:
    """A format for every token by mass per byte, in a cache: all formats are used, the limit holds at every step."""
    planner, allocator = ThreeStates("int4"), Knapsack(("bf16", "int8", "int4", "int2"))
    formats = allocator.formats[1:]
    policy = Policy("knapsack", planner, MeanSpread(16), allocator, formats, sinks=16, combine="max")
    limit = 900 << 10
    cache = Cache(Shape(LAYERS, dtype), budget=Budget.bytes(limit), policy=policy)
    (seq,) = cache.new()
    generator = torch.Generator().manual_seed(2)
    for n in (2000, *[1] * 40, 90, *[1] * 40):
        feed(cache, [seq], [n], generator)
        assert cache.nbytes() <= limit
    report = cache.report()
    assert report.peak_bytes <= limit
    assert min(report.states[name] for name in ("full", "int4", "evicted")) > 0
    assert sum(report.states.values()) == sum(report.logical_tokens) * cache.shape.rows
    assert report.nbytes > 0.7 * limit


@pytest.mark.parametrize(("name", "share"), [("h2o", 0.5), ("keydiff", 0.2)])
def test_a_tail_that_is_a_share_keeps_its_interval(name: str, share: float) -> None:
    """The tail that a policy asks for as a share of its budget is not taken from it to make room for other tokens."""
    shape = Shape([LayerSpec(8, 32, 128)] * 4, torch.bfloat16)
    asked = replace(NAMED[name](), window=None, window_share=share)
    tokens = 8192
    for budget in (Budget.bytes(tokens * shape.token_bytes()), Budget.tokens(tokens)):
        fitted = fit(asked, shape, budget, [4 * tokens])
        assert fitted.window is not None
        assert 0.95 * share < fitted.window / tokens <= share
        assert fitted.interval == asked.interval


@pytest.mark.parametrize("tokens", [256, 384, 512, 1024, 2048])
def test_heavy_hitters_and_recent_tokens_have_half_each(tokens: int) -> None:
    """Where what else a limit holds is much of it, both give way: the tail is no smaller than half of what they hold, but for
    halving; and where it is at its least, content is what is left."""
    shape = Shape(LAYERS, torch.bfloat16)
    fitted = fit(NAMED["h2o"](), shape, Budget.tokens(tokens), [8192])
    assert fitted.window is not None
    limit = limit_bytes(Budget.tokens(tokens), shape, [8192])
    content = room(fitted, shape, limit, 1).content // (shape.rows * page_costs(shape, 0, fitted)[1]) * 16
    assert fitted.window == 16 or content / 4 <= fitted.window <= content
    assert fitted.window <= tokens // 32 * 16
