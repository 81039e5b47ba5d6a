"""What any selector should read of the rows of a step of one token, and what comes of it: from the tokens, in plain torch.

``choosing`` has the same of page means alone. A selection is clear where votes that are a little off choose the same pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

import torch
from archived import SHAPE, Fed, error, small
from choosing import SLOTS, Table, as_sealed, seen, table
from torch import Tensor

from kvstrata import Cache, Policy, Sequence, Shape, reference
from kvstrata.policy.base import Reading
from kvstrata.recall import Archive, KMeans
from kvstrata.recall.archive import Packer

CLEAR = {"mean": 3e-4, "mean_value": 3e-4, "bounds": 2e-5, "halves": 6e-3, "quarters": 6e-3}
"""Relative error of a vote: means may be rounded either way to 8 bits, or to 4, bounds of f32 keys are as they are."""
TRIALS = 4

BUDGET = 32 + 16 + 15 + 4 * 16
"""Tokens: four pages beside sinks and tail."""
INT8 = 2e-2
"""Relative error of attention over int8 pages, queries and weights being rounded too."""
ROUNDED = 1e-4
"""Relative error of an output: a value mean may be rounded either way to 8 bits."""

Rows = dict[tuple[Sequence, int, int], Table]
"""By sequence, layer and head."""


def policy(selector: Any, packer: Packer | None = None, state: str = "full", **changes: Any) -> Policy:
    """As :func:`small`, with another selector."""
    planner = Archive(KMeans() if packer is None else packer, state, 256, 256)
    return replace(small(state=state, **changes), planner=planner, selector=selector)


def tables(pair: Fed, seqs: list[Sequence]) -> Rows:
    """Of every row, as it stands now."""
    layers = pair.cache.shape.layers
    return {
        (s, i, h): table(pair.cache, s, i, h) for s in seqs for i, x in enumerate(layers) for h in range(x.kv_heads)
    }


@dataclass
class Mild(Fed):
    """With queries of half the size, so that attention is spread over many pages."""

    def drawn(self, layer: int, n: int) -> list[Tensor]:
        q, k, v = super().drawn(layer, n)
        return [0.5 * q, k, v]


def mild(policy: Policy, shape: Shape = SHAPE, **settings: Any) -> Mild:
    """A new cache. settings: of :class:`Cache`."""
    return Mild(Cache(shape, policy=policy, **settings), torch.Generator().manual_seed(0))


@dataclass
class Ranked:
    """A row and its query before it reads: entries that are always read and that may be, their x f64 [G, M] and the
    log-sum-exp of what is always read [G]; blocks and visible as ``kvstrata.ops.estimate`` has them."""

    row: Table
    q: Tensor
    own: tuple[Tensor, Tensor]
    steady: Tensor
    indexed: Tensor
    x: Tensor
    base: Tensor
    blocks: Tensor
    visible: Tensor

    @cached_property
    def steady_share(self) -> float:
        """Of what is always read, summed over the query heads."""
        return float((self.base - torch.logaddexp(torch.logsumexp(self.x, -1), self.base)).exp().sum())

    def vote(self, aggregate: int) -> Tensor:
        """[M]"""
        return reference.page_votes(self.x[None], self.base[None], ("sum", "max")[aggregate])[0]

    def part(self, entries: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        """Exact attention over some entries, and the step's own token: out [G, D] and lse [G]."""
        k, v = seen(self.row, entries, self.own)
        if not own:
            k, v = k[:-1], v[:-1]
        z = self.q.double() @ k.T * self.q.shape[-1] ** -0.5
        return z.softmax(-1) @ v, torch.logsumexp(z, -1)

    def read(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Over what is always read and the chosen ones of the indexed entries."""
        entries = self.indexed[torch.tensor(chosen, dtype=torch.int64)]
        return self.part(torch.cat([self.steady, entries]), True)

    def share(self, chosen: list[int]) -> Tensor:
        """The share of attention [G] that those truly hold."""
        return (self.read(chosen)[1] - self.read(list(range(len(self.indexed))))[1]).exp()

    def rest(self, chosen: list[int]) -> Tensor:
        """The estimated log of the mass of all others [G]."""
        left = self.x.clone()
        left[:, chosen] = -torch.inf
        return torch.logsumexp(left, -1)

    def zone(self, chosen: list[int], most: int, vote: Tensor) -> Tensor:
        """Indexed entries i32 [most], -1 beyond the last: the best that were not chosen and are as they were summarized."""
        slots = reference.summary_values(self.blocks, self.q.shape[-1])[2][0, : len(self.indexed)]
        return reference.zone(vote, slots == self.visible.long(), torch.tensor(chosen), most)

    def with_rest(self, chosen: list[int], zone: Tensor, weight: float) -> Tensor:
        """What was read, and for the rest those of the zone by their means: out [G, D]."""
        out, lse = self.read(chosen)
        more = reference.estimate(
            self.q[None].double(), self.blocks, self.visible[None], zone[None], spread_weight=weight
        )
        return reference.merge([out, more[0][0]], [lse, more[1][0]])[0]


def ranked(
    row: Table, q: Tensor, own: tuple[Tensor, Tensor], sinks: int, reading: Reading, born: Table | None = None
) -> Ranked:
    """q [G, D]; own k, v [D]; born: as in ``choosing.read``."""
    first = sinks // SLOTS
    indexed = torch.arange(row.sealed)[first:]
    steady = torch.cat([torch.arange(min(first, row.sealed)), torch.arange(row.sealed, len(row.pages))])
    k, slots = (row.k, row.slots) if born is None else as_sealed(row, born)
    values = row.v[indexed][None]
    blocks = reference.recall.summarize(k[indexed][None], slots[indexed][None], reading.kind, values)
    visible = (row.slots[indexed].long() << torch.arange(SLOTS)).sum(1).to(torch.uint16)
    x = reference.score_pages(q[None], blocks, visible[None], spread_weight=reading.weight, kind=reading.kind)[0]
    made = Ranked(row, q, own, steady, indexed, x, torch.empty(0), blocks, visible)
    made.base = made.part(steady, True)[1]
    return made


def alone(made: Ranked, vote: Tensor, reading: Reading) -> list[int]:
    """What a row would read if no other were beside it: by falling vote, no more than reach the mass."""
    best = vote.sort(descending=True, stable=True)
    order = best.indices[: reading.widest].tolist()
    if reading.mass == 0:
        return order
    held = made.steady_share + torch.cat([torch.zeros(1), best.values.cumsum(0)])
    for n in range(reading.least, len(order)):
        if held[n] >= reading.mass * len(made.x):
            return order[:n]
    return order


def together(rows: list[Ranked], votes: list[Tensor], reading: Reading) -> list[list[int]]:
    """What the rows of one sequence and layer read, rising."""
    wanted = [alone(made, vote, reading) for made, vote in zip(rows, votes, strict=True)]
    if reading.most == 0:
        return [sorted(some) for some in wanted]
    sure = [(r, e) for r, some in enumerate(wanted) for e in some[: reading.least]]
    more = [(r, e) for r, some in enumerate(wanted) for e in some[reading.least :]]
    more.sort(key=lambda at: -float(votes[at[0]][at[1]]))
    kept = (sure + more)[: reading.pages * len(rows)]
    return [sorted(e for r, e in kept if r == row) for row in range(len(rows))]


@dataclass
class Account:
    """A row's step: what it read, whether that is clear, and what came out [G, D]."""

    made: Ranked
    chosen: list[int]
    clear: bool
    vote: Tensor
    got: Tensor


def accounts(
    pair: Fed, seqs: list[Sequence], reading: Reading, born: Rows | None = None, clear: float | None = None
) -> list[Account]:
    """Feeds one token to each sequence; the account of every row, those of one sequence and layer side by side."""
    before, found = tables(pair, seqs), pair.step(seqs, [1] * len(seqs))
    some: list[Account] = []
    generator, off_by = torch.Generator().manual_seed(len(seqs)), CLEAR[reading.kind] if clear is None else clear
    for b, s in enumerate(seqs):
        for layer, spec in enumerate(pair.cache.shape.layers):
            group, (k, v) = spec.q_heads // spec.kv_heads, (x[-1] for x in pair.tokens(s, layer))
            q, out = (x[b].view(spec.kv_heads, group, -1) for x in found[layer])
            rows = [
                ranked(
                    before[s, layer, h],
                    q[h],
                    (k[h], v[h]),
                    pair.cache.policy.sinks,
                    reading,
                    None if born is None else born[s, layer, h],
                )
                for h in range(spec.kv_heads)
            ]
            votes = [made.vote(reading.aggregate) for made in rows]
            chosen = together(rows, votes, reading)
            sure = [True] * len(rows)
            for _ in range(TRIALS):
                off = [x * (1 + off_by * (2 * torch.rand(len(x), generator=generator) - 1)) for x in votes]
                other = together(rows, off, reading)
                sure = [a and x == y for a, x, y in zip(sure, chosen, other, strict=True)]
            some += [Account(*each) for each in zip(rows, chosen, sure, votes, out, strict=True)]
    return some


def judged(
    pair: Fed, seqs: list[Sequence], tolerance: float = 1e-5, born: Rows | None = None, clear: float | None = None
) -> list[Account]:
    """Feeds one token to each; every row whose selection is clear is exact attention over what the cache's selector should
    read. Those that were clear."""
    policy = pair.cache.policy
    assert policy.selector is not None and policy.window is not None
    every = accounts(pair, seqs, policy.selector.native(policy.sinks, policy.window), born, clear)
    sure = [a for a in every if a.clear]
    for a in sure:
        assert error(a.got, a.made.read(a.chosen)[0]) < tolerance, a.chosen
    assert 2 * len(sure) >= len(every), "most selections are clear"
    return sure


def narrowed(pair: Fed) -> tuple[list[Sequence], Rows]:
    """A sequence, two forks and another one, of which some were cropped and some have lost tokens; their rows before that."""
    seqs = pair.new(2)
    pair.feed(seqs, [700, 760])
    seqs += pair.fork(seqs[0], 2)
    for _ in range(40):
        pair.feed([seqs[2]], [1])
    pair.feed([seqs[3]], [300])
    born = tables(pair, seqs)
    for layer in range(2):
        positions = pair.cache.materialize(layer, seqs[1])[2]
        keep = (torch.rand(positions.shape, generator=pair.generator) < 0.8) | (positions < 32)
        keep[0] |= positions[0] > 400
        keep[0] &= (positions[0] < 600) | (positions[0] > 650)  # whole pages go, of one row
        pair.cache.drop(layer, seqs[1], keep)
    pair.crop(seqs[2], 450)
    pair.crop(seqs[0], 333)
    assert sum(not row.slots[: row.sealed].all() for row in tables(pair, seqs).values()) > 8, "pages have holes"
    return seqs, born


def reading_of(pair: Fed) -> Reading:
    selector = pair.cache.policy.selector
    assert selector is not None
    return selector.native(32, 16)


def merged(a: Account, reading: Reading) -> tuple[Tensor, list[int]]:
    """What should come out of a row, and which entries it should estimate."""
    most = ceil(reading.estimate * max(0, len(a.made.indexed) - reading.pages))
    zone = a.made.zone(a.chosen, most, a.vote)
    return a.made.with_rest(a.chosen, zone, reading.weight), zone[zone >= 0].tolist()


def estimated(
    pair: Fed, seqs: list[Sequence], tolerance: float = ROUNDED, born: Rows | None = None
) -> list[tuple[Account, list[int]]]:
    """Feeds one token to each; rows whose selection is clear are what was read merged with the estimate of their zones."""
    found = []
    for a in accounts(pair, seqs, reading_of(pair), born):
        want, zone = merged(a, reading_of(pair))
        if a.clear:
            found.append((a, zone))
            assert error(a.got, want) < tolerance
            if zone:
                assert error(a.got, a.made.read(a.chosen)[0]) > 10 * tolerance, "the zone counts"
    assert 2 * len(found) >= len(seqs)
    return found
