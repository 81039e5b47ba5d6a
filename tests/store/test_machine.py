"""Random verbs against a dense model: contents, outputs and page counts agree after every step."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from oracle import Dense, Pair

from kvstrata import Cache, LayerSpec, Policy, Shape
from kvstrata.testing import fault

SHAPE = Shape([LayerSpec(2, 4, 8), LayerSpec(1, 2, 24), LayerSpec(1, 1, 8)], torch.float32)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # The least window, so that pages seal within a few steps.
        self.pair = Pair(Cache(SHAPE, policy=Policy("full", window=16)), torch.Generator().manual_seed(0))
        self.sealed: dict[int, bytes] = {}

    def pick(self, data: st.DataObject, most: int = 3) -> list:  # type: ignore[type-arg]
        live = sorted(self.pair.model, key=lambda s: s.id)
        return data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=most, unique=True))

    @rule(n=st.integers(1, 2))
    def new(self, n: int) -> None:
        if len(self.pair.model) < 6:
            self.pair.new(n)

    @precondition(lambda self: self.pair.model)
    @rule(data=st.data(), padded=st.booleans())
    def append(self, data: st.DataObject, padded: bool) -> None:
        seqs = self.pick(data)
        sizes = st.sampled_from([0, 1, 1, 2, 7, 15, 16, 17, 33, 70])
        lengths = data.draw(st.lists(sizes, min_size=len(seqs), max_size=len(seqs)).filter(any))
        assert self.pair.feed(seqs, lengths, padded=padded) < 1e-4

    @precondition(lambda self: self.pair.model)
    @rule(data=st.data(), nth=st.integers(1, 3), n=st.sampled_from([1, 20, 70]))
    def failed_append(self, data: st.DataObject, nth: int, n: int) -> None:
        """A fault between taking pages and writing them, in each layer in turn."""
        seqs = self.pick(data)
        before = {s: d.copy() for s, d in self.pair.model.items()}
        with fault("append.after_take", nth) as armed:
            try:
                self.pair.feed(seqs, [n] * len(seqs))
                raise AssertionError("the fault was not hit")
            except RuntimeError as error:
                assert "append.after_take" in str(error)
        assert armed.visits == nth
        self.pair.model = before

    @precondition(lambda self: self.pair.model)
    @rule(data=st.data(), n=st.integers(1, 2))
    def fork(self, data: st.DataObject, n: int) -> None:
        if len(self.pair.model) >= 6:
            return
        (seq,) = self.pick(data, 1)
        for kid in self.pair.cache.fork(seq, n):
            self.pair.model[kid] = self.pair.model[seq].copy()

    @precondition(lambda self: self.pair.model)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        seqs = self.pick(data)
        index = data.draw(st.lists(st.integers(0, len(seqs) - 1), min_size=1, max_size=4))
        sources: list[Dense] = [self.pair.model.pop(s) for s in seqs]
        for seq, i in zip(self.pair.cache.select(seqs, index), index, strict=True):
            self.pair.model[seq] = sources[i].copy()

    @precondition(lambda self: self.pair.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seqs = self.pick(data)
        self.pair.cache.free(seqs)
        for s in seqs:
            del self.pair.model[s]

    @precondition(lambda self: self.pair.model)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        (seq,) = self.pick(data, 1)
        dense = self.pair.model[seq]
        length = data.draw(st.integers(self.pair.cache.crop_floor(seq), dense.length))
        self.pair.cache.crop([seq], [length])
        dense.length = length
        for row in dense.rows.values():
            row.keep([p < length for p in row.positions])

    @precondition(lambda self: self.pair.model)
    @rule(data=st.data(), layer=st.integers(0, len(SHAPE.layers) - 1), rng=st.randoms(use_true_random=False))
    def drop(self, data: st.DataObject, layer: int, rng) -> None:  # type: ignore[no-untyped-def]
        """Evicts a random half of one layer's slots, each head its own."""
        (seq,) = self.pick(data, 1)
        dense = self.pair.model[seq]
        heads = SHAPE.layers[layer].kv_heads
        keeps = [[rng.random() < 0.5 for _ in dense.rows[layer, h].positions] for h in range(heads)]
        keep = torch.ones(heads, max(map(len, keeps)), dtype=torch.bool)
        for h, flags in enumerate(keeps):
            keep[h, : len(flags)] = torch.tensor(flags, dtype=torch.bool)
        self.pair.cache.drop(layer, seq, keep)
        for h, flags in enumerate(keeps):
            dense.rows[layer, h].keep(flags)

    @rule()
    def trim(self) -> None:
        self.pair.cache.trim()
        self.sealed.clear()  # pages moved: ids name other pages now
        for p in range(self.pair.cache._store.n_pools):
            state, slabs = self.pair.cache._store.pool(p), self.pair.cache._store.slabs(p)
            assert all(state["free"] < pages for _, pages, _ in slabs), "no slab's pages fit into the others"

    @invariant()
    def contents(self) -> None:
        self.pair.check_contents()

    @invariant()
    def sealed_pages_never_change(self) -> None:
        now = self.pair.sealed_pages()
        for page in now.keys() & self.sealed.keys():
            assert now[page] == self.sealed[page]
        self.sealed = now

    @invariant()
    def pools(self) -> None:
        self.pair.check_pools()
        assert self.pair.cache.nbytes() == sum(self.pair.cache.report().bytes_by_kind.values())

    def teardown(self) -> None:
        if self.pair.model:
            self.pair.cache.free(list(self.pair.model))
        self.pair.cache.trim()
        assert self.pair.cache._slabs.held == 0, "every slab comes back"


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
