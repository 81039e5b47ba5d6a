"""A cache that archives beside the tokens that were fed to it: what it must hold, and exact attention over all of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from kvstrata import Cache, LayerSpec, Policy, Sequence, Shape
from kvstrata.limit import TURN_ABOVE
from kvstrata.policy import icecache
from kvstrata.policy.base import FAR, FULL, GROUPED, NEAR, PROVISIONAL, UNGROUPED, Seen
from kvstrata.recall import PageMeans, SplitMeans

SHAPE = Shape([LayerSpec(2, 4, 64)] * 2, torch.float32)
TOPICS = 24
"""Directions around which random keys lie, so that clustering has something to find."""


def small(pages: int = 4, **changes: Any) -> Policy:
    """icecache that reads so many pages, by their means, with segments that a few hundred tokens fill."""
    settings = {"sinks": 32, "window": 16, "segment": 256, "segment_min": 256, "interval": 16, "chunk": 512} | changes
    beside = settings["sinks"] + settings["window"] + 15
    policy = icecache(int(beside + 16 * pages), **settings)
    assert isinstance(policy.selector, SplitMeans)
    by_means = {f.name: getattr(policy.selector, f.name) for f in fields(policy.selector) if f.name != "parts"}
    return replace(policy, selector=PageMeans(**by_means))


ALL = 1 << 12
"""Pages: more than any row of these tests has, so that all is read."""
EXACT = 1e-5
"""Relative error of f32 attention over all tokens, as merged from parts."""


def sealed(length: int, window: int = 16, sinks: int = 32) -> int:
    """Tokens of a row of so many that have left the tail, sinks excepted: whole pages."""
    return max(0, (length - window) // 16 * 16 - sinks)


@dataclass
class Rule:
    """What the plans of :func:`small` leave in a row of one layer: tokens that are together for good and for the time being.

    layer: among ``layers`` that are planned; least: of a segment.
    """

    layer: int = 0
    layers: int = 2
    least: int = 256
    interval: int = 16
    chunk: int = 512
    length: int = 0
    good: int = 0
    provisional: int = 0

    def plan(self, length: int) -> None:
        """What has left the tail of so many tokens is archived; from a segment on in multiples of 256 for good."""
        waiting = sealed(length) - self.good
        if waiting >= self.least:
            self.good += waiting // 256 * 256
        self.provisional = sealed(length) - self.good

    def feed(self, n: int) -> None:
        """A step of n tokens: prompts and turns are planned at the end of each chunk, decoded tokens at the end of an
        interval, which each layer begins a little earlier than the one before it."""
        before, self.length = self.length, self.length + n
        if n > TURN_ABOVE:
            for end in range(before + self.chunk, self.length, self.chunk):
                self.plan(end)
            self.plan(self.length)
        shift = self.layer * self.interval // self.layers
        if (before + shift) // self.interval != (self.length + shift) // self.interval:
            self.plan(self.length)

    @property
    def archived(self) -> int:
        return self.good + self.provisional


def ruled(lengths: list[int], **settings: int) -> list[Rule]:
    """Of each of two layers, after steps of so many tokens."""
    rules = [Rule(layer, **settings) for layer in range(2)]
    for rule in rules:
        for n in lengths:
            rule.feed(n)
    return rules


def seen(positions: Tensor, tail: int, grouped: Tensor | None = None, state: int = FULL) -> Seen:
    """Rows whose last ``tail`` columns are open; all is Near and Full, but what was put together Far and of a state."""
    n = positions.shape[1]
    grouped = torch.zeros(positions.shape, dtype=torch.uint8) if grouped is None else grouped
    far = grouped != UNGROUPED
    return Seen(
        0,
        positions.to(torch.int32),
        torch.full((len(positions),), n),
        torch.arange(n).expand(positions.shape) >= n - tail,
        torch.where(far, state, (positions >= 0).long()).to(torch.uint8),
        sinks=32,
        tier=torch.where(far, FAR, NEAR).to(torch.uint8),
        grouped=grouped,
        entry=torch.div(positions, 16, rounding_mode="floor").to(torch.int32),
    )


@dataclass
class Fed:
    """A cache and the tokens of each of its sequences, by layer in pieces of (k, v) [n, H, D]."""

    cache: Cache
    generator: torch.Generator
    pieces: dict[Sequence, list[list[tuple[Tensor, Tensor]]]] = field(default_factory=dict)

    def new(self, n: int = 1) -> list[Sequence]:
        """n empty sequences."""
        seqs = self.cache.new(n)
        self.pieces |= {s: [[] for _ in self.cache.shape.layers] for s in seqs}
        return seqs

    def drawn(self, layer: int, n: int) -> list[Tensor]:
        """q, k, v [n, heads, D] of so many tokens: keys around topics, queries towards them."""
        spec = self.cache.shape.layers[layer]
        topics = torch.randn(TOPICS, spec.head_dim, generator=torch.Generator().manual_seed(layer))

        def some(heads: int, share: float) -> Tensor:
            label = torch.randint(0, TOPICS, (n, heads), generator=self.generator)
            noise = torch.randn(n, heads, spec.head_dim, generator=self.generator)
            return (share * topics[label] + noise).to(self.cache.shape.dtype)

        return [some(spec.q_heads, 1.5), some(spec.kv_heads, 1.0), some(spec.kv_heads, 0.0)]

    def feed(self, seqs: list[Sequence], lengths: list[int]) -> list[Tensor]:
        """One step of random tokens, packed. Returns the output of each layer, [n, Hq, D]."""
        return [out for _, out in self.step(seqs, lengths)]

    def step(self, seqs: list[Sequence], lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
        """As feed, with the queries: (q, output) by layer."""
        tokens = [self.drawn(layer, sum(lengths)) for layer in range(len(self.cache.shape.layers))]
        with self.cache.step(seqs, lengths) as step:
            found = [(q, step.attend(layer, q, k, v)) for layer, (q, k, v) in enumerate(tokens)]
        self.note(seqs, lengths, [(k, v) for _, k, v in tokens])
        return found

    def note(self, seqs: list[Sequence], lengths: list[int], tokens: list[tuple[Tensor, Tensor]]) -> None:
        """The sequences were fed so many of these tokens, by layer, side by side."""
        first = 0
        for s, n in zip(seqs, lengths, strict=True):
            for layer, (k, v) in enumerate(tokens):
                self.pieces[s][layer].append((k[first : first + n], v[first : first + n]))
            first += n

    def tokens(self, seq: Sequence, layer: int) -> tuple[Tensor, Tensor]:
        """k, v [n, H, D] of a sequence in the order of position."""
        spec, pieces = self.cache.shape.layers[layer], self.pieces[seq][layer]
        if not pieces:
            empty = torch.zeros(0, spec.kv_heads, spec.head_dim, dtype=self.cache.shape.dtype)
            return empty, empty
        k, v = (torch.cat([piece[i] for piece in pieces]) for i in range(2))
        self.pieces[seq][layer] = [(k, v)]
        return k, v

    # --- sequences ----------------------------------------------------------------------------------------------------

    def fork(self, seq: Sequence, n: int = 1) -> list[Sequence]:
        kids = self.cache.fork(seq, n)
        self.pieces |= {kid: [list(layer) for layer in self.pieces[seq]] for kid in kids}
        return kids

    def crop(self, seq: Sequence, length: int) -> None:
        self.cache.crop([seq], [length])
        for layer in range(len(self.cache.shape.layers)):
            k, v = self.tokens(seq, layer)
            self.pieces[seq][layer] = [(k[:length], v[:length])]

    def select(self, seqs: list[Sequence], index: list[int]) -> list[Sequence]:
        sources = [self.pieces.pop(s) for s in seqs]
        chosen = self.cache.select(seqs, index)
        self.pieces |= {s: [list(layer) for layer in sources[i]] for s, i in zip(chosen, index, strict=True)}
        return chosen

    def free(self, seqs: list[Sequence]) -> None:
        self.cache.free(seqs)
        for s in seqs:
            del self.pieces[s]

    # --- what must hold -----------------------------------------------------------------------------------------------

    def check_contents(self, exact: bool = True) -> None:
        """Each token that was fed lies in one slot of each row; exact: with the bytes that were fed."""
        for seq in self.pieces:
            for layer, spec in enumerate(self.cache.shape.layers):
                k, v = self.tokens(seq, layer)
                stored_k, stored_v, positions = self.cache.materialize(layer, seq)
                assert self.cache.logical_length(seq) == len(k)
                for h in range(spec.kv_heads):
                    assert self.cache.stored_length(layer, seq, h) == len(k)
                    order = positions[h].argsort()
                    assert positions[h, order].tolist() == list(range(len(k)))
                    if exact:
                        assert torch.equal(stored_k[h, order], k[:, h])
                        assert torch.equal(stored_v[h, order], v[:, h])

    def looked(self, seq: Sequence, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """positions, tier and grouped of a layer's tokens [H, N], in table order."""
        store, heads = self.cache._store, self.cache.shape.layers[layer].kv_heads
        columns = store.columns(layer, [seq.id])
        positions = torch.empty(heads, columns, dtype=torch.int32)
        tier, grouped = (torch.empty(heads, columns, dtype=torch.uint8) for _ in range(2))
        where = (positions.data_ptr(), 0, 0, 0, tier.data_ptr(), grouped.data_ptr(), 0)
        store.look(layer, [seq.id], *where, columns)
        return positions, tier, grouped

    def check_rule(self, seq: Sequence, layer: int, rule: Rule) -> None:
        """A layer's rows hold what the rule says where it says: the oldest tokens in the Far tier, as many of them together
        for good; sinks first, and the tail last and in order. Nothing was dropped, and Far pages are whole."""
        n, store = self.cache.logical_length(seq), self.cache._store
        fresh = sealed(n) - rule.archived
        assert store.waiting(layer, [seq.id]) == (fresh + rule.provisional, fresh)
        positions, tiers, groupings = self.looked(seq, layer)
        for h, (position, tier, grouped) in enumerate(zip(positions, tiers, groupings, strict=True)):
            assert position[:32].tolist() == list(range(32)) and position[-16:].tolist() == list(range(n - 16, n))
            assert position[tier == FAR].sort().values.tolist() == list(range(32, 32 + rule.archived))
            assert torch.equal(tier == FAR, grouped != UNGROUPED)
            assert [int((grouped == g).sum()) for g in (GROUPED, PROVISIONAL)] == [rule.good, rule.provisional]
            pages, alive, _, _ = store.row(seq.id, layer, h)
            assert all(a == 0xFFFF for page, a in zip(pages, alive, strict=True) if store.pool(page >> 28)["far"])

    def check_pools(self) -> None:
        """Used pages are those that tables name and the ring, and as many Near copies as the rows may have."""
        store, named = self.cache._store, [set[int]() for _ in range(self.cache._store.n_pools)]
        rows = 0
        for seq in self.pieces:
            for layer, spec in enumerate(self.cache.shape.layers):
                for h in range(spec.kv_heads):
                    pages, alive, _, _ = store.row(seq.id, layer, h)
                    assert all(alive), "an entry without a slot must leave the table"
                    for page in pages:
                        named[page >> 28].add(page)
                    rows += 1
        selector = self.cache.policy.selector
        assert selector is not None
        copies = rows * selector.native(self.cache.policy.sinks, self.cache.policy.window or 16)[1]
        for pool, ring in enumerate(store.ring_pages()):
            state = store.pool(pool)
            beside = state["used"] - len(named[pool]) - ring
            assert 0 <= beside <= (copies if ring else 0)
            assert state["free"] + state["used"] == state["total"]

    def check_empty(self) -> None:
        """With every sequence ended, nothing but the ring is in use, and no file is left after a trim."""
        self.free(list(self.pieces))
        store = self.cache._store
        assert [store.pool(p)["used"] for p in range(store.n_pools)] == store.ring_pages()
        self.cache.trim()
        assert self.cache.report().far_bytes == 0
        assert not self.cache._slabs._files


class GivenUp(Exception):
    """A step that a test ends."""


def fed(policy: Policy | None = None, shape: Shape = SHAPE, seed: int = 0, **settings: Any) -> Fed:
    """A new cache. settings: of :class:`Cache`."""
    cache = Cache(shape, policy=small() if policy is None else policy, **settings)
    return Fed(cache, torch.Generator().manual_seed(seed))


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """f64 [n, Hq, D]: causal attention of q [n, Hq, D], the last of the tokens k, v [N, H, D]."""
    group, first = q.shape[1] // k.shape[1], len(k) - len(q)
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    z = torch.einsum("tgd,ngd->gtn", q.double(), keys) * q.shape[-1] ** -0.5
    later = torch.arange(len(k)) > first + torch.arange(len(q))[:, None]
    return torch.einsum("gtn,ngd->tgd", z.masked_fill(later, -torch.inf).softmax(-1), values)


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference of a row [.., D] relative to its norm."""
    return float(((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).max()) if got.numel() else 0.0


def worst(pair: Fed, seqs: list[Sequence], lengths: list[int]) -> float:
    """Feeds a step; the largest relative error against exact attention over all that was fed."""
    found = pair.step(seqs, lengths)
    most = 0.0
    for layer, (q, out) in enumerate(found):
        first = 0
        for s, n in zip(seqs, lengths, strict=True):
            here = slice(first, first + n)
            most = max(most, error(out[here], exact(q[here], *pair.tokens(s, layer)))) if n else most
            first += n
    return most
