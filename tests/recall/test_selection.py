"""A step of one token reads sinks, tail and the pages of highest vote: selection and output from the tokens alone."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from archived import SHAPE, Fed, GivenUp, error, fed, small
from choosing import Read, Table, read, table

from kvstrata import LayerSpec, Sequence, Shape

CLEAR = 3e-4
"""A vote this much (its share) ahead of the next is so whichever way a mean was rounded to 8 bits."""

Born = dict[tuple[Sequence, int, int], Table]


def tables(pair: Fed, seqs: list[Sequence]) -> Born:
    """Of every row."""
    layers = pair.cache.shape.layers
    return {
        (s, i, h): table(pair.cache, s, i, h) for s in seqs for i, x in enumerate(layers) for h in range(x.kv_heads)
    }


def judged(
    pair: Fed,
    seqs: list[Sequence],
    tolerance: float = 1e-5,
    born: Born | None = None,
    most: int = 4,
    weight: float = 1.0,
    aggregate: str = "sum",
) -> list[Read]:
    """Feeds one token to each and judges every row of the step whose selection is clear; those that were."""
    before, captured = tables(pair, seqs), pair.cache._store.captured()
    found, reads, all_reads = pair.step(seqs, [1] * len(seqs)), [], []
    for (s, layer, head), row in before.items():
        spec, b = pair.cache.shape.layers[layer], seqs.index(s)
        group = spec.q_heads // spec.kv_heads
        own = (x[-1, head] for x in pair.tokens(s, layer))
        q = found[layer][0][b, head * group : (head + 1) * group]
        then = None if born is None else born[s, layer, head]
        k, v = own
        expected = read(row, q, (k, v), pair.cache.policy.sinks, most, weight, aggregate, then)
        all_reads.append(expected)
        if expected.margin > CLEAR:
            reads.append(expected)
            got = found[layer][1][b, head * group : (head + 1) * group]
            assert error(got, expected.out) < tolerance, (s, layer, head, expected.entries, expected.margin)
    total, _, count, _ = (now - then for now, then in zip(pair.cache._store.captured(), captured, strict=True))
    assert count == sum(len(r.captured) for r in all_reads)
    assert total == pytest.approx(float(sum(r.captured.sum() for r in all_reads)), abs=2e-3 * count)
    assert len(reads) >= 0.7 * len(all_reads), "most selections are clear"
    return reads


def clear(reads: list[Read]) -> None:
    """The test would see another selection: what is read is not all, and not the same pages each time."""
    assert all(len(r.entries) == 4 for r in reads)
    assert len({tuple(r.entries) for r in reads}) > len(reads) // 2


@pytest.mark.parametrize("far", ["auto", None])
@pytest.mark.parametrize(("aggregate", "weight"), [("sum", 1.0), ("sum", 0.0), ("max", 1.0)])
def test_the_pages_of_highest_vote_are_read(far: str | None, aggregate: str, weight: float) -> None:
    pair = fed(small(aggregate=aggregate, spread_weight=weight), far=far)
    seqs = pair.new(2)
    pair.feed(seqs, [1000, 740])
    reads = []
    for _ in range(12):
        reads += judged(pair, seqs, aggregate=aggregate, weight=weight)
    clear(reads)
    assert (pair.cache.report().far_tokens > 0) == (far is not None)


def test_while_decoding_seals_and_archives() -> None:
    """300 decoded tokens, of which every 15th step is judged: new pages are in the index, their summaries follow them."""
    pair = fed()
    (seq,) = pair.new()
    pair.feed([seq], [500])
    archived = pair.cache.report().counts["archived"]
    reads = []
    for i in range(300):
        reads += judged(pair, [seq]) if i % 15 == 0 else []
        pair.feed([seq], [1])
    clear(reads)
    assert pair.cache.report().counts["archived"] > archived
    assert any(e > 40 for r in reads for e in r.entries), "new pages are among those that are read"


@pytest.mark.parametrize("dim", [32, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_head_dimensions_and_groups(dim: int, group: int) -> None:
    pair = fed(shape=Shape([LayerSpec(1, group, dim)] * 2, torch.float32))
    (seq,) = pair.new()
    pair.feed([seq], [700])
    clear([r for _ in range(4) for r in judged(pair, [seq])])


def test_bfloat16() -> None:
    pair = fed(shape=Shape(SHAPE.layers, torch.bfloat16))
    (seq,) = pair.new()
    pair.feed([seq], [700])
    clear([r for _ in range(4) for r in judged(pair, [seq], 1e-2)])


@pytest.mark.parametrize("state", ["int8", "int4"])
def test_archived_tokens_of_fewer_bits(state: str) -> None:
    """Summaries are of keys as they are stored; int8 arithmetic is within its own tolerance."""
    pair = fed(small(state=state))
    (seq,) = pair.new()
    pair.feed([seq], [700])
    assert pair.cache.report().states[state] == pair.cache.report().far_tokens > 0
    clear([r for _ in range(6) for r in judged(pair, [seq], 2e-2)])


def test_forks_crops_and_selections() -> None:
    """Each branch's index follows its own table; a page that a crop narrowed keeps the summary it was sealed with."""
    pair = fed()
    (seq,) = pair.new()
    pair.feed([seq], [700])
    kids = pair.fork(seq, 2)
    for _ in range(40):
        pair.feed([kids[0]], [1])
    pair.feed([kids[1]], [300])
    reads = judged(pair, [seq, *kids])
    sealed = tables(pair, [seq, *kids])
    pair.crop(kids[0], 450)
    pair.crop(seq, 333)
    assert any(not row.slots[: row.sealed].all() for row in tables(pair, [seq]).values()), "pages have holes"
    for _ in range(4):
        reads += judged(pair, [seq, *kids], born=sealed)
    turned = pair.select([seq, *kids], [2, 2, 0])
    for _ in range(4):
        reads += judged(pair, turned[:2])
    clear(reads)


def test_what_is_dropped_is_not_read() -> None:
    """A fifth of the tokens, sinks excepted: pages with holes stay in the index where they are."""
    pair = fed()
    seqs = pair.new(2)
    pair.feed(seqs, [760, 700])
    born, dropped = tables(pair, seqs), 0
    for s in seqs:
        for layer in range(2):
            positions = pair.cache.materialize(layer, s)[2]
            keep = (torch.rand(positions.shape, generator=pair.generator) < 0.8) | (positions < 32)
            keep[0] |= positions[0] > 300  # whole pages go, of one row
            keep[1] &= (positions[1] < 200) | (positions[1] >= 360)
            dropped += int((~keep & (positions >= 0)).sum())
            pair.cache.drop(layer, s, keep)
    assert pair.cache.report().states["evicted"] == dropped > 500
    clear([r for _ in range(10) for r in judged(pair, seqs, born=born)])


def test_what_is_left_of_a_sink_page_is_always_read() -> None:
    pair = fed()
    (seq,) = pair.new()
    pair.feed([seq], [700])
    for layer in range(2):
        positions = pair.cache.materialize(layer, seq)[2]
        pair.cache.drop(layer, seq, ~torch.isin(positions, torch.tensor([3, 20])))
        for h in range(2):
            assert pair.cache._store.row(seq.id, layer, h)[1][:2] == [0xFFFF & ~(1 << 3), 0xFFFF & ~(1 << 4)]
            assert positions[h, :32].tolist() == list(range(32)), "they were first in the table before"
    for _ in range(10):
        judged(pair, [seq])
    assert pair.cache._store.waiting(0, [seq.id])[1] < 16, "sinks wait for no plan"


SINKS_DROPPED = """
import torch
from archived import fed

pair = fed()
(seq,) = pair.new()
pair.feed([seq], [32 + 512 + 16])
keep = torch.ones(2, 560, dtype=torch.bool)
keep[:, :32] = False
for layer in range(2):
    pair.cache.drop(layer, seq, keep)
assert all(out.isfinite().all() for n in (1, 3, 1) for out in pair.feed([seq], [n]))
"""


def test_sinks_may_be_dropped() -> None:
    """Far pages are first in the table then. Another process, as memory may be read that is not there."""
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-X", "faulthandler", "-c", SINKS_DROPPED]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def given_up(pair: Fed, seq: Sequence, tokens: int, layers: int) -> Born:
    """A step that fails when it has attended so many layers; the tables as it left them."""
    with suppress(GivenUp), pair.cache.step([seq], [tokens]) as step:
        for layer in range(layers):
            step.attend(layer, *pair.drawn(layer, tokens))
        left = tables(pair, [seq])
        raise GivenUp
    return left


@pytest.mark.parametrize("tokens", [100, 600])
@pytest.mark.parametrize("layers", [1, 2])
def test_after_a_step_that_was_given_up(tokens: int, layers: int) -> None:
    """Pages that a prompt sealed (of 100 tokens), or clustered with older ones (of 600), before it failed are in no index
    afterwards; those of both keep the summary they were made with."""
    pair = fed(shape=Shape(SHAPE.layers * 2, torch.float32))
    (seq,) = pair.new()
    pair.feed([seq], [32 + 512 + 16])
    left = given_up(pair, seq, tokens, layers)
    pair.check_contents()
    pair.check_pools()
    reads = judged(pair, [seq], born=left)
    pair.feed([seq], [120])
    for _ in range(10):
        reads += judged(pair, [seq], born=left)
    pair.check_contents()
    clear(reads)
