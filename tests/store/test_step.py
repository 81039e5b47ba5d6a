"""A step's outputs against dense attention in f64, over layouts, sizes, dtypes and attention variants."""

from __future__ import annotations

import pytest
import torch
from feeding import feed
from oracle import Pair

from kvstrata import Cache, LayerSpec, Shape

# Relative error of one query head's output. f32: rounding of sums over a few hundred terms. 16 bits: the output's own
# rounding (bf16 2^-9) dominates; the dense part of a chunk is rounded once more before the merge.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make(layers: list[LayerSpec], dtype: torch.dtype = torch.float32, **kw: object) -> Pair:
    return Pair(Cache(Shape(layers, dtype)), torch.Generator().manual_seed(1), **kw)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(1, 1), (2, 8), (4, 4), (2, 6)])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_prefill_then_decode(dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    pair = make([LayerSpec(*heads, dim)], dtype)
    seqs = pair.new(1)
    for n in (70, 1, 1, 5, 30, 1):
        assert pair.feed(seqs, [n]) < TOLERANCE[dtype]
    pair.check_contents()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("sizes", [[3, 17, 1], [90, 65, 2], [16, 0, 33]])
def test_ragged(padded: bool, left: bool, sizes: list[int]) -> None:
    pair = make([LayerSpec(2, 4, 32), LayerSpec(1, 4, 32)])
    seqs = pair.new(3)
    assert pair.feed(seqs, sizes, padded=padded, left=left) < 2e-5
    assert pair.feed(seqs, [1, 1, 1], padded=padded) < 2e-5
    assert pair.feed(seqs, sizes[::-1], padded=padded, left=left) < 2e-5
    pair.check_contents()


@pytest.mark.parametrize("n", [5, 80])
@pytest.mark.parametrize("variant", [{"softcap": 5.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True}])
def test_softcap_and_sinks(variant: dict[str, object], n: int) -> None:
    pair = make([LayerSpec(2, 6, 64)], **variant)
    seqs = pair.new(2)
    for _ in range(3):
        assert pair.feed(seqs, [n, n - 3], padded=True) < 2e-5


@pytest.mark.parametrize("window", [8, 24, 100])
@pytest.mark.parametrize("sizes", [[40, 1, 1, 7], [150, 1, 1, 100], [1] * 40])
def test_window(window: int, sizes: list[int]) -> None:
    pair = Pair(
        Cache(Shape([LayerSpec(2, 4, 16, window), LayerSpec(2, 4, 16)], torch.float32), hold=16),
        torch.Generator().manual_seed(2),
    )
    seqs = pair.new(1)
    for n in sizes:
        assert pair.feed(seqs, [n]) < 2e-5


def test_window_frees_pages() -> None:
    cache = Cache(Shape([LayerSpec(1, 1, 16, 32)], torch.float32), hold=16)
    pair = Pair(cache, torch.Generator().manual_seed(2))
    (seq,) = pair.new(1)
    for n in (300, *[1] * 100):
        assert pair.feed([seq], [n]) < 2e-5
        assert cache.stored_length(0, seq, 0) <= 32 + 16 + 15
    floor = cache.crop_floor(seq)
    assert 400 - 16 - 15 <= floor <= 400 - 16
    with pytest.raises(ValueError, match=f"expected {floor}..400"):
        cache.crop([seq], [floor - 1])
    cache.crop([seq], [floor])
    dense = pair.model[seq]
    dense.length = floor
    for row in dense.rows.values():
        row.keep([p < floor for p in row.positions])
    assert pair.feed([seq], [1]) < 2e-5, "after a crop to the floor the window is still whole"


def test_many_tokens_equal_one_by_one() -> None:
    shape = Shape([LayerSpec(2, 4, 64)], torch.float32)
    q, k, v = torch.randn(40, 4, 64), torch.randn(40, 2, 64), torch.randn(40, 2, 64)
    outs = []
    for pieces in ([40], [1] * 40, [7, 33], [16, 16, 8]):
        cache = Cache(shape)
        seqs = cache.new(1)
        got, start = [], 0
        for n in pieces:
            with cache.step(seqs, [n]) as step:
                got.append(step.attend(0, q[start : start + n], k[start : start + n], v[start : start + n]))
            start += n
        outs.append(torch.cat(got))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6)


def test_batch_mates_do_not_change_bits() -> None:
    shape = Shape([LayerSpec(2, 4, 64)], torch.bfloat16)
    data = [[torch.randn(n, h, 64).bfloat16() for h in (4, 2, 2)] for n in (37, 50, 12)]
    together, alone = Cache(shape), []
    seqs = together.new(3)
    with together.step(seqs, [37, 50, 12]) as step:
        both = step.attend(0, *(torch.cat(x) for x in zip(*data, strict=True)))
    for q, k, v in data:
        cache = Cache(shape)
        with cache.step(cache.new(1), [q.shape[0]]) as step:
            alone.append(step.attend(0, q, k, v))
    assert torch.equal(both, torch.cat(alone))


def test_positions() -> None:
    cache = Cache(Shape([LayerSpec(1, 1, 8)], torch.float32))
    seqs = cache.new(2)
    x = torch.zeros(5, 1, 8)
    with cache.step(seqs, [2, 3]) as step:
        assert step.positions.tolist() == [0, 1, 0, 1, 2]
        step.attend(0, x, x, x)
    valid = torch.tensor([[False, True, True], [True, False, True]])
    with cache.step(seqs, valid=valid) as step:
        assert step.positions.tolist() == [[0, 2, 3], [3, 0, 4]]
        y = torch.zeros(2, 3, 1, 8)
        step.attend(0, y, y, y)
    assert [cache.logical_length(s) for s in seqs] == [4, 5]


def test_poison_never_leaks() -> None:
    """Slabs arrive full of NaN: what was never written is never read."""
    pair = make([LayerSpec(2, 4, 40)])
    lend = pair.cache._slabs._store.lend

    class Poisoned:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def lend(self, pool: int, payload: int, positions: int, n: int) -> int:
            import ctypes

            ctypes.memset(payload, 0xFF, positions - payload)
            return lend(pool, payload, positions, n)

    store = pair.cache._slabs._store
    pair.cache._slabs._store = Poisoned()  # type: ignore[assignment]
    seqs = pair.new(2)
    for n in (1, 3, 14, 30, 80, 1):
        assert pair.feed(seqs, [n, max(1, n - 1)]) < 2e-5


def test_rollback_restores_everything() -> None:
    pair = make([LayerSpec(2, 4, 16)] * 3)
    seqs = pair.new(2)
    pair.feed(seqs, [20, 5])
    store = pair.cache._store
    before = [store.row(s.id, layer, h) for s in seqs for layer in range(3) for h in range(2)]
    with pytest.raises(KeyError, match="mine"), pair.cache.step(seqs, [30, 1]) as step:
        x = torch.randn(31, 4, 16)
        step.attend(0, x, x[:, :2], x[:, :2])
        step.attend(1, x, x[:, :2], x[:, :2])
        raise KeyError("mine")
    assert [store.row(s.id, layer, h) for s in seqs for layer in range(3) for h in range(2)] == before
    pair.check_contents()
    pair.check_pools()
    assert pair.feed(seqs, [30, 1]) < 2e-5


def test_a_report_tells_heads_apart_and_adds_up() -> None:
    """Of each head the most that a sequence stores, of layers with different heads; all of them, and what is gone."""
    cache = Cache(Shape([LayerSpec(2, 4, 32), LayerSpec(3, 3, 32)], torch.float32))
    seqs = cache.new(2)
    generator = torch.Generator().manual_seed(1)
    feed(cache, seqs, [40, 25], generator)
    keep = torch.ones(3, 40, dtype=torch.bool)
    keep[1, :30], keep[2, :7] = False, False
    cache.drop(1, seqs[0], keep)
    report = cache.report()
    assert report.stored == ((40, 40), (40, 25, 33))
    assert report.stored_tokens == 2 * (40 + 25) + 3 * (40 + 25) - 37
    assert report.states == {"full": report.stored_tokens, "evicted": 37}
