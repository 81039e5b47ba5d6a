"""The Near page cache is a least-recently-used cache per row: hits and misses of random steps beside those of a model.

Keys of a page point along an axis of their own, so a query names the pages that it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from archived import SHAPE, error, small
from torch import Tensor

from kvstrata import Cache, LayerSpec, Sequence, Shape
from kvstrata.recall import Archive, Position

SINKS, PAGES, K, DIM = 32, 48, 4, 64
ROWS = 2
"""KV heads."""


@dataclass
class Model:
    """Slots of one row: [page, stamp], page -1: free."""

    capacity: int
    slots: list[list[int]]
    hits: int = 0
    misses: int = 0

    def admit(self, pages: list[int], step: int) -> None:
        """Pages in the order of the table: what is there stays, the others take free slots by index, new ones, the oldest."""
        for slot in self.slots:
            if slot[0] in pages:
                slot[1] = step
                self.hits += 1
        present = {slot[0] for slot in self.slots}
        for page in pages:
            if page not in present:
                self.misses += 1
                self.place(step)[:] = [page, step]

    def place(self, step: int) -> list[int]:
        if free := [slot for slot in self.slots if slot[0] < 0]:
            return free[0]
        if len(self.slots) < self.capacity:
            self.slots.append([-1, step])
            return self.slots[-1]
        return min((slot for slot in self.slots if slot[1] != step), key=lambda slot: slot[1])  # the first of equals

    def leave(self, gone: set[int]) -> None:
        for slot in self.slots:
            if slot[0] in gone:
                slot[0] = -1


def prompt() -> tuple[Tensor, Tensor]:
    """k, v [n, H, D]: sinks and tail without a direction, between them 16 tokens along each of the first axes."""
    generator = torch.Generator().manual_seed(1)
    k = torch.zeros(SINKS + 16 * PAGES + 16, ROWS, DIM)
    for page in range(PAGES):
        k[SINKS + 16 * page : SINKS + 16 * (page + 1), :, page] = 8.0
    return k, torch.randn(k.shape, generator=generator)


@dataclass
class Named:
    """A cache whose queries name pages."""

    cache: Cache
    generator: torch.Generator
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, near: int) -> Named:
        planner = Archive(Position(), segment=256, segment_min=256)
        shape = Shape([LayerSpec(ROWS, ROWS, DIM)], torch.float32)
        cache = Cache(shape, policy=replace(small(K, near_pages=near), planner=planner))
        return cls(cache, torch.Generator().manual_seed(near), *prompt())

    def begun(self) -> Sequence:
        (seq,) = self.cache.new()
        with self.cache.step([seq], [len(self.k)]) as step:
            step.attend(0, torch.zeros(len(self.k), ROWS, DIM), self.k, self.v)
        assert self.cache.report().far_tokens == ROWS * 16 * PAGES
        return seq

    def drawn(self, among: list[int], near: list[list[int]]) -> list[list[int]]:
        """K pages for each row, rising: some of the last ones, some of all."""
        found = []
        for last in near:
            coins = torch.rand(len(last), generator=self.generator).tolist()
            kept = [p for p, coin in zip(last, coins, strict=True) if coin < 0.5]
            order = torch.randperm(len(among), generator=self.generator).tolist()
            more = [among[i] for i in order if among[i] not in kept]
            found.append(sorted((kept + more)[:K]))
        return found

    def read(self, seqs: list[Sequence], pages: list[list[int]]) -> Tensor:
        """A step of one token for each, given up afterwards: rows [len(seqs) * H] read the named pages. Returns [B, H, D]."""
        q = torch.zeros(len(seqs) * ROWS, DIM)
        for r, named in enumerate(pages):
            q[r, named] = 10.0
        nothing = torch.zeros(len(seqs), ROWS, DIM)
        step = self.cache.step(seqs, [1] * len(seqs)).open()
        try:
            return step.attend(0, q.view(-1, ROWS, DIM), nothing, nothing)
        finally:
            step.rollback()

    def check(self, out: Tensor, pages: list[list[int]]) -> None:
        """Each row has read its pages and, with next to no weight, sinks, tail and its own token."""
        for r, named in enumerate(pages):
            tokens = torch.cat([SINKS + 16 * p + torch.arange(16) for p in named])
            want = self.v[tokens, r % ROWS].double().mean(0)
            assert error(out[r // ROWS, r % ROWS], want) < 2e-3


@pytest.mark.parametrize("near", [K, K + 1, 2 * K, 3 * K, PAGES])
def test_random_steps(near: int) -> None:
    named = Named.of(near)
    seq, models = named.begun(), [Model(near, []) for _ in range(ROWS)]
    pages = [list[int]() for _ in range(ROWS)]
    for step in range(4000):
        pages = named.drawn(list(range(PAGES)), pages)
        out = named.read([seq], pages)
        for model, some in zip(models, pages, strict=True):
            model.admit(some, step)
        assert named.cache._store.fetched() == (sum(m.hits for m in models), sum(m.misses for m in models)), step
        if step % 10 == 0:
            named.check(out, pages)
    recall = named.cache.report().recall
    assert recall is not None
    assert (recall.hits, recall.misses) == named.cache._store.fetched()
    assert recall.hits > 0 and (near == PAGES or recall.misses > 4000)
    store, ring = named.cache._store, named.cache._store.ring_pages()[0]
    assert store.pool(0)["used"] - ring - ROWS * 3 == ROWS * near, "as many copies as slots, beside sinks and tail"


def test_a_cache_that_shrinks() -> None:
    """To what a step reads: the pages that were used last stay, and the slots go on as before."""
    named = Named.of(3 * K)
    seq, store = named.begun(), named.cache._store
    pages = [list[int]() for _ in range(ROWS)]
    for _ in range(40):
        pages = named.drawn(list(range(PAGES)), pages)
        named.read([seq], pages)
    held = store.pool(0)["used"]
    assert store.shrink_near()
    assert held - store.pool(0)["used"] == ROWS * 2 * K
    before = store.fetched()
    named.check(named.read([seq], pages), pages)
    assert store.fetched() == (before[0] + ROWS * K, before[1]), "the last step's pages were kept"
    for _ in range(40):
        pages = named.drawn(list(range(PAGES)), pages)
        named.check(named.read([seq], pages), pages)
    assert held - store.pool(0)["used"] == ROWS * 2 * K, "and it stays small"
    before = store.fetched()
    assert store.shrink_near() and not store.shrink_near(), "then there are none"
    assert held - store.pool(0)["used"] == ROWS * 3 * K
    for _ in range(40):
        pages = named.drawn(list(range(PAGES)), pages)
        named.check(named.read([seq], pages), pages)
    assert store.fetched() == (before[0], before[1] + 40 * ROWS * K)
    assert held - store.pool(0)["used"] == ROWS * 3 * K


@pytest.mark.parametrize("near", [K, 2 * K, 3 * K])
def test_forks_and_crops(near: int) -> None:
    """A fork begins with no copy; pages that a crop removes leave their slots, narrowed ones keep them."""
    named = Named.of(near)
    models: dict[Sequence, list[Model]] = {named.begun(): [Model(near, []) for _ in range(ROWS)]}
    lengths = dict.fromkeys(models, PAGES)
    last: dict[Sequence, list[list[int]]] = {s: [[], []] for s in models}
    gone = 0
    for step in range(1500):
        seqs = list(models)
        if step % 100 == 50 and len(seqs) < 4:
            (kid,) = named.cache.fork(seqs[step % len(seqs)])
            models[kid] = [Model(near, []) for _ in range(ROWS)]
            lengths[kid], last[kid] = lengths[seqs[step % len(seqs)]], [[], []]
        elif step % 100 == 80 and lengths[seq := seqs[step % len(seqs)]] > 3 * K:
            lengths[seq] -= 3
            named.cache.crop([seq], [SINKS + 16 * lengths[seq]])
            for model in models[seq]:
                model.leave({lengths[seq] + i for i in range(3)})
            gone += 1
        pages = [rows for s in models for rows in named.drawn(list(range(lengths[s])), keep(last[s], lengths[s]))]
        out = named.read(list(models), pages)
        for i, s in enumerate(models):
            last[s] = pages[ROWS * i : ROWS * (i + 1)]
            for model, some in zip(models[s], last[s], strict=True):
                model.admit(some, step)
        if step % 4 == 0:
            named.check(out, pages)
        flat = [m for some in models.values() for m in some]
        assert named.cache._store.fetched() == (sum(m.hits for m in flat), sum(m.misses for m in flat)), step
    assert len(models) == 4 and gone > 8
    named.cache.free(list(models))
    assert named.cache._store.pool(0)["used"] == named.cache._store.ring_pages()[0], "copies end with their rows"


def keep(last: list[list[int]], length: int) -> list[list[int]]:
    """Of the last pages those that are still there."""
    return [[p for p in some if p < length] for some in last]


def test_new_tables_keep_the_copies() -> None:
    """Clustering moves entries: a page that is Near is found there afterwards, though its entry has another number."""
    named = Named.of(2 * K)
    seq = named.begun()
    pages = [[3, 17, 30, 44]] * ROWS
    named.read([seq], pages)
    assert named.cache._store.fetched() == (0, ROWS * K)
    n, plans = 0, named.cache.report().counts["archived"]
    while named.cache.report().counts["archived"] == plans:
        nothing = torch.zeros(1, ROWS, DIM)
        with named.cache.step([seq], [1]) as step:
            q = torch.zeros(1, ROWS, DIM)
            q[0, :, pages[0]] = 10.0
            step.attend(0, q, nothing, nothing)
        n += 1
        assert n < 400
    named.check(named.read([seq], pages), pages)
    assert named.cache._store.fetched() == ((n + 1) * ROWS * K, ROWS * K)


def test_layers_and_rows_have_copies_of_their_own() -> None:
    """Nothing is found Near that only another row, layer or sequence has read."""
    planner = Archive(Position(), segment=256, segment_min=256)
    cache = Cache(SHAPE, policy=replace(small(K), planner=planner))
    seqs = cache.new(2)
    with cache.step(seqs, [600, 600]) as step:
        for layer in range(2):
            step.attend(layer, *(torch.ones(1200, h, 64) for h in (4, 2, 2)))
    for expected in ((0, 2 * 2 * 2 * K), (2 * 2 * 2 * K, 2 * 2 * 2 * K)):
        with cache.step(seqs, [1, 1]) as step:
            for layer in range(2):
                step.attend(layer, *(torch.ones(2, h, 64) for h in (4, 2, 2)))
        assert cache._store.fetched() == expected
