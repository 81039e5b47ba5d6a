"""Random appends, clusterings, forks, crops, drops and ends beside a dictionary: each token in one slot, unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from archived import fed, small
from torch import Tensor

from kvstrata import Cache, LayerSpec, Policy, Sequence, Shape
from kvstrata.config import BudgetExceeded
from kvstrata.policy.base import FAR, PROVISIONAL, UNGROUPED
from kvstrata.recall import Far
from kvstrata.testing import fault

SHAPE = Shape([LayerSpec(2, 2, 32), LayerSpec(1, 2, 32), LayerSpec(1, 1, 64)], torch.bfloat16)
SINKS, MOST = 32, 5
"""MOST: sequences at a time."""

Token = tuple[bytes, bytes]


def rows(shape: Shape) -> Iterator[tuple[int, int]]:
    """(layer, head) of each row of a sequence."""
    for layer, spec in enumerate(shape.layers):
        yield from ((layer, h) for h in range(spec.kv_heads))


def raw(x: Tensor) -> list[bytes]:
    """The bytes of each line of x [n, D]."""
    width, whole = x.shape[1] * x.element_size(), x.contiguous().view(torch.uint8).numpy().tobytes()
    return [whole[at : at + width] for at in range(0, len(whole), width)]


class Walk:
    """A cache and its model: of each sequence its length, and of each row the stored tokens by position."""

    def __init__(self, policy: Policy, seed: int, **settings: Any) -> None:
        self.pair = fed(policy, SHAPE, seed, **settings)
        self.cache: Cache = self.pair.cache
        self.dice = torch.Generator().manual_seed(1000 + seed)
        self.model: dict[Sequence, dict[tuple[int, int], dict[int, Token]]] = {}
        self.lengths: dict[Sequence, int] = {}
        self.done = dict.fromkeys(("feed", "fail", "fork", "crop", "select", "drop", "free", "compress", "refused"), 0)
        self.deck: list[int] = []

    def drawn(self, most: int) -> int:
        return int(torch.randint(0, most, (1,), generator=self.dice))

    def one(self) -> Sequence:
        return list(self.model)[self.drawn(len(self.model))]

    # --- verbs --------------------------------------------------------------------------------------------------------

    def begin(self, n: int) -> None:
        for s in self.cache.new(n):
            self.model[s] = {row: {} for row in rows(SHAPE)}
            self.lengths[s] = 0

    def feed(self, fails: str | None = None) -> None:
        """Some sequences get tokens of one step: all of them, or with a fault none."""
        seqs = [s for s in self.model if self.drawn(3)] or [self.one()]
        counts = [(1, 1, 3, 16, 17, 90, 257, 600)[self.drawn(8)] for _ in seqs]
        tokens = [self.pair.drawn(layer, sum(counts)) for layer in range(len(SHAPE.layers))]
        if fails is not None:
            nth, length = 1 + self.drawn(6), self.cache.logical_length(seqs[0])
            try:
                with fault(fails, nth):
                    self.attend(seqs, counts, tokens)
            except RuntimeError as error:
                assert f"fault injected at {fails}" in str(error)
                self.done["fail"] += 1
                if (
                    self.cache.logical_length(seqs[0]) == length
                ):  # else the plan after the step failed, and the tokens stand
                    return
        else:
            try:
                self.attend(seqs, counts, tokens)
            except BudgetExceeded:
                self.done["refused"] += 1
                if self.cache.logical_length(seqs[0]) == self.lengths[seqs[0]]:
                    return
        self.note(seqs, counts, tokens)
        self.done["feed"] += 1

    def attend(self, seqs: list[Sequence], counts: list[int], tokens: list[list[Tensor]]) -> None:
        with self.cache.step(seqs, counts) as step:
            for layer, (q, k, v) in enumerate(tokens):
                assert step.attend(layer, q, k, v).isfinite().all()

    def note(self, seqs: list[Sequence], counts: list[int], tokens: list[list[Tensor]]) -> None:
        for layer, h in rows(SHAPE):
            lines = list(zip(raw(tokens[layer][1][:, h]), raw(tokens[layer][2][:, h]), strict=True))
            for s, n in zip(seqs, counts, strict=True):
                self.model[s][layer, h] |= {self.lengths[s] + i: lines[i] for i in range(n)}
                del lines[:n]
        for s, n in zip(seqs, counts, strict=True):
            self.lengths[s] += n

    def fork(self) -> None:
        source = self.one()
        for kid in self.cache.fork(source, 1 + self.drawn(2)):
            self.copy(kid, source)
        self.done["fork"] += 1

    def copy(self, kid: Sequence, source: Sequence) -> None:
        self.model[kid] = {row: dict(tokens) for row, tokens in self.model[source].items()}
        self.lengths[kid] = self.lengths[source]

    def select(self) -> None:
        seqs = list(self.model)
        index = [self.drawn(len(seqs)) for _ in range(1 + self.drawn(MOST - 1))]
        chosen = self.cache.select(seqs, index)
        before, lengths = self.model, self.lengths
        self.model, self.lengths = {}, {}
        for s, i in zip(chosen, index, strict=True):
            self.model[s] = {row: dict(tokens) for row, tokens in before[seqs[i]].items()}
            self.lengths[s] = lengths[seqs[i]]
        self.done["select"] += 1

    def crop(self) -> None:
        s = self.one()
        floor = self.cache.crop_floor(s)
        near = self.lengths[s] - self.drawn(min(200, self.lengths[s] - floor + 1))
        length = near if self.drawn(3) else floor + self.drawn(self.lengths[s] - floor + 1)
        self.cache.crop([s], [length])
        self.lengths[s] = length
        for row, tokens in self.model[s].items():
            self.model[s][row] = {p: t for p, t in tokens.items() if p < length}
        self.done["crop"] += 1

    def drop(self) -> None:
        """Evicts a fifth of one layer's tokens, sinks excepted."""
        s, layer = self.one(), self.drawn(len(SHAPE.layers))
        _, _, positions = self.cache.materialize(layer, s)
        keep = (torch.rand(positions.shape, generator=self.dice) < 0.8) | (positions < SINKS)
        self.cache.drop(layer, s, keep)
        for h in range(len(positions)):
            gone = positions[h][~keep[h]].tolist()
            for p in gone:
                del self.model[s][layer, h][p]
        self.done["drop"] += 1

    def free(self) -> None:
        s = self.one()
        self.cache.free([s])
        del self.model[s], self.lengths[s]
        self.done["free"] += 1

    def turn(self) -> None:
        """One verb: of 20 cards, each of which comes once before any comes again."""
        self.deck = self.deck or torch.randperm(20, generator=self.dice).tolist()
        verb = self.deck.pop()
        if not self.model or (verb == 0 and len(self.model) < MOST):
            self.begin(1)
        elif verb in (1, 2) and len(self.model) < MOST - 1:
            self.fork()
        elif verb == 3:
            self.select()
        elif verb == 4 and len(self.model) > 1:
            self.free()
        elif verb in (5, 6):
            self.crop()
        elif verb == 7:
            self.drop()
        elif verb == 8:
            self.cache.trim()
        elif verb == 9:
            self.cache.compress()
            self.done["compress"] += 1
        elif verb in (10, 11):
            points = ["plan.after_write", "plan.after_check", "append.after_take", "slab.lend"]
            points += ["far.write", "far.read"] * self.cache._slabs.has_far
            self.feed(points[self.drawn(len(points))])
        else:
            self.feed()

    # --- what must hold -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        for s, held in self.model.items():
            assert self.cache.logical_length(s) == self.lengths[s]
            for layer in range(len(SHAPE.layers)):
                k, v, positions = self.cache.materialize(layer, s)
                for h in range(len(k)):
                    n = self.cache.stored_length(layer, s, h)
                    places = positions[h, :n].tolist()
                    assert len(set(places)) == n, "no token twice"
                    found = dict(zip(places, zip(raw(k[h, :n]), raw(v[h, :n]), strict=True), strict=True))
                    assert found == held[layer, h]
                self.check_groups(s, layer)
        self.check_pages()

    def check_groups(self, s: Sequence, layer: int) -> None:
        """What was put together is what is Far, where there is such a tier: no sink, and for the time being less than a
        segment."""
        positions, tier, grouped = self.pair.looked(s, layer)
        if self.cache._slabs.has_far:
            assert torch.equal(tier == FAR, grouped != UNGROUPED)
        assert (grouped[(positions >= 0) & (positions < SINKS)] == UNGROUPED).all()
        assert ((grouped == PROVISIONAL).sum(1) < 256).all()

    def check_pages(self) -> None:
        """Pages in use are those that tables name, the ring, and Near copies, of which a row has at most its number."""
        store = self.cache._store
        named = [set[int]() for _ in range(store.n_pools)]
        for s in self.model:
            for layer, h in rows(SHAPE):
                for page in store.row(s.id, layer, h)[0]:
                    named[page >> 28].add(page)
        for p, ring in enumerate(store.ring_pages()):
            state = store.pool(p)
            copies = state["used"] - len(named[p]) - ring
            assert 0 <= copies <= (8 * 4 * len(self.model) if ring else 0)
            assert state["free"] + state["used"] == state["total"]

    def end(self) -> None:
        store = self.cache._store
        assert self.cache.report().counts["archived"] > 2000 or not self.cache._slabs.has_far
        self.cache.free(list(self.model))
        assert [store.pool(p)["used"] for p in range(store.n_pools)] == store.ring_pages(), "no page leaks"
        self.cache.trim()
        assert not self.cache._slabs._files
        assert self.cache._slabs.held == self.cache._slabs.allocator_bytes()


@pytest.mark.parametrize(("far", "seed"), [("auto", 0), ("auto", 1), ("auto", 2), (None, 1), (None, 2)])
def test_random_verbs(far: str | None, seed: int) -> None:
    """Pages, segments and chunks of different sizes, and steps of as many tokens as neither has."""
    walk = Walk(small(segment=512 if seed % 2 else 256, chunk=336 if seed < 2 else 512), seed, far=far)
    for i in range(160):
        walk.turn()
        if i % 16 == 0:
            walk.check()
    walk.check()
    verbs = ("feed", "fail", "fork", "crop", "select", "drop", "free", "compress")
    assert all(walk.done[name] > 2 for name in verbs), walk.done
    walk.end()


@pytest.mark.parametrize("seed", [11, 12])
def test_random_verbs_under_limits(seed: int) -> None:
    """What a limit refuses leaves every token where it was; both limits hold after each verb."""
    near, far = 2200 << 10, 1500 << 10
    walk = Walk(small(), seed, budget=f"{near >> 10}KiB", far=Far(far))
    for i in range(200):
        try:
            walk.turn()
        except BudgetExceeded:  # of a verb that takes tables or plans
            walk.done["refused"] += 1
        report = walk.cache.report()
        assert report.peak_bytes <= near and report.nbytes <= near and report.far_bytes <= far
        if i % 8 == 0:
            walk.check()
    walk.check()
    assert walk.done["refused"] > 2, "the limits are reached"
    walk.end()
