"""pack and unpack: byte for byte, against the reference's own reading of the layout."""

from __future__ import annotations

import pytest
import torch
from cases import POISON, poisoned_pools
from torch import Tensor

from kvstrata import _C, ops, reference

FORMATS = ["f32", "bf16", "f16"]
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
