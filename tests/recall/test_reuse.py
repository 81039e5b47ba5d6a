"""Layers that read what an earlier one has selected: one table for them all, one selection, and where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from archived import Fed, fed, small
from choosing import Table, read, seen, table

from kvstrata import Cache, LayerSpec, Sequence, Shape, Unsupported
from kvstrata.policy import icecache, strata
from kvstrata.policy.base import Policy
from kvstrata.recall import PageMeans, TopPages
from kvstrata.testing import fault

SHAPE = Shape([LayerSpec(2, 4, 32)] * 5, torch.float32)
PAGES, SINKS = 4, 32
BUDGET = SINKS + 16 + 15 + 16 * PAGES
CLEAR = 1e-3
"""By what share of its vote the last page is to be ahead of the next, so that the reference selects the same ones."""


def reusing(reuse: int = 3, **more: object) -> Policy:
    policy = small(PAGES, **more)
    return replace(policy, selector=PageMeans(BUDGET, reuse=reuse))


def tables(pair: Fed, seq: Sequence) -> list[list[Table]]:
    return [[table(pair.cache, seq, layer, head) for head in range(2)] for layer in range(len(pair.cache.shape.layers))]


def check_step(pair: Fed, seq: Sequence, anchors: list[int]) -> int:
    """A step of one token: each layer reads what its anchor selects. Returns how many selections were clear."""
    before = tables(pair, seq)
    found = pair.step([seq], [1])
    checked = 0
    for layer, (q, out) in enumerate(found):
        anchor = anchors[layer]
        for h in range(2):
            heads = slice(2 * h, 2 * h + 2)
            own = [(x[0, h] for x in pair.pieces[seq][one][-1]) for one in (layer, anchor)]
            (k, v), (anchor_k, anchor_v) = own
            chosen = read(before[anchor][h], found[anchor][0][0, heads], (anchor_k, anchor_v), SINKS, PAGES)
            if chosen.margin < CLEAR:
                continue
            row = before[layer][h]
            steady = [*range(SINKS // 16), *range(row.sealed, len(row.pages))]
            keys, values = seen(row, torch.tensor(steady + chosen.entries), (k, v))
            want = (q[0, heads].double() @ keys.T * q.shape[-1] ** -0.5).softmax(-1) @ values
            assert float((out[0, heads].double() - want).abs().max()) < 1e-4
            checked += 1
    return checked


def one_table(pair: Fed, seq: Sequence, anchors: list[int]) -> bool:
    """Whether rows hold the same tokens in the same places as their anchors'."""
    rows = tables(pair, seq)
    return all(
        torch.equal(rows[layer][h].positions, rows[anchor][h].positions)
        for layer, anchor in enumerate(anchors)
        for h in range(2)
    )


@pytest.mark.parametrize(
    ("reuse", "anchors", "far"), [(3, [0, 0, 0, 3, 3], "auto"), (2, [0, 0, 2, 2, 4], None)], ids=["far", "near"]
)
def test_layers_read_what_their_anchor_selects(reuse: int, anchors: list[int], far: str | None) -> None:
    pair = fed(reusing(reuse), SHAPE, far=far)
    (seq,) = pair.new()
    pair.feed([seq], [1100])  # three chunks
    checked = 0
    for t in range(20):  # over the end of an interval of each group
        if t % 4 == 0:
            checked += check_step(pair, seq, anchors)
        else:
            pair.feed([seq], [1])
        assert one_table(pair, seq, anchors)
    assert checked > 30
    pair.check_contents()
    pair.check_pools()
    selections = pair.cache.report().recall.selections  # type: ignore[union-attr]
    assert selections == 20 * len(set(anchors)) * 4, "only anchors tell what they read"


def test_dense_layers_are_in_no_group() -> None:
    pair = fed(reusing(2, dense_layers=(1,)), SHAPE)
    (seq,) = pair.new()
    pair.feed([seq], [700])
    assert one_table(pair, seq, [0, 1, 0, 3, 3])
    assert not one_table(pair, seq, [0, 0, 2, 3, 4])


def test_sequences_follow_each_by_itself() -> None:
    """A batch answers as its sequences do alone, forks and crops too."""
    together, alone = fed(reusing(), SHAPE), [fed(reusing(), SHAPE, seed=1) for _ in range(2)]
    seqs, ones = together.new(2), [one.new()[0] for one in alone]
    lengths = [700, 450]
    tokens = [[together.drawn(layer, n) for layer in range(5)] for n in lengths]

    def feed(
        pair: Fed, which: list[int], given: list[list[list[torch.Tensor]]], of: list[Sequence]
    ) -> list[torch.Tensor]:
        with pair.cache.step(of, [len(given[i][0][0]) for i in which]) as step:
            parts = [[torch.cat([given[i][layer][x] for i in which]) for x in range(3)] for layer in range(5)]
            return [step.attend(layer, *parts[layer]) for layer in range(5)]

    feed(together, [0, 1], tokens, seqs)
    for i in range(2):
        feed(alone[i], [i], tokens, [ones[i]])
    for t in range(20):
        tokens = [[together.drawn(layer, 1) for layer in range(5)] for _ in range(2)]
        got = feed(together, [0, 1], tokens, seqs)
        for i in range(2):
            want = feed(alone[i], [i], tokens, [ones[i]])
            assert all(torch.equal(g[i], w[0]) for g, w in zip(got, want, strict=True)), f"step {t}"


def test_a_layer_whose_plan_failed_selects_for_itself() -> None:
    """The anchor was planned, the next layer was not: it has other pages, and its own selection; steps go on."""
    pair = fed(reusing(), SHAPE, far=None)
    (seq,) = pair.new()
    pair.feed([seq], [600])
    with fault("plan.after_write", 3):  # of the second layer's first row
        for _ in range(16):
            pair.feed([seq], [1])
    assert pair.cache.report().counts["plans put off"] >= 1
    assert not one_table(pair, seq, [0, 0, 0, 3, 3])
    for _ in range(3):
        pair.feed([seq], [1])
    pair.check_contents()


def test_reuse_changes_on_a_live_cache() -> None:
    pair, twin = fed(reusing(), SHAPE), fed(reusing(), SHAPE)
    selector = pair.cache.policy.selector
    assert isinstance(selector, PageMeans)
    outs = []
    for one in (pair, twin):
        (seq,) = one.new()
        one.feed([seq], [700])
        if one is pair:
            one.cache.set_selector(replace(selector, reuse=1))
            one.cache.set_selector(selector)
        outs.append([x for _ in range(3) for x in one.feed([seq], [1])])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="SplitMeans: reuse is 0, expected at least 1 layer"):
        icecache(reuse=0)
    with pytest.raises(Unsupported, match=r"PageMeans: estimate is 0\.5 with reuse 3, expected 0 or reuse 1"):
        PageMeans(256, estimate=0.5, reuse=3)
    with pytest.raises(ValueError, match="TopPages: reuse is 2, expected 1"):
        TopPages(256, reuse=2).native(32, 16)
    with pytest.raises(Unsupported, match="policy strata: reuse is 2 with a scorer or an allocator"):
        policy = strata()
        replace(policy, selector=replace(policy.selector, reuse=2))  # type: ignore[type-var]
    uneven = Shape([LayerSpec(2, 4, 32), LayerSpec(4, 4, 32)], torch.float32)
    with pytest.raises(Unsupported, match="layer 1 has 4 KV heads, layer 0, whose selection it reads, has 2"):
        Cache(uneven, policy=icecache(reuse=2))
    Cache(uneven, policy=icecache())
