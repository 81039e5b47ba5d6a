"""`streaming`: sinks and a window, so that bytes really fall."""

from __future__ import annotations

import gc

import pytest
import torch

from kvstrata import Cache, LayerSpec, Shape, policy

LAYERS = [LayerSpec(2, 8, 64)] * 4


def feed(cache: Cache, seqs: list, n: int, generator: torch.Generator) -> torch.Tensor:  # type: ignore[type-arg]
    dtype = cache.shape.dtype
    with cache.step(seqs, [n] * len(seqs)) as step:
        for layer, spec in enumerate(cache.shape.layers):
            q, k, v = (
                torch.randn(n * len(seqs), h, spec.head_dim, generator=generator).to(dtype)
                for h in (spec.q_heads, spec.kv_heads, spec.kv_heads)
            )
            out = step.attend(layer, q, k, v)
    return out


def allocated(cache: Cache) -> int:
    """Bytes of every live uint8 tensor, as the allocator sees them: independent of what the cache says of itself."""
    gc.collect()
    mine = set(map(id, cache._slabs._tensors.values()))
    return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if id(t) in mine)


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_bytes_fall_and_stay_flat(dtype: torch.dtype, batch: int) -> None:
    """After a 4,096-token prompt: within 10 % of sinks + window + metadata, and flat over 2,000 further tokens."""
    cache = Cache(Shape(LAYERS, dtype), budget="1024tok", policy="streaming")
    seqs = cache.new(batch)
    generator = torch.Generator().manual_seed(0)
    feed(cache, seqs, 4096, generator)
    window, sinks = cache.policy.window, cache.policy.sinks
    kept = (window + sinks) * batch * cache.shape.token_bytes()
    metadata = cache._store.metadata_bytes + cache._store.workspace_bytes
    after = allocated(cache)
    assert after == cache.report().allocator_bytes
    assert kept <= after, "sinks and window are really there"
    assert cache.nbytes() <= 1.10 * (kept + metadata)
    assert after < 0.3 * cache.report().dense_bytes
    most = least = after
    for _ in range(2000):
        feed(cache, seqs, 1, generator)
        held = cache._slabs.held
        most, least = max(most, held), min(least, held)
    assert allocated(cache) <= most
    assert most <= 1.10 * (kept + metadata)
    assert most - least <= 0.05 * after, "flat"
    assert cache.logical_length(seqs[0]) == 6096
    assert window + sinks <= cache.stored_length(0, seqs[0], 0) <= 1024


def test_keeps_exactly_sinks_and_window() -> None:
    cache = Cache(Shape([LayerSpec(1, 1, 16)], torch.float32), policy=policy.streaming(sinks=4, window=32))
    (seq,) = cache.new(1)
    generator = torch.Generator().manual_seed(0)
    for n in (100, *[1] * 77, 40, 7):
        feed(cache, [seq], n, generator)
        length = cache.logical_length(seq)
        first = (length - 32) // 16 * 16  # a page seals once `window` newer tokens exist
        _, _, positions = cache.materialize(0, seq)
        assert positions[0].tolist() == [*range(4), *range(first, length)]


@pytest.mark.parametrize("prompt", [20, 600, 1500])
def test_first_prefill_is_exact(prompt: int) -> None:
    """A first prompt attends to all of itself, however little is kept of it."""
    outs = []
    for name, budget in (("full", None), ("streaming", "100tok")):
        cache = Cache(Shape([LayerSpec(2, 4, 32)], torch.float32), budget=budget, policy=name)
        outs.append(feed(cache, cache.new(2), prompt, torch.Generator().manual_seed(5)))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)


def test_decode_reads_what_is_kept() -> None:
    """A decode step equals dense attention over sinks and window."""
    shape = Shape([LayerSpec(1, 2, 16)], torch.float32)
    cache = Cache(shape, policy=policy.streaming(sinks=4, window=16))
    (seq,) = cache.new(1)
    generator = torch.Generator().manual_seed(6)
    feed(cache, [seq], 90, generator)
    q, k, v = (torch.randn(1, h, 16, generator=generator) for h in (2, 1, 1))
    with cache.step([seq], [1]) as step:
        got = step.attend(0, q, k, v)
    keys, values, positions = cache.materialize(0, seq)
    assert positions[0].tolist() == [*range(4), *range(64, 91)]
    weights = (q[0] @ keys[0].T * 16**-0.5).softmax(-1)
    torch.testing.assert_close(got[0], weights @ values[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_byte_budget_holds_at_every_step(batch: int) -> None:
    limit = 3 << 20
    cache = Cache(Shape(LAYERS, torch.bfloat16), budget=limit and "3MiB", policy="streaming")
    seqs = cache.new(batch)
    generator = torch.Generator().manual_seed(7)
    for n in (2000, *[1] * 100, 300, 5, 40, *[1] * 40):
        feed(cache, seqs, n, generator)
        assert cache.nbytes() <= limit
        assert cache.report().peak_bytes <= limit
    assert cache.nbytes() > limit // 2, "the budget is used"


@pytest.mark.parametrize("kib", [380, 450, 700, 1000, 1500])
def test_a_small_byte_budget_takes_turns_that_begin_inside_a_page(kib: int) -> None:
    cache = Cache(Shape(LAYERS, torch.bfloat16), budget=f"{kib}KiB", policy="streaming")
    (seq,) = cache.new()
    generator = torch.Generator().manual_seed(7)
    for n in (1003, 270, 1, 1, 300, 7, 600):
        feed(cache, [seq], n, generator)
        assert cache.report().peak_bytes <= kib << 10


def test_crop_below_what_was_dropped() -> None:
    cache = Cache(Shape([LayerSpec(1, 1, 16)], torch.float32), policy=policy.streaming(sinks=4, window=32))
    (seq,) = cache.new(1)
    generator = torch.Generator().manual_seed(0)
    feed(cache, [seq], 100, generator)
    with pytest.raises(ValueError, match=r"length is 90, expected 100..100"):
        cache.crop([seq], [90])


def test_recording_holds_unconfirmed_tokens() -> None:
    """While recording, a plan sees confirmed tokens only, so a crop within the hold is exact."""
    cache = Cache(Shape([LayerSpec(1, 1, 16)], torch.float32), policy=policy.streaming(sinks=4, window=32), hold=20)
    (seq,) = cache.new(1)
    generator = torch.Generator().manual_seed(0)
    feed(cache, [seq], 96, generator)
    cache.set_recording(True)
    feed(cache, [seq], 12, generator)
    feed(cache, [seq], 8, generator)
    assert cache.crop_floor(seq) <= 96
    cache.crop([seq], [97])
    feed(cache, [seq], 1, generator)
    _, _, positions = cache.materialize(0, seq)
    assert positions[0].tolist() == [*range(4), *range(64, 98)]
