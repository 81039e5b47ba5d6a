"""quantize and dequantize: bit for bit the reference, at every level; what may become what; errors as promised."""

from __future__ import annotations

import pytest
import torch
from cases import poisoned_pools
from torch import Tensor
from vectors import (
    KINDS,
    POISON,
    SLOTS,
    full_pages,
    in_order,
    quantized,
    ragged_moves,
    same_bytes,
    token_codes,
    vectors,
)

from kvstrata import ops, reference

EMULATED = 1.0
FORMATS = list(ops.QUANTIZED)
DIMS = [32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256, 512]
BITS = {"f32": 32, "bf16": 16, "f16": 16, "int8": 8, "int4": 4, "int2": 2}


def expected(k: Tensor, v: Tensor, fmt: str, centre: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes k, v [N, D] and scales [N, 2, groups] by the reference."""
    (kc, ks), (vc, vs) = reference.quantize(k, fmt, centre), reference.quantize(v, fmt)
    return kc, vc, torch.stack([ks, vs], 1)


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(("k", "v", "scales"), got, want, strict=True):
        bits = (
            (a.view(torch.int8), b.view(torch.int8)) if name != "scales" else (a.view(torch.int16), b.view(torch.int16))
        )
        differ = (bits[0] != bits[1]).nonzero()
        assert not len(differ), f"{name}{differ[0].tolist()}: {a[tuple(differ[0])]} != {b[tuple(differ[0])]}"


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_and_scales_are_the_reference_bits(isa: str, fmt: str, dim: int) -> None:
    each = 4 if isa == "emulated" else 16  # slow: as few as show every kind
    rest = -each * len(KINDS) % SLOTS
    k = torch.cat([vectors(kind, each, dim) for kind in KINDS] + [vectors("gaussian", rest, dim)])
    v = torch.cat([vectors(kind, each, dim, seed=1) for kind in reversed(KINDS)] + [vectors("spike", rest, dim)])
    centre = vectors("gaussian", 1, dim, seed=2)[0] * 3
    assert_same(quantized(k, v, fmt), expected(k, v, fmt))
    assert_same(quantized(k, v, fmt, centre), expected(k, v, fmt, centre))


def near_ties(dim: int, group: int) -> Tensor:
    """f32 [2 n, dim] whose first group is between two of int2's scales, on either side of the change, as near as f32 goes: the
    order in which errors are summed decides."""
    low, high = vectors("gaussian", 64, dim, seed=8), vectors("gaussian", 64, dim, seed=9)

    def share(x: Tensor) -> Tensor:
        y = reference.rotate(x)
        return (30 * reference.encode(y, "int2")[1][:, :1].float() / y[:, :group].abs().amax(1, True)).round()

    differ = (share(low) != share(high))[:, 0]
    low, high = low[differ], high[differ]
    begin, end = torch.zeros(len(low), 1), torch.ones(len(low), 1)
    for _ in range(40):
        middle = (begin + end) / 2
        same = share(low + middle * (high - low)) == share(low)
        begin, end = torch.where(same, middle, begin), torch.where(same, end, middle)
    return torch.cat([low + t * (high - low) for t in (begin, end)])


@pytest.mark.parametrize(("dim", "group"), [(32, 32), (48, 16)])
def test_the_order_of_sums_decides_near_ties(isa: str, dim: int, group: int) -> None:
    x = near_ties(dim, group)
    assert len(x) >= 64
    x = x[: len(x) // SLOTS * SLOTS]
    assert_same(quantized(x, x.flip(0), "int2"), expected(x, x.flip(0), "int2"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_each_kind(fmt: str, kind: str) -> None:
    """What the bits mean: zeros where there is nothing, NaN scales where a group is not finite, codes in range."""
    k = vectors(kind, 32, 128)
    codes, _, scales = quantized(k, k.flip(0), fmt)
    rotated = reference.rotate(k).view(32, scales.shape[2], -1)
    most, finite = rotated.abs().amax(-1), rotated.isfinite().all(-1)
    key_scales = scales[:, 0].float()
    assert torch.equal(key_scales.isnan(), ~finite)
    tiny = finite & (most < 2.0**-100)
    assert torch.equal(key_scales == 0, tiny)
    by_group = codes.view(32, scales.shape[2], -1)
    assert torch.all(by_group[tiny | ~finite] == 0)
    low, high = {"int8": (-127, 127), "int4": (-8, 7), "int2": (0, 3)}[fmt]
    assert codes.min() >= low and codes.max() <= high
    if kind in ("subnormal", "zero"):
        assert torch.all(tiny)
    if kind == "edge":
        assert tiny.any() and not tiny.all()
    if kind == "nan":
        assert not finite.all() and finite.any()


@pytest.mark.parametrize("source", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_scattered_slots_over_poison(isa: str, fmt: str, source: str) -> None:
    """Any slot to any slot; slots not named keep their bytes; unused source slots hold NaN; skipped moves hold anything."""
    dim, g = 96, torch.Generator().manual_seed(3)
    pools = poisoned_pools((source, fmt), dim, 6, 2)
    k, v = (vectors("gaussian", 64, dim, seed).to(ops.FORMATS[source]) for seed in (4, 5))
    full_pages(pools[0], 0, k, v)
    centre = torch.randn(3, dim, generator=g)
    pools[0].payload(1).fill_(POISON)
    moves, rows, names = [], [], []
    for page, count in ((ops.make_page(1, 1, 4), 16), (ops.make_page(1, 0, 2), 5), (ops.make_page(1, 0, 5), 1)):
        slots = torch.randperm(SLOTS, generator=g)[:count].tolist()
        for slot in slots:
            token = int(torch.randint(0, 64, (1,), generator=g))
            moves += [[token // SLOTS, token % SLOTS, page, slot], [-1, 99, page, -7], [123456, 16, -1, 1 << 30]]
            rows += [token % 3, -5, 1 << 30]
            names.append((page, slot, token))
    ops.quantize(torch.tensor(moves).int(), pools, centre, torch.tensor(rows).int())
    for slab in (0, 1):
        payload = torch.full_like(pools[1].payload(slab), POISON)
        kc, vc, scales = reference.unpack(payload, fmt, dim)
        positions = torch.full((6, SLOTS), -1, dtype=torch.int32)
        for page, slot, token in names:
            if page >> 16 & 0xFFF != slab:
                continue
            at = page & 0xFFFF
            row = slice(token, token + 1)
            one = expected(k[row].float(), v[row].float(), fmt, centre[token % 3])
            kc[at, slot], vc[at, slot], scales[at, :, :, slot] = one[0][0], one[1][0], one[2][0]
            positions[at, slot] = token
        assert torch.equal(pools[1].payload(slab), reference.pack(kc, vc, fmt, scales))
        assert torch.equal(pools[1].positions(slab), positions)


@pytest.mark.parametrize("fmt", FORMATS)
def test_pages_begin_anywhere_in_the_list(isa: str, fmt: str) -> None:
    """The codes of tokens in order, wherever they go."""
    pools = poisoned_pools(("f32", fmt, fmt), 48, 12, 1)
    full_pages(pools[0], 0, vectors("gaussian", 64, 48), vectors("gaussian", 64, 48, seed=1))
    ops.quantize(in_order(0, 1, 64), pools)
    moves = ragged_moves(12, 64, seed=4)
    parts = [list(reference.unpack(pools[p].payload(), fmt, 48)) for p in (1, 2)]
    for source, target in zip(*parts, strict=True):
        slots = [t.permute(0, 3, 1, 2) if t.dtype == torch.bfloat16 else t for t in (source, target)]
        reference.compact(slots[0], slots[1], torch.tensor(moves))
    positions = pools[2].positions().clone()
    reference.compact(pools[0].positions(), positions, torch.tensor(moves))
    ids = [[a, b, c if c < 0 else c | 2 << 28, d] for a, b, c, d in moves]
    ops.quantize(torch.tensor(ids).int(), pools)
    assert torch.equal(pools[2].payload(), reference.pack(*parts[1][:2], fmt, parts[1][2]))
    assert torch.equal(pools[2].positions(), positions)


@pytest.mark.parametrize(("source", "fmt"), [("int8", "int4"), ("int8", "int2"), ("int4", "int2")])
@pytest.mark.parametrize("dim", [32, 80, 128, 192])
def test_fewer_bits(isa: str, source: str, fmt: str, dim: int) -> None:
    """Decoded in the rotated domain and encoded: no rotation, no centre."""
    kinds = ["gaussian", "nan", "zero", "spike"]
    k, v = (torch.cat([vectors(kind, 16, dim, seed) for kind in kinds]) for seed in (6, 7))
    pools = poisoned_pools(("f32", source, fmt), dim, 4, 1)
    full_pages(pools[0], 0, k, v)
    ops.quantize(in_order(0, 1, 64), pools)
    centre, row_of = torch.full((1, dim), 1e6), torch.full((64,), 77, dtype=torch.int32)  # neither is read
    ops.quantize(in_order(1, 2, 64), pools, centre, row_of)
    want = []
    for x in (k, v):
        codes, scales = reference.quantize(x, source)
        want.append(reference.encode(reference.decode(codes, scales, source), fmt))
    (kc, ks), (vc, vs) = want
    assert_same(token_codes(pools, 2, 64), (kc, vc, torch.stack([ks, vs], 1)))


@pytest.mark.parametrize("dim", [32, 96, 128, 256])
@pytest.mark.parametrize("fmt", FORMATS)
def test_dequantize(isa: str, fmt: str, dim: int) -> None:
    k, v = vectors("gaussian", 48, dim), vectors("spike", 48, dim, seed=1)
    centre = vectors("gaussian", 2, dim, seed=2)
    pools = poisoned_pools(("f32", fmt), dim, 3, 1)
    full_pages(pools[0], 0, k, v)
    rows = torch.tensor([1, 0, 1]).int()
    ops.quantize(in_order(0, 1, 48), pools, centre, rows.repeat_interleave(16))
    pages = torch.tensor([ops.make_page(1, 0, i) for i in (2, 0, 1)]).int()
    order = torch.cat([torch.arange(16) + 16 * i for i in (2, 0, 1)])
    got = ops.dequantize(pages, pools, centre, rows[[2, 0, 1]])
    codes_k, codes_v, scales = expected(k, v, fmt, centre[rows.long()].repeat_interleave(16, 0))
    want_k = reference.dequantize(codes_k, scales[:, 0], fmt, centre[rows.long()].repeat_interleave(16, 0))
    want_v = reference.dequantize(codes_v, scales[:, 1], fmt)
    assert torch.equal(got[0].flatten(0, 1), want_k[order]) and torch.equal(got[1].flatten(0, 1), want_v[order])
    full = ops.dequantize(torch.tensor([1]).int(), pools)
    assert torch.equal(full[0][0], k[16:32]) and torch.equal(full[1][0], v[16:32])


@pytest.mark.parametrize("fmt", FORMATS)
def test_error_is_half_a_step(fmt: str) -> None:
    """At most s/2 for each element that was not clipped."""
    x = vectors("gaussian", 64, 128)
    codes, _, scales = quantized(x, x, fmt)
    error = (reference.decode(codes, scales[:, 0], fmt) - reference.rotate(x)).abs()
    step = scales[:, 0].float().abs() * (2 if fmt == "int2" else 1)
    step = step.repeat_interleave(128 // step.shape[1], 1)
    ends = {"int8": (-127, 127), "int4": (-8, 7), "int2": (0, 3)}[fmt]
    inside = (codes != ends[0]) & (codes != ends[1])
    assert torch.all(error[inside] <= step[inside] * (0.5 + 1e-5))


def relative_rms(x: Tensor, fmt: str) -> float:
    codes, _, scales = quantized(x, x, fmt)
    return ((reference.dequantize(codes, scales[:, 0], fmt) - x).norm() / x.norm()).item()


@pytest.mark.parametrize(("fmt", "bound"), [("int8", 0.007), ("int4", 0.098), ("int2", 0.34)])
def test_error_on_gaussians(fmt: str, bound: float) -> None:
    assert relative_rms(vectors("gaussian", 2048, 128), fmt) <= bound


@pytest.mark.parametrize(("source", "fmt", "bound"), [("int8", "int4", 0.098), ("int4", "int2", 0.36)])
def test_demotion_is_sound(source: str, fmt: str, bound: float) -> None:
    x = vectors("gaussian", 2048, 128)
    codes, _, scales = quantized(x, x, source)
    again = reference.encode(reference.decode(codes, scales[:, 0], source), fmt)
    assert (reference.dequantize(*again, fmt) - x).norm() / x.norm() <= bound


def test_a_spike_costs_little() -> None:
    plain = vectors("gaussian", 2048, 128)
    spiked = plain.clone()
    spiked[:, 17] = 20.0

    def error(x: Tensor) -> Tensor:
        codes, _, scales = quantized(x, x, "int4")
        return (reference.dequantize(codes, scales[:, 0], "int4") - x).norm()

    def unrotated(x: Tensor) -> Tensor:
        return (reference.decode(*reference.encode(x, "int4"), "int4") - x)[:, :64].norm()

    assert error(spiked) <= 1.75 * error(plain)
    assert unrotated(spiked) > 4 * unrotated(plain)  # of the spike's own group


def test_biased_channels_want_a_centre() -> None:
    bias = torch.zeros(128)
    bias[[3, 19, 40, 77, 90, 121]] = torch.tensor([6.0, -8.0, 10.0, 14.0, -12.0, 7.0])
    noise = vectors("gaussian", 2048, 128)

    def error(centre: Tensor | None) -> float:
        codes, _, scales = quantized(noise + bias, noise, "int4", centre)
        back = reference.dequantize(codes, scales[:, 0], "int4", centre)
        return ((back - noise - bias).norm() / noise.norm()).item()

    assert error(bias) <= 0.10
    assert error(None) >= 0.2


@pytest.mark.parametrize("fmt", FORMATS)
def test_threads(isa: str, fmt: str) -> None:
    """Runs that end anywhere: pages of 1 to 16 moves, cut among threads where a page ends."""
    g = torch.Generator().manual_seed(8)
    x = vectors("gaussian", 1024, 64)
    counts = torch.randint(1, 17, (100,), generator=g).tolist()
    moves = [
        [int(t) // 16, int(t) % 16, ops.make_page(1, 0, page), slot]
        for page, count in enumerate(counts)
        for slot, t in enumerate(torch.randint(0, 1024, (count,), generator=g))
    ]
    results = []
    for threads in (1, 2) if isa == "emulated" else (1, 2, 3, 8):
        pools = poisoned_pools(("f32", fmt), 64, 100, 1)
        full_pages(pools[0], 0, x, x.flip(0))
        ops.quantize(torch.tensor(moves).int(), pools, threads=threads)
        results.append(pools[1].slabs[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_nothing_to_move(isa: str) -> None:
    pools = poisoned_pools(("f32", "int4"), 64, 1, 1)
    ops.quantize(torch.empty(0, 4, dtype=torch.int32), pools)
    ops.quantize(torch.tensor([[-1, 0, -1, 0]]).int(), pools)
    assert torch.all(pools[1].slabs[0] == POISON)
    assert ops.dequantize(torch.empty(0, dtype=torch.int32), pools[1:])[0].shape == (0, 16, 64)


def test_two_centres_differ_only_in_keys() -> None:
    x = vectors("gaussian", 16, 64)
    zero, none = quantized(x, x, "int4", torch.zeros(64)), quantized(x, x, "int4")
    moved = quantized(x, x, "int4", torch.ones(64))
    assert all(same_bytes(a, b) for a, b in zip(zero, none, strict=True))
    assert not same_bytes(zero[0], moved[0]) and same_bytes(zero[1], moved[1])


def test_bits_only_fall() -> None:
    pools = poisoned_pools(tuple(BITS), 64, 1, 1)
    for a, source in enumerate(BITS):
        for b, target in enumerate(BITS):
            if a == b:
                continue
            before = pools[b].slabs[0].clone()
            if target in FORMATS and BITS[source] > BITS[target]:
                ops.quantize(in_order(a, b, 1), pools)
                continue
            with pytest.raises(ValueError, match="quantize: moves.0. goes "):
                ops.quantize(in_order(a, b, 1), pools)
            assert torch.equal(before, pools[b].slabs[0])
