"""strata in a cache: no token is lost under any limit, as many stay Full as fit, and the same tokens give the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from archived import EXACT, SHAPE, Fed, error, fed, small, worst
from test_limits import Watched, within
from torch import Tensor
from waiting import put_off, tables

from kvstrata import Budget, LayerSpec, Policy, Sequence, Shape
from kvstrata.config import BudgetExceeded
from kvstrata.policy.base import FAR, PROVISIONAL, UNGROUPED
from kvstrata.policy.strata import strata
from kvstrata.recall import PageMeans
from kvstrata.testing import fault

SINKS, WINDOW = 32, 16
GROUPED_HEADS = Shape([LayerSpec(2, 6, 32), LayerSpec(2, 2, 64)], torch.bfloat16)
SLIDING = Shape([LayerSpec(1, 4, 64), LayerSpec(1, 4, 64, 64), LayerSpec(1, 4, 64)], torch.bfloat16)


def quick(pages: int = 4, **changes: Any) -> Policy:
    """strata that reads so many pages, with segments that a few hundred tokens fill."""
    settings = {"sinks": SINKS, "window": WINDOW, "segment": 256, "segment_min": 256, "interval": 16, "chunk": 256}
    return strata(SINKS + WINDOW + 15 + 16 * pages, **(settings | changes))


def tried(pair: Fed, seqs: list[Sequence], lengths: list[int]) -> bool:
    """Feeds a step unless the budget refuses it. Whether its tokens stand: a plan may be refused after it."""
    drawn, before = pair.generator.get_state(), pair.cache.logical_length(seqs[0])
    try:
        pair.feed(seqs, lengths)
    except BudgetExceeded:
        if pair.cache.logical_length(seqs[0]) == before:
            return False
        pair.generator.set_state(drawn)
        tokens = [pair.drawn(layer, sum(lengths)) for layer in range(len(pair.cache.shape.layers))]
        pair.note(seqs, lengths, [(k, v) for _, k, v in tokens])
    return True


def full_tokens(pair: Fed) -> int:
    """Slots that are Full and Near."""
    report = pair.cache.report()
    return report.states["full"] - (report.far_tokens if not pair.cache.policy.formats else 0)


def check_stored(pair: Fed) -> None:
    """Every token of the layers that are planned is in one slot of each row, and what is Near as it came."""
    for seq in pair.pieces:
        for layer, spec in enumerate(pair.cache.shape.layers):
            if spec.window is not None:
                continue
            (k, v), (stored_k, stored_v, positions) = pair.tokens(seq, layer), pair.cache.materialize(layer, seq)
            _, tiers, _ = pair.looked(seq, layer)
            for h in range(spec.kv_heads):
                order = positions[h].argsort()
                assert positions[h, order].tolist() == list(range(len(k)))
                near = tiers[h] != FAR
                assert torch.equal(stored_k[h, near], k[positions[h, near].long(), h])
                assert torch.equal(stored_v[h, near], v[positions[h, near].long(), h])
    assert pair.cache.report().counts["evicted"] == 0


# --- limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["full", "int8", "int4"])
@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        (SHAPE, (1100, 1500, 3000, 16000)),
        (GROUPED_HEADS, (560, 800, 1600, 8000)),
        (SLIDING, (500, 700, 1200, 8000)),
    ],
    ids=["f32", "grouped", "sliding"],
)
def test_no_token_is_lost_and_every_limit_holds(shape: Shape, limits: tuple[int, ...], state: str) -> None:
    """Prompts, turns and decoding of two sequences, forks and crops; KiB. What is refused leaves all as it was."""
    refused, near, ran = 0, [], 0
    for kib in limits:
        try:
            pair = fed(quick(state=state), shape, budget=f"{kib}KiB")
            watched = Watched(pair)
            a, b = pair.new(2)
            stood = tried(pair, [a, b], [300, 70])
        except ValueError as error:  # too small for the sinks and tails of two: says so, and says what would do
            assert "expected at least" in str(error) and kib == limits[0]
            continue
        ran += 1
        steps = [[1, 1], [17, 130], [5, 1], *[[1, 1]] * 20, [16, 300], *[[1, 1]] * 20]
        for i, lengths in enumerate(steps):
            stood = tried(pair, [a, b], lengths)
            refused += not stood
            within(pair)
            if i == 10:
                refused += not forked(pair, a)
            if i == 24 and (length := pair.cache.logical_length(b)) > 200:
                pair.crop(b, max(length - 150, pair.cache.crop_floor(b)))
        within(pair)
        assert watched.most <= kib << 10 and watched.calls > 100
        check_stored(pair)
        near.append(full_tokens(pair) if kib >= limits[2] else 0)
        if kib == limits[-1]:
            assert pair.cache.report().far_tokens == pair.cache.report().counts["archived"] == 0
        if kib == limits[1]:
            assert pair.cache.report().far_tokens > 500
    assert ran >= 3 and near == sorted(near) and near[-1] >= near[-2] > 0


def forked(pair: Fed, seq: Sequence) -> bool:
    """A fork, that is fed apart and ends; or refused, with nothing changed."""
    before = tables(pair) if len(pair.cache.shape.layers) == 2 and pair.cache.shape == SHAPE else None
    held = len(pair.cache._live), pair.cache.nbytes()
    try:
        (kid,) = pair.fork(seq)
    except BudgetExceeded:
        assert len(pair.cache._live) == held[0] and pair.cache.nbytes() <= held[1]
        assert before is None or tables(pair)[0] == before[0] or pair.cache.report().counts["plans"]
        return False
    stood = tried(pair, [kid, seq], [40, 1])
    check_stored(pair)
    pair.free([kid])
    within(pair)
    return stood


def test_a_step_that_is_refused_changes_nothing() -> None:
    """Until there is no place for the books of what is Far: then tables and tokens stay, and are read on."""
    pair, refused = fed(quick(segment=1024, segment_min=1024), SHAPE, budget="560KiB"), 0
    (seq,) = pair.new()
    while tried(pair, [seq], [256]):
        assert pair.cache.logical_length(seq) < 20_000
    while refused < 3:
        tried(pair, [seq], [16])  # may be planned before it is refused
        before, length = tables(pair), pair.cache.logical_length(seq)
        if not tried(pair, [seq], [16]):
            refused += 1
            assert tables(pair) == before and pair.cache.logical_length(seq) == length
        within(pair)
        assert length < 20_000
    assert pair.cache.logical_length(seq) > 1500
    check_stored(pair)


def test_a_limit_that_holds_all_equals_full() -> None:
    """Nothing is archived, and with a selector that reads all, answers are those of the full cache."""
    pair, twin = fed(quick(90), budget="64MiB"), fed(Policy("full"))
    seqs, others = pair.new(2), twin.new(2)
    for lengths in ([700, 300], [1, 1], [90, 17], *[[1, 1]] * 40, [600, 1], [1, 1]):
        for a, b in zip(pair.feed(seqs, lengths), twin.feed(others, lengths), strict=True):
            assert error(a, b.double()) < EXACT
    report = pair.cache.report()
    assert report.far_tokens == report.counts["archived"] == report.counts["quantized"] == report.far_bytes == 0
    _, _, grouped = pair.looked(seqs[0], 0)
    assert (grouped != UNGROUPED).sum() > 2000, "and all is in pages by meaning"
    pair.check_contents()


@pytest.mark.parametrize("chunk", [64, 128, 256])
def test_a_limit_that_hardly_holds_all(chunk: int) -> None:
    """What the sequences do not need yet has room for the pages of a chunk: nothing goes down early."""
    pair = fed(quick(chunk=chunk), budget="4MiB")
    seqs = pair.new(2)
    pair.feed(seqs, [600, 90])
    for _ in range(20):
        pair.feed(seqs, [1, 1])
    assert pair.cache.policy.chunk == chunk and pair.cache.report().counts["archived"] == 0
    assert pair.cache.report().nbytes > 1.5 * (1 << 20)


def test_all_is_read_from_both_tiers() -> None:
    """Full archived tokens: exact attention, wherever they lie."""
    pair = fed(quick(40, state="full"), budget="6MiB")
    seqs = pair.new(2)
    for lengths in ([400, 130], [1, 1], [90, 1], *[[1, 1]] * 20):
        assert worst(pair, seqs, lengths) < EXACT
    assert pair.cache.report().far_tokens > 100 and full_tokens(pair) > 1000


def test_larger_limits_keep_more() -> None:
    """Where prompts are cut alike: a small limit has them cut in smaller chunks, which leaves it more."""
    kept = []
    for kib in (800, 1400, 2000, 2800, 6000):
        pair = fed(quick(chunk=64), budget=f"{kib}KiB")
        (seq,) = pair.new()
        pair.feed([seq], [900])
        for _ in range(32):
            pair.feed([seq], [1])
        within(pair)
        kept.append(full_tokens(pair))
    assert kept == sorted(kept) and kept[0] < 800 and kept[-1] == 4 * 932, kept


def test_the_pages_of_high_mass_stay() -> None:
    """Queries of late tokens towards one topic: its pages are Near, where a third of all are. By one mean: keys that come in a
    prompt are in pages by position yet, and a page's share is that of each of its tokens."""
    policy = quick(segment=1024, segment_min=1024, chunk=1216)
    policy = replace(policy, selector=PageMeans(budget=SINKS + WINDOW + 15 + 64))
    pair = fed(policy, Shape([LayerSpec(1, 2, 64)], torch.float32), budget="1300KiB")
    (seq,) = pair.new()
    dice = torch.Generator().manual_seed(5)
    topics = 3.0 * torch.randn(8, 64, generator=dice)
    label = torch.randint(0, 8, (1200,), generator=dice)
    k = (topics[label] + torch.randn(1200, 64, generator=dice))[:, None]
    q = topics[torch.tensor(3)].expand(1200, 2, 64).contiguous()
    with pair.cache.step([seq], [1200]) as step:
        step.attend(0, q, k, torch.randn(1200, 1, 64, generator=dice))
    positions, tier, _ = pair.looked(seq, 0)
    sealed = (positions[0] >= SINKS) & (positions[0] < 1200 - 2 * WINDOW)
    near = (tier[0] != FAR) & sealed
    wanted = label[positions[0].long()] == 3
    assert 0.15 < float(near.sum() / sealed.sum()) < 0.8
    assert (near & wanted).sum() / (sealed & wanted).sum() > 0.9


@pytest.mark.parametrize("step", [1, 16, 128])
@pytest.mark.parametrize("far", ["auto", None])
def test_what_a_dense_layer_holds_is_no_others(far: str | None, step: int) -> None:
    """It stays Near whatever its length: the other layer gives way, until the dense one alone fills most of the limit."""
    pair = fed(replace(quick(chunk=64), dense_layers=(0,)), budget="2000KiB", far=far)
    (seq,) = pair.new()
    pair.feed([seq], [300])
    while tried(pair, [seq], [step]):
        assert pair.cache.logical_length(seq) < 3000
    within(pair)
    dense = pair.cache.logical_length(seq) * SHAPE.token_bytes() // 2
    assert dense > (0.7 if far else 0.6) * 2000 * 1024
    assert put_off(pair) <= (1, 0), "but where the limit is reached"
    pair.check_contents(False)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_of_the_dense_cache(share: float) -> None:
    """The limit follows the sequences: the larger the share, the more stays Near."""
    pair = fed(quick(), budget=f"{share:.0%}")
    seqs = pair.new(2)
    for lengths in ([900, 700], *[[1, 1]] * 20, [700, 1200], *[[1, 1]] * 20):
        pair.feed(seqs, lengths)
        within(pair)
    report = pair.cache.report()
    dense = sum(len(pair.tokens(s, 0)[0]) for s in seqs) * SHAPE.token_bytes()
    assert report.limit_bytes is not None and report.limit_bytes >= 0.9 * share * dense
    assert report.nbytes < 1.1 * share * dense and report.far_tokens > 2000
    assert full_tokens(pair) > 1000
    pair.check_contents(False)


def test_a_budget_in_tokens_archives_all() -> None:
    """As icecache does that archives int8: same pages, same bytes, same answers."""
    same = replace(small(state="int8", chunk=256), selector=quick().selector)
    pair, twin = fed(quick(), budget="127tok"), fed(same, budget="127tok")
    seqs, others = pair.new(2), twin.new(2)
    for lengths in ([700, 90], *[[1, 1]] * 40, [17, 300], *[[1, 1]] * 20):
        for a, b in zip(pair.feed(seqs, lengths), twin.feed(others, lengths), strict=True):
            assert torch.equal(a, b)
    assert tables(pair) == tables(twin)
    for a, b in zip(seqs, others, strict=True):
        for x, y in zip(pair.looked(a, 1), twin.looked(b, 1), strict=True):
            assert torch.equal(x, y)
    assert pair.cache.report().far_tokens > 3000 and pair.cache.report().limit_bytes is None


@pytest.mark.parametrize("state", ["full", "int8", "int4"])
def test_without_a_far_tier(state: str) -> None:
    """All stays Near, quantized where it must, until the limit refuses: no token is lost."""
    pair = fed(quick(state=state), budget="2MiB", far=None)
    (seq,) = pair.new()
    while tried(pair, [seq], [128]):
        within(pair)
        assert pair.cache.logical_length(seq) < 20_000
    report = pair.cache.report()
    assert report.far_tokens == report.far_bytes == 0 and pair.cache.logical_length(seq) > 700
    if state != "full":
        assert report.states[state] > 4 * 1000
    pair.check_contents(state == "full")
    assert tried(pair, [seq], [1])
    pair.check_contents(state == "full")


@pytest.mark.parametrize("state", ["full", "int8"])
def test_without_a_far_tier_as_much_is_held_as_if_all_were_archived(state: str) -> None:
    """Full pages give way to those that have to be Near too."""
    held = []
    for policy in (quick(state=state), small(state=state, chunk=256)):
        pair = fed(policy, budget="2MiB", far=None)
        (seq,) = pair.new()
        while tried(pair, [seq], [32]):
            within(pair)
        held.append(pair.cache.logical_length(seq))
    assert held[0] >= 0.9 * held[1], held


@pytest.mark.parametrize(("state", "tokens"), [("full", 700), ("int8", 900)])
def test_without_a_far_tier_plans_leave_old_pages_alone(state: str, tokens: int) -> None:
    pair = fed(quick(state=state), budget="2MiB", far=None)
    (seq,) = pair.new()
    pair.feed([seq], [tokens])
    for _ in range(4):
        pair.feed([seq], [16])
    assert state == "full" or pair.cache.report().states["int8"] > 1500
    for h in range(2):
        before = set(pair.cache._store.row(seq.id, 0, h)[0])
        pair.feed([seq], [16])
        after = set(pair.cache._store.row(seq.id, 0, h)[0])
        assert len(before & after) > 0.6 * len(before)


# --- the same bits ----------------------------------------------------------------------------------------------------------

LENGTHS = [[600, 90, 300], [1, 1, 1], [17, 300, 20], *[[1, 1, 1]] * 40]


def answers(pair: Fed, seqs: list[Sequence], tokens: list[list[list[Tensor]]], which: list[int]) -> list[list[Tensor]]:
    """By step, of each of the sequences its outputs of all layers; tokens: of three, by step and layer."""
    found = []
    for lengths, layers in zip(LENGTHS, tokens, strict=True):
        mine = [lengths[i] for i in which]
        with pair.cache.step(seqs, mine) as step:
            out = [
                step.attend(layer, *(torch.cat([x.split(lengths)[i] for i in which]) for x in qkv))
                for layer, qkv in enumerate(layers)
            ]
        found.append([torch.cat([o.split(mine)[i].flatten() for o in out]) for i in range(len(which))])
    return found


@pytest.mark.parametrize("state", ["full", "int8"])
@pytest.mark.parametrize("kib", [1000, 1500, 2500])
def test_batch_mates_change_nothing(kib: int, state: str) -> None:
    """Ragged rows of three sequences, each with a limit of its own: the bits of three caches, and of another run."""
    budget = Budget.bytes(kib << 10, per="sequence")
    drawn = fed(small())
    tokens = [[drawn.drawn(layer, sum(lengths)) for layer in range(2)] for lengths in LENGTHS]
    runs = []
    for _ in range(2):
        pair = fed(quick(state=state), SHAPE, budget=budget)
        seqs = pair.new(3)
        runs.append((answers(pair, seqs, tokens, [0, 1, 2]), tables(pair), pair.cache.report().far_tokens))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    far = 0
    for i, seq in enumerate(seqs):
        alone = fed(quick(state=state), SHAPE, budget=budget)
        (one,) = alone.new()
        for t, (a, b) in enumerate(zip(runs[0][0], answers(alone, [one], tokens, [i]), strict=True)):
            assert torch.equal(a[i], b[0]), (i, t)
        for layer in range(2):
            for x, y in zip(pair.looked(seq, layer), alone.looked(one, layer), strict=True):
                assert torch.equal(x, y)
        far += alone.cache.report().far_tokens
    assert far == runs[0][2] == runs[1][2] and (far > 0 or kib == 2500)


# --- the counter ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [16, 64])
def test_tokens_are_put_together_a_logarithm_of_times(interval: int) -> None:
    """Over 3,000 decoded tokens: Far pages are written no more than log2(segment_min / 64) + 3 times a token, and of what is
    together for the time being each power of two of the counter has been put together since it was complete."""
    policy = small(segment=1024, segment_min=1024, interval=interval, state="int8")
    pair = fed(policy, Shape([LayerSpec(1, 1, 32)], torch.float32))
    (seq,) = pair.new()
    pair.feed([seq], [1])
    born: dict[tuple[int, ...], int] = {}  # of a page by its positions: tokens that waited when it was first seen
    seen_groups = set()
    with fault("far.write", 1 << 30) as writes:
        for n in range(2, 3001):
            pair.feed([seq], [1])
            if n % interval == 0:
                seen_groups.add(check_counter(pair, seq, born))
    archived = pair.cache.report().far_tokens
    assert archived > 2800 and max(seen_groups) >= 8
    each = writes.visits * 16 / archived
    assert 2 < each < 7, each


def check_counter(pair: Fed, seq: Sequence, born: dict[tuple[int, ...], int]) -> int:
    """Units of 64 tokens that wait."""
    positions, _, grouped = pair.looked(seq, 0)
    waits = positions[0][grouped[0] == PROVISIONAL].tolist()
    pages = [tuple(waits[i : i + 16]) for i in range(0, len(waits), 16)]
    for page in [p for p in born if p not in pages]:
        del born[page]
    for page in pages:
        born.setdefault(page, len(waits))
    units, start = len(waits) // 64, 0
    for size in [1 << b for b in reversed(range(units.bit_length())) if units >> b & 1]:
        end = start + size * 64
        assert all(born[page] >= end for page in pages[start // 16 : end // 16])
        start = end
    return units
