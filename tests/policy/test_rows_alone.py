"""A row of a batch is the row alone: logits, states, scores and OQ, under an equal budget for each sequence."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from kvstrata import Budget, Cache, LayerSpec, Sequence, Shape
from kvstrata.budget.room import room
from kvstrata.policy import NAMED
from kvstrata.policy.base import Policy

LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 4, 8, 2, 48, 64
SAME = 1e-5
"""Of logits, scores and OQ: where each row is fed more than 16 tokens, or none is, it is computed as it is alone."""
NEAR = {"arkv": 5e-2}
"""Of f32 where a row of few tokens goes beside one of many: it takes the prompt's path of attention, whose sums end in other
last bits (1e-5 holds all the same), and what those turn over in the codes of quantized queries and keys."""


@dataclass
class Net:
    """A tiny random transformer whose linear maps run row by row, so that only attention sees the batch."""

    dim: int
    dtype: torch.dtype
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def drawn(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) * rows**-0.5).to(self.dtype)

        self.embed, self.head = 4 * drawn(VOCAB, WIDTH), drawn(WIDTH, VOCAB)
        for _ in range(LAYERS):
            maps = {"q": 2 * drawn(WIDTH, HEADS * self.dim), "o": drawn(HEADS * self.dim, WIDTH)}
            maps |= {name: 2 * drawn(WIDTH, KV_HEADS * self.dim) for name in ("k", "v")}
            self.weights.append(maps)

    @property
    def shape(self) -> Shape:
        return Shape([LayerSpec(KV_HEADS, HEADS, self.dim)] * LAYERS, self.dtype)

    def feed(self, cache: Cache, seqs: list[Sequence], tokens: list[Tensor]) -> list[Tensor]:
        """One step of tokens i64 [n] of each sequence, padded on the left. Logits f32 [n, VOCAB] of each."""
        counts = [len(t) for t in tokens]
        valid = torch.arange(max(counts)) >= max(counts) - torch.tensor(counts).unsqueeze(1)
        hidden = [self.embed[t] for t in tokens]
        with cache.step(seqs, valid=valid) as step:
            places = [p[v] for p, v in zip(step.positions, valid, strict=True)]
            for layer, maps in enumerate(self.weights):
                q, k, v = (self._project(hidden, maps[name], places, name != "v", valid) for name in "qkv")
                out = step.attend(layer, q, k, v)
                assert not out[~valid].any(), "padding reads zeros"
                hidden = [x + out[b, valid[b]].flatten(1) @ maps["o"] for b, x in enumerate(hidden)]
        return [(_norm(x) @ self.head).float() for x in hidden]

    def _project(self, hidden: list[Tensor], by: Tensor, places: list[Tensor], turned: bool, valid: Tensor) -> Tensor:
        """[B, T, heads, D]: each row mapped and turned to its places by itself; NaN where padding stands."""
        heads = by.shape[1] // self.dim
        out = torch.full((*valid.shape, heads, self.dim), torch.nan, dtype=self.dtype)
        for b, (x, at) in enumerate(zip(hidden, places, strict=True)):
            y = (_norm(x) @ by).view(-1, heads, self.dim)
            out[b, valid[b]] = _turn(y, at) if turned else y
        return out


def _norm(x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:])


def _turn(x: Tensor, at: Tensor) -> Tensor:
    """Rotary positions: x [n, heads, D] at i64 [n]."""
    half = x.shape[-1] // 2
    angle = at.unsqueeze(1) * 1000.0 ** (-torch.arange(half) / half)
    c, s = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    a, b = x.float().split(half, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)


def policy_of(name: str) -> Policy:
    """Small in every respect; the interval is two pages, so that a plan before its time finds something to do."""
    return replace(NAMED[name]().with_queries(8), window=16, interval=32, chunk=64)


@pytest.fixture(autouse=True)
def as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies run as they are, not made smaller for limits as small as these, and sooner for a batch than for a row."""
    monkeypatch.setattr("kvstrata.limit.fit", lambda policy, *_: policy)


def caches(net: Net, policy: Policy, batch: int, spare: float) -> tuple[Cache, list[Cache]]:
    """One cache of a batch and one for each of its sequences, with equal bytes for unprotected tokens: as many Full pages of
    each row as ``spare``."""
    shape = net.shape
    page = 2 * 16 * net.dim * net.dtype.itemsize
    content = int(spare * page * shape.rows)
    limits = [_limit(policy, shape, content, n) for n in (1, batch)]
    alone = [Cache(shape, budget=Budget.bytes(limits[0]), policy=policy) for _ in range(batch)]
    return Cache(shape, budget=Budget.bytes(limits[1]), policy=policy), alone


def _limit(policy: Policy, shape: Shape, content: int, batch: int) -> int:
    """Bytes under which a batch has ``content`` for each sequence, to the byte."""
    low, high = 0, 1 << 30
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (middle + 1, high) if room(policy, shape, middle, batch).content < batch * content else (low, middle)
        )
    assert room(policy, shape, low, batch).content // batch == content
    return low


Row = tuple[list[Tensor], list[tuple[Tensor, Tensor]], list[Tensor]]


def known(cache: Cache, seq: Sequence) -> Row:
    """By layer: states u8 [H, positions], as they stand by position (0: evicted); scores with their positions; OQ f32 [H]."""
    states, scores, oq = [], [], []
    length = cache.logical_length(seq)
    for layer in range(LAYERS):
        seen = cache._plans._see(layer, [seq.id], [length])
        assert seen is not None and cache.policy.scorer is not None
        by_position = torch.zeros(KV_HEADS, length + 1, dtype=torch.uint8)
        at = torch.where(seen.stored, seen.positions, length).long()  # the last place takes what is no token
        states.append(by_position.scatter_(1, at, seen.state)[:, :-1])
        score = torch.zeros(KV_HEADS, length + 1).scatter_(1, at, cache.policy.scorer.score(seen))
        scores.append((states[-1] > 0, score[:, :-1]))
        oq.append(cache._plans.statistics.oq(layer, [seq.id], KV_HEADS))
    return states, scores, oq


def agree(batch: Row, alone: Row, within: float) -> None:
    for got, want in zip(batch[0], alone[0], strict=True):
        assert torch.equal(got, want), "states"
    for (held, got), (_, want) in zip(batch[1], alone[1], strict=True):
        torch.testing.assert_close(got[held], want[held], rtol=within, atol=within)
    for got, want in zip(batch[2], alone[2], strict=True):
        torch.testing.assert_close(got, want, rtol=within, atol=within)


def watched(cache: Cache) -> dict[int, list[int]]:
    """By sequence: its length each time that all its layers were planned, from now on."""
    plans: dict[int, list[int]] = defaultdict(list)
    planned = cache._plans.note

    def note(ids: list[int]) -> None:
        for i in ids:
            plans[i].append(cache._store.length(i))
        planned(ids)

    cache._plans.note = note  # type: ignore[method-assign]
    return plans


def walk(net: Net, batch: Cache, alone: list[Cache], turns: list[list[int]], within: float = SAME) -> list[Row]:
    """Feeds each row its own random tokens, together and alone; steps of a single token each where a turn says -n. Checks
    logits at every step, and what is known of each row after every turn. Rows with no token in a turn stand aside."""
    generator = torch.Generator().manual_seed(6)
    together = batch.new(len(alone))
    seqs = [cache.new()[0] for cache in alone]
    plans, own_plans = watched(batch), [watched(cache) for cache in alone]
    for turn in turns:
        steps = [[int(n < 0) for n in turn]] * -min(turn) if min(turn) < 0 else [turn]
        for counts in steps:
            rows = [b for b, n in enumerate(counts) if n]
            tokens = [torch.randint(0, VOCAB, (counts[b],), generator=generator) for b in rows]
            got = net.feed(batch, [together[b] for b in rows], tokens)
            for b, logits, own in zip(rows, got, tokens, strict=True):
                (want,) = net.feed(alone[b], [seqs[b]], [own])
                torch.testing.assert_close(logits, want, rtol=within, atol=within)
        for b, cache in enumerate(alone):
            if cache.logical_length(seqs[b]):
                assert plans[together[b].id] == own_plans[b][seqs[b].id], "plans"
                agree(known(batch, together[b]), known(cache, seqs[b]), within)
    return [known(cache, seq) for cache, seq in zip(alone, seqs, strict=True)]


def compressed(rows: list[Row], policy: Policy) -> None:
    """Every row, the shortest too, lost tokens or quantized some: otherwise nothing was tested."""
    for states, _, _ in rows:
        state = torch.cat([s.flatten() for s in states])
        assert (state != 1).float().mean() > 0.2
        assert bool((state > 1).any()) == bool(policy.formats)


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["arkv", "snapkv", "h2o", "keydiff"])
def test_rows_of_three_lengths_are_rows_alone(name: str, dtype: torch.dtype, dim: int) -> None:
    """Prompts, decoding across intervals that the rows pass at different steps, a ragged second turn.
    The shortest needs no more than its share at first, and lends nothing to the others."""
    net = Net(dim, dtype)
    batch, alone = caches(net, policy_of(name), 3, spare=2)
    rows = walk(net, batch, alone, [[330, 180, 45], [-35] * 3, [40, 17, 25], [-17] * 3])
    compressed(rows, batch.policy)


@pytest.mark.parametrize("name", ["arkv", "snapkv", "h2o", "keydiff", "adakv", "pyramidkv"])
def test_a_prompt_beside_decoding_rows_changes_nothing(name: str) -> None:
    """A long prompt comes while one row decodes and another rests, and a turn is cut in two rows only: each row is planned at
    its own intervals, and cut only where it would be."""
    net = Net(64, torch.float32)
    batch, alone = caches(net, policy_of(name), 3, spare=2)
    rows = walk(
        net,
        batch,
        alone,
        [[170, 0, 120], [-9, 0, -9], [1, 300, 0], [1, 1, 150], [-20] * 3, [40, 10, 25], [-17] * 3],
        NEAR.get(name, SAME),
    )
    compressed(rows, batch.policy)
