"""What no compaction takes, over random histories, and that prompts in one pass score as each would alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations
from math import ceil

import pytest
import torch
from plain import KV_HEADS, PlainChat, words
from torch import Tensor

from kvstrata import Cache, Shape
from kvstrata.cache import Sequence as Handle
from kvstrata.episodes.limits import Sizes
from kvstrata.episodes.store import EpisodeStore
from kvstrata.policy import epicache
from kvstrata.rows import Spans
from kvstrata.sight import see

HISTORIES = 300


def drawn(r: random.Random, layers: int) -> Sizes:
    """Sizes that work, whatever they are."""
    while True:
        try:
            budget, apart = 16 * r.randint(10, 20), 16 * r.randint(0, 3)
            return Sizes(
                budget,
                16 * r.randint(3, 6),
                r.randint(8, 20),
                recent=16 * r.randint(1, 4),
                system=r.choice([0, 5, 16, 33, 60]),
                episodes=r.randint(2, 5),
                share=r.uniform(0.3, 0.9),
                heads=r.choice(["pair", "uniform"]),
                head_floor=r.choice([0.0, 0.25, 0.6, 1.0]),
                layers=r.choice([None, (budget - apart, budget + apart)]),
                private=r.choice(["full", "int8"]),
                kernel=r.choice([1, 17]),
            )
        except ValueError:
            continue


def test_guards_tail_and_floors_over_random_histories() -> None:
    """After every compaction, in every row: the system's tokens, the sinks, the recent ones, and as many as its floor."""
    model = PlainChat(layers=2)
    alone = compactions = 0
    for case in range(HISTORIES):
        r = random.Random(case)
        sizes, episodes = drawn(r, 2), 1 if case % 5 == 0 else r.randint(2, 5)
        prompts = [words(r.randint(1, sizes.prompt), 9 * case + e) for e in range(min(episodes, sizes.episodes))]
        store = EpisodeStore(model, sizes, lambda prompts=prompts: prompts)  # type: ignore[misc]
        text = words(sizes.budget + sizes.chunk + r.randint(1, 300), case)
        for part in (text, words(r.randint(1, 90), case + 1)):
            store.read(part)
            store.compact()
            check_rows(store, len(prompts), case)
        alone += len(prompts) == 1
        compactions += store.compactions
        store.close()
    assert alone >= HISTORIES // 5 and compactions > 2 * HISTORIES


def check_rows(store: EpisodeStore, episodes: int, case: int) -> None:
    sizes, length, tail = store.sizes, store.length, store.pending
    assert sizes.recent <= tail < sizes.recent + 16
    must = {*range(max(16, sizes.system)), *range(length - tail, length)}
    for layer in range(len(store.cache.shape.layers)):
        of_layer = sizes.layers[layer] if sizes.layers else sizes.budget
        floor = 16 * ceil(sizes.head_floor * of_layer / 16) - sizes.recent
        least = sizes.guards + 16 + (32 if episodes > 1 else 0)  # guards and a page, and a page of each half of a set
        for head in range(KV_HEADS):
            at = torch.empty(store.cache.stored_length(layer, store._seq, head), dtype=torch.int32)
            store.cache._store.positions(store._seq.id, layer, head, at.data_ptr())
            kept = at.tolist()
            assert len(set(kept)) == len(kept) and must <= set(kept), (case, layer, head)
            assert len(kept) >= max(floor, least) + tail, (case, layer, head)


# --- together and alone -------------------------------------------------------------------------------------------------------


class Scored:
    """A cache that tells what its compactions score tokens by, and plans nothing."""

    def __init__(self, model: PlainChat) -> None:
        self.model = model
        self.cache = Cache(Shape(model.shape.layers, model.shape.dtype), policy=epicache(256, recent=32, guards=16))
        self.scores: dict[int, Tensor] = {}
        """By layer: f32 [E, H, N], by rising position."""

    def read(self, seq: Handle, ids: Tensor, prompts: Sequence[Tensor], compact: bool) -> None:
        with self.cache.read(seq, len(ids), [len(p) for p in prompts], compact=compact) as step:
            self.model.forward(torch.cat([ids, *prompts]), step.positions, step, "none")

    def scored(self, monkeypatch: pytest.MonkeyPatch, seq: Handle, ids: Tensor, prompts: Sequence[Tensor]) -> None:
        self.scores = {}
        with monkeypatch.context() as patch:
            patch.setattr(self.cache._plans, "compact", self._note)
            self.read(seq, ids, prompts, True)

    def _note(self, layer: int, seq: int, spans: Spans) -> None:
        arithmetic = self.cache._plans.arithmetic[layer]
        seen = see(self.cache, layer, [seq], [self.cache._store.seen(layer, seq)], arithmetic, spans)
        assert seen is not None and seen.read is not None
        order = seen.positions.argsort(1)
        score = seen.read.patched()
        self.scores[layer] = score.gather(2, order.expand(score.shape))


def test_prompts_change_neither_pages_nor_logits() -> None:
    """Chunks with prompts behind them against the chunks alone: tables and positions are the same, keys, values and the logits
    of what follows within 1e-5; every prompt begins behind its chunk."""
    model, found = PlainChat(), []
    for prompts in ([words(9, 1), words(32, 2)], []):
        made = Scored(model)
        (seq,) = made.cache.new()
        for n in (100, 48, 1, 70):
            made.read(seq, words(n, n), prompts, False)
        behind = list(range(224, 224 + 9))
        step = made.cache.read(seq, 5, [len(p) for p in prompts], compact=False)
        assert step.positions[5 : 5 + 9].tolist() == behind[: 9 * bool(prompts)]
        assert step.positions[5 + 9 :].tolist() == list(range(224, 224 + 32))[: 32 * bool(prompts)]
        with made.cache.step([seq], [5]) as last:
            logits = model.forward(words(5, 9), last.positions, last)
        rows = [made.cache._store.row(seq.id, i, h) for i in range(4) for h in range(KV_HEADS)]
        found.append((logits, rows, [made.cache.materialize(i, seq) for i in range(4)]))
    (one, rows, tables), (other, plain_rows, plain) = found
    assert one is not None and other is not None and rows == plain_rows
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for (k, v, at), (plain_k, plain_v, plain_at) in zip(tables, plain, strict=True):
        assert torch.equal(at, plain_at)
        torch.testing.assert_close((k, v), (plain_k, plain_v), atol=1e-5, rtol=1e-5)


def test_prompts_together_score_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """After compactions, with sets: the chunk with all prompts behind it, in any order, against the chunk, and then each
    prompt in a pass of its own."""
    made = Scored(PlainChat())
    (seq,) = made.cache.new()
    prompts, chunk = [words(n, 50 + n) for n in (9, 32, 17)], words(48, 4)
    for n in (400, 128):
        made.read(seq, words(n, n), prompts, True)
    assert {tag for tag, _ in made.cache.sets(1, seq, 0)} > {0, 1, 2, 3}
    (told,) = made.cache.fork(seq)
    made.read(told, chunk, [], False)
    alone = []
    for prompt in prompts:
        made.scored(monkeypatch, told, chunk[:0], [prompt])
        alone.append(made.scores)
    for order in permutations(range(3)):
        (twin,) = made.cache.fork(seq)
        made.scored(monkeypatch, twin, chunk, [prompts[e] for e in order])
        assert made.cache.logical_length(twin) == made.cache.logical_length(told) == 576
        for layer, score in made.scores.items():
            for i, e in enumerate(order):
                torch.testing.assert_close(score[i], alone[e][layer][0], atol=1e-5, rtol=0)
        made.cache.free([twin])
    assert len(made.scores) == 4 and all(float(s.amax()) > 1e-2 for s in made.scores.values())
