"""PageMass: each token's part of the share of attention that its page receives from the last queries, beside plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from archived import Fed, fed
from choosing import SLOTS, Table, as_sealed, table
from torch import Tensor

from kvstrata import Cache, LayerSpec, Sequence, Shape, reference
from kvstrata.policy.base import Policy, Seen
from kvstrata.policy.strata import strata
from kvstrata.recall import Ladder, PageMass, PageMeans, Position, SplitMeans
from kvstrata.rows import Rows
from kvstrata.sight import see

SHAPE = Shape([LayerSpec(2, 6, 64), LayerSpec(2, 2, 32)], torch.float32)
SINKS = 32
CLOSE = {"rtol": 2e-4, "atol": 1e-9}
"""Means in 8 bits agree but for rounding of f32 keys beside f64 ones."""


def policy(**changes: Any) -> Policy:
    settings = {"segment": 256, "segment_min": 256, "interval": 16, "chunk": 256} | changes
    return strata(63 + 4 * SLOTS, **settings)


def wanted(
    row: Table, q: Tensor, scale: float, weight: float = 1.0, born: Table | None = None, kind: str = "halves"
) -> Tensor:
    """f64 [N] of a row's stored tokens in table order; q [G, W, D], its last queries.

    The softmax over the pages that are neither sinks nor tail, mean over queries and heads, each page's divided by its tokens.
    """
    first = SINKS // SLOTS
    pages = slice(min(first, row.sealed), row.sealed)
    mass = torch.zeros(len(row.pages), dtype=torch.float64)
    if row.sealed > first and q.shape[1]:
        k, slots = (row.k, row.slots) if born is None else as_sealed(row, born)
        blocks = reference.recall.summarize(k[pages][None], slots[pages][None], kind)
        visible = (row.slots[pages].long() << torch.arange(SLOTS)).sum(1).to(torch.uint16)
        x = reference.recall.score_pages(q.flatten(0, 1)[None], blocks, visible[None], scale, weight, kind)
        mass[pages] = x[0].softmax(-1).mean(0)
    each = mass / row.slots.sum(1)
    return each[:, None].expand(-1, SLOTS)[row.slots]


def tables(cache: Cache, layer: int, seqs: list[Sequence]) -> list[Table]:
    """Of the rows, in order."""
    heads = cache.shape.layers[layer].kv_heads
    return [table(cache, s, layer, h) for s in seqs for h in range(heads)]


@dataclass
class Asked:
    """A cache with the queries that each of its sequences was fed: [n, Hq, D] by layer."""

    pair: Fed
    queries: dict[tuple[Sequence, int], list[Tensor]] = field(default_factory=dict)

    def feed(self, seqs: list[Sequence], lengths: list[int]) -> None:
        found = self.pair.step(seqs, lengths)
        for layer, (q, _) in enumerate(found):
            for s, part in zip(seqs, q.split(lengths), strict=True):
                self.queries.setdefault((s, layer), []).append(part)

    def last(self, seq: Sequence, layer: int, n: int, end: int | None = None) -> Tensor:
        """[H, G, W, D]: the last n of them, or as many as there are; end: of a sequence of so many tokens."""
        spec = self.pair.cache.shape.layers[layer]
        q = torch.cat(self.queries.get((seq, layer), [torch.zeros(0, spec.q_heads, spec.head_dim)]))[:end][-n:]
        return q.permute(1, 0, 2).unflatten(0, (spec.kv_heads, -1))

    def check(self, seqs: list[Sequence], n: int, scale: float | None = None) -> None:
        """The mass by the last n queries, or as many as rows remember, as they stand between steps."""
        cache = self.pair.cache
        most, kind = cache.policy.queries, cache.policy.selector.kind
        for layer, spec in enumerate(cache.shape.layers):
            by = spec.head_dim**-0.5 if scale is None else scale
            columns = cache._store.columns(layer, [s.id for s in seqs])
            got = Rows(cache._store, cache.shape, layer, [s.id for s in seqs], columns, (by, 0.0)).page_mass(n)
            assert got.dtype == torch.float32 and got.shape == (len(seqs) * spec.kv_heads, columns)
            for r, row in enumerate(tables(cache, layer, seqs)):
                q = self.last(seqs[r // spec.kv_heads], layer, min(n, most))[r % spec.kv_heads]
                check_row(got[r], row, wanted(row, q, by, kind=kind), q)


def check_row(got: Tensor, row: Table, want: Tensor, q: Tensor) -> None:
    count = int(row.slots.sum())
    assert (got[count:] == 0).all(), "beyond a row's last token"
    torch.testing.assert_close(got[:count].double(), want, **CLOSE)
    indexed = row.sealed > SINKS // SLOTS and q.shape[1] > 0
    assert float(got.double().sum()) == pytest.approx(float(indexed), rel=1e-5), "shares of one whole"
    in_order = row.positions[row.slots]
    assert (got[:count][in_order < SINKS] == 0).all(), "sinks"
    tail = row.slots[row.sealed :].sum()
    assert (got[count - int(tail) : count] == 0).all(), "the tail"


@pytest.mark.parametrize(
    ("state", "budget"), [("full", "3MiB"), ("int8", "3MiB"), ("int4", "3MiB"), ("int8", "256MiB")]
)
def test_mass_between_steps(state: str, budget: str) -> None:
    """Ragged rows, among them one that is empty, one that is all sinks and tail, and one with fewer queries than are asked for;
    Far pages and none."""
    roles = policy(state=state)
    if state == "int4":  # where means in 4 bits of single keys lie in the middle between two codes
        roles = replace(roles, selector=PageMeans(63 + 4 * SLOTS))
    asked = Asked(fed(roles, SHAPE, budget=budget))
    seqs = asked.pair.new(5)
    asked.feed(seqs, [700, 301, 40, 7, 0])
    asked.check(seqs, 16)
    for lengths in ([1, 1, 1, 1, 0], [3, 1, 16, 1, 0], [1, 90, 1, 1, 0]):
        asked.feed(seqs, lengths)
        for n in (1, 5, 40):
            asked.check(seqs, n)
    asked.check(seqs[::-1], 16)
    asked.check([seqs[1]], 16, scale=0.7)
    far = asked.pair.cache.report().far_tokens
    assert far > 0 if budget == "3MiB" else far == 0


def test_a_row_that_remembers_fewer_queries() -> None:
    """Of 24 or of 3, that is."""
    for most in (3, 24):
        asked = Asked(fed(policy(queries=most, window=32, state="full"), SHAPE, budget="256MiB"))
        seqs = asked.pair.new(2)
        asked.feed(seqs, [200, 90])
        for _ in range(2):
            asked.feed(seqs, [1, 1])
        for n in (1, most, most + 30):
            assert asked.pair.cache.policy.queries == most
            asked.check(seqs, n)


@pytest.mark.parametrize(("weight", "by"), [(0.0, SplitMeans), (0.5, PageMeans)])
def test_the_weight_of_the_selector_counts(weight: float, by: type[PageMeans] | type[SplitMeans]) -> None:
    """Mass by the same estimate as selection."""
    roles = policy()
    mine = Policy(
        "mine",
        Ladder(Position()),
        PageMass(),
        roles.allocator,
        ("int8",),
        32,
        16,
        selector=by(256, aggregate="max", spread_weight=weight),
    )
    asked = Asked(fed(mine, SHAPE, budget="256MiB"))
    seqs = asked.pair.new(2)
    asked.feed(seqs, [400, 150])
    cache, apart = asked.pair.cache, 0.0
    for layer, spec in enumerate(SHAPE.layers):
        seen = see(cache, layer, [s.id for s in seqs], [400, 150], None)
        assert seen is not None and seen.read is not None
        got = seen.read.page_mass(16)
        for r, row in enumerate(tables(cache, layer, seqs)):
            q = asked.last(seqs[r // spec.kv_heads], layer, 16)[r % spec.kv_heads]
            n = int(row.slots.sum())
            one, other = (wanted(row, q, spec.head_dim**-0.5, w, kind=by().kind) for w in (weight, 1.0))
            torch.testing.assert_close(got[r, :n].double(), one, **CLOSE)
            apart = max(apart, float((got[r, :n] - other).abs().max()))
    assert apart > 1e-4


def test_pages_with_holes() -> None:
    """By the slots that are left, and the summary that was made of all; a page without any leaves the table."""
    asked = Asked(fed(policy(state="full", queries=16), SHAPE, budget="256MiB"))
    (seq,) = asked.pair.new()
    asked.feed([seq], [500])
    cache = asked.pair.cache
    dice = torch.Generator().manual_seed(3)
    for layer, spec in enumerate(SHAPE.layers):
        born = tables(cache, layer, [seq])
        _, _, positions = cache.materialize(layer, seq)
        keep = torch.rand(positions.shape, generator=dice) < 0.6
        keep[:, 64:80] = False
        keep |= positions < SINKS
        cache.drop(layer, seq, keep)
        columns = cache._store.columns(layer, [seq.id])
        by = spec.head_dim**-0.5
        got = Rows(cache._store, SHAPE, layer, [seq.id], columns, (by, 0.0)).page_mass(16)
        for h, row in enumerate(tables(cache, layer, [seq])):
            q = asked.last(seq, layer, 16)[h]
            n = int(row.slots.sum())
            assert n < 400 and row.slots[:, 1:].logical_xor(row.slots[:, :-1]).any()
            torch.testing.assert_close(got[h, :n].double(), wanted(row, q, by, 1.0, born[h]), **CLOSE)


# --- in a prompt step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noted(PageMass):
    """PageMass that notes what it saw: layer, score, lengths of the sequences, tables of the rows."""

    notes: list[tuple[int, Tensor, list[int], list[Table]]] = field(default_factory=list)
    cache: list[Cache] = field(default_factory=list)
    ends: dict[int, Sequence] = field(default_factory=dict)
    """The sequence of each length."""

    def score(self, seen: Seen) -> Tensor:
        score, (cache,) = super().score(seen), self.cache
        ends = seen.lengths[:: cache.shape.layers[seen.layer].kv_heads].tolist()
        self.notes.append((seen.layer, score.clone(), ends, tables(cache, seen.layer, [self.ends[n] for n in ends])))
        return score


@pytest.mark.parametrize("budget", ["3MiB", "256MiB"])
def test_mass_within_a_prompt(budget: str) -> None:
    """Each chunk of a prompt, of two sequences or of the longer alone, is ranked by the prompt's last queries, whatever of it
    is stored by then; a turn's by its own, and where it has fewer than are asked for, by older ones too."""
    scorer = Noted()
    base = policy()
    mine = Policy(
        "mine",
        base.planner,
        scorer,
        base.allocator,
        ("int8",),
        32,
        16,
        interval=4096,
        chunk=256,
        selector=base.selector,
    )
    asked = Asked(fed(mine, SHAPE, budget=budget))
    seqs = asked.pair.new(2)
    scorer.cache.append(asked.pair.cache)
    ends = [0, 0]
    for lengths in ([700, 300], [1, 1], [20, 90]):
        ends = [a + b for a, b in zip(ends, lengths, strict=True)]
        scorer.ends.update(zip(ends, seqs, strict=True))
        scorer.notes.clear()
        asked.feed(seqs, lengths)
        chunk, plans = asked.pair.cache.policy.chunk, [of for layer, _, of, _ in scorer.notes if layer == 0]
        for i in range(0, max(lengths) if max(lengths) > 1 else 0, chunk):
            assert [n for n, m in zip(ends, lengths, strict=True) if m > i] in plans
        for layer, score, of, rows in scorer.notes:
            spec = SHAPE.layers[layer]
            for r, row in enumerate(rows):
                end = of[r // spec.kv_heads]
                q = asked.last(scorer.ends[end], layer, 16, end)[r % spec.kv_heads]
                check_row(score[r], row, wanted(row, q, spec.head_dim**-0.5), q)
    far = asked.pair.cache.report().far_tokens
    assert far > 0 if budget == "3MiB" else far == 0
