"""A conversation's tokens: exact while all fits, hard limits and sizes beyond, for any number of episodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from feeding import check_pages
from plain import KV_HEADS, PlainChat, words

from kvstrata import Budget, BudgetExceeded, Cache, LayerSpec, Shape
from kvstrata.config import SLOTS
from kvstrata.episodes.limits import Sizes, sizes_of
from kvstrata.episodes.store import EpisodeStore

SIZES = Sizes(256, 128, 32)


def made(model: PlainChat, episodes: int, sizes: Sizes = SIZES) -> EpisodeStore:
    prompts = [words(32 - 3 * e, 100 + e) for e in range(episodes)]
    return EpisodeStore(model, sizes, lambda: prompts)


def dense(model: PlainChat, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token under a whole cache."""
    cache = Cache(model.shape)
    (seq,) = cache.new()
    with cache.step([seq], [len(ids)]) as step:
        logits = model.forward(ids, step.positions, step)
    assert logits is not None
    return logits


def check_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit: sums are taken in another order."""
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert int(found.argmax()) == int(expected.argmax())


def test_what_fits_is_exact() -> None:
    """B + C tokens: the next 32 logits are those of a whole cache."""
    model = PlainChat()
    store, ids = made(model, 4), words(384, 1)
    logits = store.read(ids[:352], logits=True)
    assert logits is not None
    check_logits(logits, dense(model, ids[:352]))
    for n in range(352, 384):
        logits = store.read(ids[n : n + 1], logits=True)
        assert logits is not None
        check_logits(logits, dense(model, ids[: n + 1]))
    assert store.compactions == 0 and store.room == 0
    store.read(ids[:1])
    assert store.compactions == 1


class Watched(EpisodeStore):
    """Notes the most that the cache held at any page taken."""

    most = 0

    def _watch(self) -> None:
        slabs = self.cache._slabs
        lend = slabs._lend

        def lent(*args: object) -> None:
            lend(*args)  # type: ignore[arg-type]
            self.most = max(self.most, self.cache.nbytes())

        slabs._lend = lent  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("heads", ["pair", "uniform"])
@pytest.mark.parametrize("episodes", [1, 4, 8])
def test_near_bytes_never_pass_the_limit(episodes: int, heads: str) -> None:
    """From C to 20 C tokens, then questions; with equal heads the most is the same at 10 C as at 20 C."""
    model = PlainChat(dtype=torch.bfloat16)
    sizes = replace(SIZES, heads=heads, episodes=max(episodes, 2))
    store = Watched(model, sizes, lambda: [words(32, e) for e in range(episodes)])
    store._watch()
    limit, peaks, ids = sizes.limit_bytes(model.shape), [], words(20 * 128, 2)
    for n in range(0, len(ids), 128):
        store.read(ids[n : n + 128])
        peaks.append(max(store.most, store.cache.report().peak_bytes))
        assert peaks[-1] <= limit
    if heads == "uniform":
        assert peaks[9] == peaks[19]
    assert store.compactions > 10 and store.episodes == episodes
    for e in range(episodes):
        store.show([e])
        store.make_room(40)
        store.read(words(40, e))
        assert store.cache.nbytes() <= limit


def test_what_is_stored() -> None:
    """Sums over rows: backbone, sets and tail, whatever the heads divide; sinks and recent tokens in every row."""
    model = PlainChat(dtype=torch.bfloat16)
    store = made(model, 4, replace(SIZES, system=40))
    store.read(words(2000, 3))
    store.compact()
    backbone, private = store.sizes.planner.sizes(256, 4)
    planner = store.sizes.planner
    for layer in range(4):
        rows = [store.cache.stored_length(layer, store._seq, h) for h in range(KV_HEADS)]
        tail = store.pending
        assert 64 <= tail < 80
        assert sum(rows) <= KV_HEADS * (backbone + 4 * private + tail)
        for head in range(KV_HEADS):
            assert rows[head] >= planner.floor(layer, 40, 4) - 64 + tail
            _, _, positions = store.cache.materialize(layer, store._seq)
            kept = set(positions[head].tolist())
            assert set(range(40)) <= kept and set(range(2000 - tail, 2000)) <= kept


def test_tokens_are_run_once_and_prompts_with_a_chunk() -> None:
    """N (1 + E W / C) and no more, once the room before the first compaction is full."""
    model = PlainChat()
    store = EpisodeStore(model, SIZES, lambda: [words(32, e) for e in range(4)])
    store.read(words(128 * 20, 4))
    compacted = 20 - 2 - 1  # the first B + C are two chunks and one, the last chunk is pending
    assert store.compactions == compacted
    assert model.read == 128 * 20 + compacted * 4 * 32


def test_two_runs_are_alike() -> None:
    model, found = PlainChat(dtype=torch.bfloat16), []
    for _ in range(2):
        store = made(model, 3)
        store.read(words(1500, 5))
        store.show([1])
        logits = store.read(words(20, 6), logits=True)
        assert logits is not None
        found.append((logits, [store.cache.materialize(i, store._seq) for i in range(4)]))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_answer_can_be_taken_back() -> None:
    model = PlainChat()
    store = made(model, 3)
    store.read(words(900, 7))
    store.show([0])
    store.make_room(60)
    mark, before = store.mark(), [store.cache.materialize(i, store._seq) for i in range(4)]
    first = store.read(words(50, 8), logits=True)
    store.back(mark)
    after = [store.cache.materialize(i, store._seq) for i in range(4)]
    for a, b in zip(before, after, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    second = store.read(words(50, 8), logits=True)
    assert first is not None and second is not None and torch.equal(first, second)
    store.compact()
    with pytest.raises(ValueError, match="a compaction came since"):
        store.back(mark)


@pytest.mark.parametrize(("private", "share"), [("full", 0.51), ("int8", 0.37)])
def test_sets_cost_half_of_separate_caches(private: str, share: float) -> None:
    """Bytes of four episodes beside those of four caches of B = 1,024 bf16 tokens, N = 16 B, as the allocator says."""
    model = PlainChat(layers=2, dtype=torch.bfloat16)
    store = EpisodeStore(
        model, Sizes(1024, 256, 32, private=private), lambda: [words(32, e) for e in range(4)]
    )  # fmt: skip
    store.read(words(16 * 1024, 9))
    store.compact()
    while store.cache._store.give_way():  # what is Near and Far counts once
        pass
    store.cache.trim()
    tail = store.pending
    pools = [store.cache._store.pool(p) for p in range(store.cache._store.n_pools)]
    ring = sum(store.cache._store.ring_pages()) * (pools[0]["page_bytes"] + 64)
    used = sum(p["used"] * (p["page_bytes"] + 64) for p in pools) - ring
    page = pools[0]["page_bytes"] + 64
    tails = 2 * KV_HEADS * -(-tail // 16) * page
    separate = 4 * 2 * KV_HEADS * 1024 // 16 * page
    check_pages(store.cache)
    assert (used - tails) / separate <= share


# --- sizes ----------------------------------------------------------------------------------------------------------------


def test_the_largest_budget_that_bytes_hold() -> None:
    shape = PlainChat().shape
    for limit in (1 << 20, 3 << 20, 64 << 20):
        sizes = sizes_of(Budget.bytes(limit), shape, episodes=4)
        assert sizes.limit_bytes(shape) <= limit
        bigger = sizes_of(Budget.tokens(sizes.budget + 16), shape, episodes=4)
        assert bigger.limit_bytes(shape) > limit
        assert sizes.chunk == min(2048, sizes.budget // 2 // 16 * 16) and sizes.prompt == min(512, sizes.chunk // 4)


def test_too_few_bytes_are_told_how_many_work() -> None:
    shape = PlainChat().shape
    with pytest.raises(ValueError, match="expected at least") as error:
        sizes_of(Budget.bytes(1000), shape)
    least = int(str(error.value).split()[-1])
    sizes_of(Budget.bytes(least), shape)
    with pytest.raises(ValueError, match=f"expected at least {least}"):
        sizes_of(Budget.bytes(least - 1), shape)


@pytest.mark.parametrize("options", [{}, {"chunk": 128, "prompt": 32}, {"system": 200}, {"recent": 128}])
def test_tokens_that_do_not_work_are_told_how_many_do(options: dict[str, int]) -> None:
    """No inner part is named; the least works, a page less does not, nor what is no whole page."""
    shape = PlainChat().shape
    with pytest.raises(ValueError, match=r"^budget: 16 tokens, expected a multiple of 16, at least \d+$") as error:
        sizes_of(Budget.tokens(16), shape, **options)
    least = int(str(error.value).split()[-1])
    assert sizes_of(Budget.tokens(least), shape, **options).budget == least
    for wrong in (least - SLOTS, least + 1, 600):
        with pytest.raises(ValueError, match=f"^budget: {wrong} tokens, expected a multiple of 16, at least {least}$"):
            sizes_of(Budget.tokens(wrong), shape, **options)


def test_what_no_budget_mends_is_named_itself() -> None:
    for options, text in (
        ({"chunk": 100}, "^chunk is 100"),
        ({"chunk": 64}, "^recent is 64"),
        ({"share": 1.5}, "share is"),
    ):
        with pytest.raises(ValueError, match=text):
            sizes_of(Budget.tokens(600), PlainChat().shape, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": 100}, "budget has 100"),
        ({"chunk": 100}, "chunk is 100, expected a multiple of 16"),
        ({"prompt": 4}, "prompt_tokens is 4, expected at least 8"),
        ({"recent": 128}, "recent is 128, expected less than the chunk of 128"),
        ({"episodes": 0}, "max_episodes is 0"),
        ({"system": 200}, "budget is 256 tokens, expected at least"),
        ({"share": 1.5}, "share is 1.5"),
    ],
)
def test_bad_sizes(options: dict, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=text):
        Sizes(**({"budget": 256, "chunk": 128, "prompt": 32} | options))


def test_a_page_too_little_is_an_error() -> None:
    """Half of what the sizes need: refused, nothing passes it."""
    model = PlainChat()
    store = made(model, 8)
    limit = store.sizes.limit_bytes(model.shape) // 2
    store.cache = Cache(model.shape, budget=f"{limit}B", policy=store.sizes.policy())
    (store._seq,) = store.cache.new()
    with pytest.raises(BudgetExceeded, match=f"limit is {limit} bytes"):
        store.read(words(128 * 10, 10))
    assert store.cache.report().peak_bytes <= limit


def test_more_tokens_than_positions() -> None:
    store = made(PlainChat(positions=500), 2)
    with pytest.raises(ValueError, match="0 tokens seen and 533 more, expected at most the 500 positions"):
        store.read(words(501, 0))
    store.read(words(380, 0))
    with pytest.raises(ValueError, match="380 tokens seen and 121 more"):  # the prompts of a compaction behind them
        store.read(words(89, 0))


def test_shape_of_the_test_model() -> None:
    assert isinstance(PlainChat().shape, Shape)


def test_layers_are_of_the_shape_and_sum_to_the_budget() -> None:
    shape = PlainChat().shape
    for layers, text in (((256, 256), "has 2 budgets, expected 4"), ((256, 256, 256, 320), "sum to 1088 tokens")):
        with pytest.raises(ValueError, match=text):
            EpisodeStore(PlainChat(), replace(SIZES, layers=layers), list)
    with pytest.raises(ValueError, match="layers with a budget of bytes"):
        sizes_of(Budget.bytes(8 << 20), shape, layers=(256,) * 4)
    store = made(PlainChat(), 4, replace(SIZES, layers=(192, 320, 320, 192)))
    store.read(words(1500, 11))
    assert store.cache.report().peak_bytes <= store.sizes.limit_bytes(shape)


def test_the_least_uneven_division_is_in_the_limit() -> None:
    """Heads that take unlike shares round less off: what each layer may hold counts that."""
    sizes = Sizes(256, 128, 32, episodes=8)
    shape = Shape([LayerSpec(8, 8, 32)] * 2, torch.float32)
    _, sets = sizes.stored_pages(shape, 0)
    rows = [18, 18, 18, 18, 12, 12, 12, 20]  # pages, 16 on average
    assert sum(rows) == 8 * 16
    private = sum(sizes.planner.sizes(16 * b, 8)[1] // 16 for b in rows)
    assert sets >= 8 * private


def test_head_dimensions_that_are_not_quantized_go_far() -> None:
    shape = Shape([LayerSpec(2, 4, 24)] * 2, torch.float32)
    cache = Cache(shape, "8MiB", SIZES.policy())
    assert cache._slabs.has_far
