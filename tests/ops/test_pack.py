"""pack and unpack: byte for byte, against the reference's own reading of the layout."""

from __future__ import annotations

import re

import pytest
import torch
from cases import POISON, poisoned_pools
from torch import Tensor

from kvstrata import _C, ops, reference

FORMATS = ["f32", "bf16", "f16"]
EMULATED = 1.0
DIMS = [*_C.supported()["tuned_dims"], 1, 2, 8, 16, 17, 40, 333, 512]


def random_bits(fmt: str, count: int, dim: int) -> Tensor:
    """Any bit pattern, NaNs of every payload among them."""
    g = torch.Generator().manual_seed(dim)
    kind = ops.FORMATS[fmt]
    raw = torch.randint(0, 256, (count, 16, dim * kind.itemsize), generator=g, dtype=torch.uint8)
    return raw.view(kind)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_round_trip(isa: str, fmt: str, dim: int) -> None:
    pool = poisoned_pools((fmt,), dim, 7, 2)[0]
    k, v = random_bits(fmt, 5, dim), random_bits(fmt, 5, dim).flip(0)
    pages = torch.tensor(
        [ops.make_page(0, s, i) for s, i in ((1, 6), (0, 0), (1, 2), (0, 5), (0, 3))], dtype=torch.int32
    )
    ops.pack(k, v, pages, [pool])
    want = reference.pack(k, v, fmt)
    got = torch.stack([pool.payload(int(p) >> 16)[int(p) & 0xFFFF] for p in pages])
    assert torch.equal(got, want)
    for a, b in zip(reference.unpack(got, fmt, dim), (k, v), strict=True):
        assert same_bytes(a, b)
    buffers = [torch.full_like(k, float("nan")) for _ in range(2)]
    for a, b in zip(ops.unpack(pages, [pool], k=buffers[0], v=buffers[1]), (k, v), strict=True):
        assert same_bytes(a, b)
    assert torch.all(pool.payload(0)[[1, 2, 4, 6]] == POISON) and torch.all(pool.positions(0) == -1)


def test_many_pages_and_threads(isa: str) -> None:
    pool = ops.Pool.allocate("bf16", 32, 500)
    k, v = random_bits("bf16", 500, 32), random_bits("bf16", 500, 32).flip(0)
    pages = torch.randperm(500).to(torch.int32)
    for threads in (1, 2, 8):
        pool.slabs[0].fill_(POISON)
        ops.pack(k, v, pages, [pool], threads=threads)
        got = ops.unpack(pages, [pool], threads=threads)
        assert same_bytes(got[0], k) and same_bytes(got[1], v)


def test_pages_of_several_pools(isa: str) -> None:
    pools = poisoned_pools(("f32", "bf16", "f16"), 24, 3, 1)
    for number, pool in enumerate(pools):
        pages = torch.tensor([ops.make_page(number, 0, i) for i in (2, 0)], dtype=torch.int32)
        k = random_bits(pool.format, 2, 24)
        ops.pack(k, k, pages, pools)
        assert same_bytes(ops.unpack(pages, pools)[1], k)


def test_no_pages(isa: str) -> None:
    pool = ops.Pool.allocate("f32", 8, 1)
    nothing = torch.empty(0, 16, 8)
    ops.pack(nothing, nothing, torch.empty(0, dtype=torch.int32), [pool])
    k, v = ops.unpack(torch.empty(0, dtype=torch.int32), [pool])
    assert k.shape == v.shape == (0, 16, 8)


QUANTIZED_DIMS = [32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256, 512]


@pytest.mark.parametrize("dim", QUANTIZED_DIMS)
@pytest.mark.parametrize("fmt", ops.QUANTIZED)
def test_codes(isa: str, fmt: str, dim: int) -> None:
    """Every code, scales of any bits, over poison: bytes by the reference's layout, and back."""
    pool = poisoned_pools((fmt,), dim, 4, 2)[0]
    g = torch.Generator().manual_seed(dim)
    low, high = {"int8": (-128, 128), "int4": (-8, 8), "int2": (0, 4)}[fmt]
    k, v = (torch.randint(low, high, (3, 16, dim), generator=g).to(torch.int8) for _ in range(2))
    groups = ops.scale_groups(fmt, dim)
    assert groups == dim // reference.group_size(fmt, dim)
    scales = torch.randint(-(1 << 15), 1 << 15, (3, 2, groups, 16), generator=g).to(torch.int16).view(torch.bfloat16)
    pages = torch.tensor([ops.make_page(0, s, i) for s, i in ((1, 3), (0, 0), (0, 2))], dtype=torch.int32)
    ops.pack(k, v, pages, [pool], scales=scales)
    got = torch.stack([pool.payload(int(p) >> 16)[int(p) & 0xFFFF] for p in pages])
    assert torch.equal(got, reference.pack(k, v, fmt, scales))
    for again in (reference.unpack(got, fmt, dim), ops.unpack(pages, [pool])):
        assert all(same_bytes(a, b) for a, b in zip(again, (k, v, scales), strict=True))
    assert torch.all(pool.payload(0)[[1, 3]] == POISON) and torch.all(pool.positions(0) == -1)


@pytest.mark.parametrize("fmt", ops.QUANTIZED)
def test_layout_by_hand(isa: str, fmt: str) -> None:
    """One code at a time, where the drawing of the page puts it: K [.][16][4], V [.][D][4], bit fields low first."""
    dim, bits = 64, {"int8": 8, "int4": 4, "int2": 2}[fmt]
    share, half = 8 // bits, 16 * 64 * bits // 8
    pool = ops.Pool.allocate(fmt, dim, 1)
    page, scales = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 2, ops.scale_groups(fmt, dim), 16).bfloat16()
    for slot, d in ((0, 0), (5, 3), (15, 63), (9, 38), (6, 20)):
        k = torch.zeros(1, 16, dim, dtype=torch.int8)
        k[0, slot, d] = 1
        line, field = d // 4 // share, d // 4 % share
        unit, quarter = slot // 4 // share, slot // 4 % share
        ops.pack(k, k, page, [pool], scales=scales)
        where = {
            line * 64 + slot * 4 + d % 4: 1 << bits * field,
            half + (unit * dim + d) * 4 + slot % 4: 1 << bits * quarter,
        }
        payload = pool.payload()[0]
        assert {int(i): int(payload[i]) for i in payload.nonzero()} == where


def test_codes_of_several_formats_are_refused() -> None:
    pools = poisoned_pools(("int8", "int4", "bf16"), 64, 1, 1)
    k = torch.zeros(2, 16, 64, dtype=torch.int8)
    scales = torch.zeros(2, 2, 1, 16).bfloat16()
    for second, text in (
        (1, "pages[1] has format int4, expected int8 (the format of pages[0])"),
        (2, "k has dtype i8"),
    ):
        pages = torch.tensor([0, second << 28], dtype=torch.int32)
        with pytest.raises(ValueError, match=re.escape(f"pack: {text}")):
            ops.pack(k, k, pages, pools, scales=scales)
    one = torch.zeros(1, dtype=torch.int32)
    for wrong, text in (
        (None, "scales is missing"),
        (scales[:1, :1], "scales is [1, 1, 1, 16], expected [P=1, 2, groups=1"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"pack: {text}")):
            ops.pack(k[:1], k[:1], one, pools, scales=wrong)
    with pytest.raises(
        ValueError, match=re.escape("pack: k has dtype f32, expected i8 (the format of pages[0] is quan")
    ):
        ops.pack(k[:1].float(), k[:1].float(), one, pools, scales=scales[:1])
    assert all(torch.all(pool.slabs[0] == POISON) for pool in pools)


# states.md 2.4: bytes of a slot and of a page.
TABLE = {
    64: {"bf16": (256, 4096), "int8": (132, 2112), "int4": (68, 1088), "int2": (40, 640)},
    80: {"bf16": (320, 5120), "int8": (164, 2624), "int4": (100, 1600), "int2": (60, 960)},
    96: {"bf16": (384, 6144), "int8": (196, 3136), "int4": (108, 1728), "int2": (60, 960)},
    128: {"bf16": (512, 8192), "int8": (260, 4160), "int4": (136, 2176), "int2": (80, 1280)},
    256: {"bf16": (1024, 16384), "int8": (520, 8320), "int4": (272, 4352), "int2": (160, 2560)},
}


@pytest.mark.parametrize("dim", TABLE)
def test_page_bytes_of_the_formats(dim: int) -> None:
    for fmt, (slot, page) in TABLE[dim].items():
        assert ops.page_bytes(fmt, dim) == page == 16 * slot


def test_quantized_pages_are_whole_lines() -> None:
    for dim in range(32, 513, 16):
        for fmt in ops.QUANTIZED:
            assert ops.page_bytes(fmt, dim) % 64 == 0
            assert dim % ops.scale_groups(fmt, dim) == 0 and dim // ops.scale_groups(fmt, dim) % 16 == 0


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dim", [1, 16, 17, 128, 512])
def test_page_bytes(fmt: str, dim: int) -> None:
    assert ops.page_bytes(fmt, dim) == 2 * 16 * reference.padded(dim) * ops.FORMATS[fmt].itemsize
    pool = ops.Pool.allocate(fmt, dim, 3, slabs=2)
    assert pool.stride % 64 == 0 and all(s.data_ptr() % 64 == 0 for s in pool.slabs)
    assert pool.payload(1).shape == (3, pool.stride) and pool.positions(1).shape == (3, 16)


def test_page_ids() -> None:
    assert ops.make_page(7, 4095, 65535) == 2**31 - 1 and ops.make_page(1, 2, 3) == 1 << 28 | 2 << 16 | 3
    for bad in ((8, 0, 0), (0, 4096, 0), (0, 0, 65536), (-1, 0, 0)):
        with pytest.raises(ValueError, match="make_page: .* expected 0 to"):
            ops.make_page(*bad)
