"""Steps with spans, sets of pages, and views: against dense attention over the tokens that should be read."""

from __future__ import annotations

import pytest
import torch
from feeding import check_pages, drawn

from kvstrata import Cache, LayerSpec, Sequence, Shape, testing
from kvstrata.policy import Backbone, Policy, epicache
from kvstrata.policy.base import LESSER_HALF, PENDING

LAYERS = [LayerSpec(2, 4, 32), LayerSpec(2, 4, 32)]
B, RECENT = 192, 64


def made(policy: Policy | None = None, dtype: torch.dtype = torch.float32, layers: list[LayerSpec] = LAYERS) -> Cache:
    return Cache(Shape(layers, dtype), policy=policy or epicache(B, recent=RECENT))


class Fed:
    """A cache and one sequence of it, with all keys and values that it was given, by layer."""

    def __init__(self, cache: Cache, seed: int = 0, check: bool = True) -> None:
        self.cache = cache
        self.check = check  # pages are Full: outputs are those of dense attention
        (self.seq,) = cache.new()
        self.generator = torch.Generator().manual_seed(seed)
        self.k: list[list[torch.Tensor]] = [[] for _ in cache.shape.layers]
        self.v: list[list[torch.Tensor]] = [[] for _ in cache.shape.layers]

    def read(self, tokens: int, spans: list[int], compact: bool = True) -> list[torch.Tensor]:
        outs = []
        with self.cache.read(self.seq, tokens, spans, compact=compact) as step:
            for layer, (q, k, v) in enumerate(drawn(self.cache, tokens + sum(spans), self.generator)):
                expected = self.dense(layer, q, k, v, tokens, spans)
                out = step.attend(layer, q, k, v)
                outs.append(out)
                self.k[layer].append(k[:tokens])
                self.v[layer].append(v[:tokens])
                if self.check:
                    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        return outs

    def step(self, tokens: int) -> list[torch.Tensor]:
        outs = []
        with self.cache.step([self.seq], [tokens]) as step:
            for layer, (q, k, v) in enumerate(drawn(self.cache, tokens, self.generator)):
                expected = self.dense(layer, q, k, v, tokens, [], whole=False)
                out = step.attend(layer, q, k, v)
                outs.append(out)
                self.k[layer].append(k)
                self.v[layer].append(v)
                if self.check:
                    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        return outs

    def forget(self, length: int) -> None:
        self.k = [[torch.cat(k)[:length]] for k in self.k]
        self.v = [[torch.cat(v)[:length]] for v in self.v]

    def shown(self, layer: int, head: int, whole: bool = False) -> torch.Tensor:
        """bool [tokens so far]: those that the view reads; whole: all that are stored, as steps with spans do."""
        store, n = self.cache._store, sum(len(k) for k in self.k[layer])
        all_, sets, halves = store.view(self.seq.id)
        positions, tags = table(self.cache, self.seq, layer, head)
        read = torch.zeros(n, dtype=torch.bool)
        for position, tag in zip(positions, tags, strict=True):
            common = tag in (0, PENDING)
            read[position] = whole or all_ or common or (tag & 0x7FFF in sets and not (halves and tag & LESSER_HALF))
        return read

    def dense(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tokens: int,
        spans: list[int],
        whole: bool = True,
    ) -> torch.Tensor:
        spec, out = self.cache.shape.layers[layer], torch.empty_like(q)
        group, before = spec.q_heads // spec.kv_heads, sum(len(x) for x in self.k[layer])
        for head in range(spec.kv_heads):
            past = self.shown(layer, head, whole)
            keys, values = torch.cat([*self.k[layer], k])[:, head], torch.cat([*self.v[layer], v])[:, head]
            n = len(keys)
            sees = torch.zeros(len(q), n, dtype=torch.bool)
            sees[:, :before] = past
            sees[:tokens, before : before + tokens] = torch.ones(tokens, tokens, dtype=torch.bool).tril()
            sees[tokens:, before : before + tokens] = True
            first = tokens
            for w in spans:
                sees[first : first + w, before + first : before + first + w] = torch.ones(w, w, dtype=torch.bool).tril()
                first += w
            for g in range(head * group, (head + 1) * group):
                z = (q[:, g] @ keys.T * spec.head_dim**-0.5).masked_fill(~sees, -torch.inf)
                out[:, g] = z.softmax(1) @ values
        return out


def table(cache: Cache, seq: Sequence, layer: int, head: int) -> tuple[list[int], list[int]]:
    """Positions of a row's tokens in table order, and the sets of their pages."""
    store = cache._store
    positions = torch.empty(store.stored(seq.id, layer, head), dtype=torch.int32)
    store.positions(seq.id, layer, head, positions.data_ptr())
    _, alive, _, _ = store.row(seq.id, layer, head)
    tags, _, _ = store.row_sets(seq.id, layer, head)
    return positions.tolist(), [t for t, mask in zip(tags, alive, strict=True) for _ in range(mask.bit_count())]


def tables(cache: Cache, seq: Sequence) -> list[object]:
    heads = [(i, h) for i, spec in enumerate(cache.shape.layers) for h in range(spec.kv_heads)]
    return [(table(cache, seq, i, h), cache._store.row(seq.id, i, h)[1]) for i, h in heads]


def test_spans_leave_nothing_behind() -> None:
    """Tables, lengths and positions as without spans; spans begin behind the tokens."""
    with_spans, without = Fed(made()), Fed(made())
    for tokens in (100, 7, 1, 64, 65):
        with_spans.read(tokens, [3, 20, 1], compact=False)
        without.step(tokens)
        assert tables(with_spans.cache, with_spans.seq) == tables(without.cache, without.seq)
    assert with_spans.cache.logical_length(with_spans.seq) == 237
    step = with_spans.cache.read(with_spans.seq, 5, [2, 3], compact=False)
    assert step.positions.tolist() == [237, 238, 239, 240, 241, 242, 243, 242, 243, 244]


@pytest.mark.parametrize("tokens", [[130, 40, 1, 90], [64, 64, 64], [300]])
def test_attention_of_tokens_and_spans_is_dense(tokens: list[int]) -> None:
    fed = Fed(made())
    for n in tokens:
        fed.read(n, [17, 5], compact=False)
    assert fed.cache.logical_length(fed.seq) == sum(tokens)


def test_compaction_keeps_its_sizes_and_views_read_their_sets() -> None:
    """Chunk after chunk with compaction, then questions under every view."""
    fed = Fed(made(epicache(B, recent=RECENT, heads="uniform")))
    for n in (200, 128, 128, 100):
        fed.read(n, [24, 8, 16])
        check_pages(fed.cache)
    backbone, private = Backbone(B, RECENT).sizes(B, 3)
    for layer in range(2):
        for head in range(2):
            positions, tags = table(fed.cache, fed.seq, layer, head)
            assert len(set(positions)) == len(positions)
            sizes = [sum(t & 0x7FFF == e for t in tags if t != PENDING) for e in range(4)]
            assert sizes == [backbone, private, private, private]
            open_ = [p for p, t in zip(positions, tags, strict=True) if t == PENDING]
            assert open_ == list(range(556 - len(open_), 556)) and RECENT <= len(open_) < RECENT + 16
            assert set(range(16)) <= {p for p, t in zip(positions, tags, strict=True) if t == 0}
    for sets, halves in (([1], False), ([2], False), ([1, 3], True), ([2, 3], True), ([3], False), ([], False)):
        fed.cache.view(fed.seq, sets, halves=halves)
        before = fed.shown(0, 0).sum()
        assert int(before) == backbone + private * (len(sets) == 1) + private // 2 * 2 * halves + len(open_)
        fed.step(3)
        open_ = list(range(len(open_) + 3))
        fed.step(1)
        open_.append(0)
        check_pages(fed.cache)
    fed.cache.view(fed.seq, None)
    fed.step(70)
    fed.read(0, [9, 9, 9])
    fed.cache.view(fed.seq, [2])
    fed.step(1)


def test_a_view_of_all_after_others_has_the_same_tokens() -> None:
    fed = Fed(made())
    fed.read(300, [10, 10])
    before = [set(zip(*table(fed.cache, fed.seq, 0, h), strict=True)) for h in range(2)]
    for sets in ([1], [2], [1, 2]):
        fed.cache.view(fed.seq, sets, halves=len(sets) > 1)
    fed.cache.view(fed.seq, None)
    assert [set(zip(*table(fed.cache, fed.seq, 0, h), strict=True)) for h in range(2)] == before


def test_an_empty_chunk_compacts() -> None:
    fed = Fed(made())
    fed.read(300, [4], compact=False)
    stored = fed.cache.stored_length(0, fed.seq, 0)
    fed.read(0, [12, 12])
    assert fed.cache.stored_length(0, fed.seq, 0) < stored == 300
    assert fed.cache.logical_length(fed.seq) == 300
    with pytest.raises(ValueError, match="layers \\[0, 1\\] did not attend"), fed.cache.read(fed.seq, 0, [3]):
        pass


def test_the_same_plan_again_rewrites_no_page() -> None:
    """A page that goes to a set whole, or stays in its set, stays where it is."""
    fed = Fed(made(epicache(B, recent=RECENT, heads="uniform")))
    fed.read(320, [8])
    pages = set(fed.cache._store.row(fed.seq.id, 0, 0)[0])
    fed.read(0, [8])
    again = set(fed.cache._store.row(fed.seq.id, 0, 0)[0])
    assert pages == again


def test_forks_and_crops_keep_sets() -> None:
    fed = Fed(made())
    fed.read(400, [16, 16])
    fed.cache.view(fed.seq, [2])
    (kid,) = fed.cache.fork(fed.seq)
    assert tables(fed.cache, kid) == tables(fed.cache, fed.seq)
    assert fed.cache._store.view(kid.id) == (False, [2], False)
    fed.cache.view(kid, [1])
    check_pages(fed.cache)
    fed.step(20)
    fed.cache.crop([fed.seq], [400])
    fed.forget(400)
    fed.step(2)
    fed.cache.free([fed.seq])
    check_pages(fed.cache)
    fed.cache.free([kid])
    check_pages(fed.cache)


def test_a_failed_step_leaves_the_tokens_before_it() -> None:
    """A fault between two layers: the step's tokens go, what was compacted stays; the next step is exact for what is left."""
    fed = Fed(made())
    fed.read(300, [8, 8])
    for point, nth in (("append", 1), ("append", 2), ("plan", 1), ("plan", 2), ("plan", 3)):
        with (
            testing.fault(f"{point}.after_{'take' if point == 'append' else 'write'}", nth),
            pytest.raises(RuntimeError),
        ):
            fed.read(100, [8, 8])
        fed.forget(300)
        assert fed.cache.logical_length(fed.seq) == 300
        check_pages(fed.cache)
        fed.step(1)
        fed.cache.crop([fed.seq], [300])
        fed.forget(300)


def test_limits_are_hard() -> None:
    """Under a byte limit that does not hold a chunk and its sets, the step is refused with its tokens."""
    cache = Cache(Shape(LAYERS, torch.float32), budget="400000B", policy=epicache(B, recent=RECENT))
    fed = Fed(cache)
    with pytest.raises(ValueError, match="limit is 400000 bytes"):
        for _ in range(10):
            fed.read(200, [8] * 8)
    assert cache.report().peak_bytes <= 400_000


@pytest.mark.parametrize(
    ("tokens", "spans", "options", "text"),
    [
        (-1, [3], {}, "tokens is -1"),
        (3, [0], {}, "spans \\[0\\], expected"),
        (0, [], {"compact": False}, "and some of them"),
        (4, [], {}, "compact without spans"),
    ],
)
def test_bad_steps(tokens: int, spans: list[int], options: dict[str, bool], text: str) -> None:
    cache = made()
    (seq,) = cache.new()
    with pytest.raises(ValueError, match=text):
        cache.read(seq, tokens, spans, **options)


def test_other_policies_have_no_spans_and_no_sets() -> None:
    cache = Cache(Shape(LAYERS, torch.float32))
    (seq,) = cache.new()
    with pytest.raises(ValueError, match="policy 'full' knows no episodes"):
        cache.read(seq, 1, [1])
    with pytest.raises(ValueError, match="this store has no sets"):
        cache.view(seq, [1])


def test_bad_tensors_are_named() -> None:
    cache = made()
    (seq,) = cache.new()
    q = torch.zeros(5, 4, 32)
    k = torch.zeros(5, 2, 32)
    with cache.read(seq, 2, [3]) as step:
        for layer in range(2):
            for wrong, text in (
                (k[:4], r"k is \[4, 2, 32\], expected \[5, 2, 32\]"),
                (k.double(), "k is torch.float64, expected torch.float32"),
                (k.to("meta"), "k is on meta, expected cpu"),
                (torch.zeros(5, 2, 64)[..., ::2], "k has stride 2 in its last dimension, expected 1"),
            ):
                with pytest.raises(ValueError, match=f"attend: {text}"):
                    step.attend(layer, q, wrong, k)
            step.attend(layer, q, k, k)
        with pytest.raises(ValueError, match="layer is 1, expected each of 0..1 once"):
            step.attend(1, q, k, k)
