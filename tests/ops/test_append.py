"""append: every byte of every page, against the reference's layout."""

from __future__ import annotations

import struct

import pytest
import torch
from cases import POISON, SLOTS, poisoned_pools
from torch import Tensor

from kvstrata import _C, ops, reference

FORMATS = ["f32", "bf16", "f16"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
EMULATED = 1.0
DIMS = [*_C.supported()["tuned_dims"], 1, 2, 8, 17, 40, 512]


def places(rows: int, pages: int, first: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Page indices and slots [R, T] of tokens that follow each other from slot `first`; rows' pages interleave."""
    at = torch.arange(first, first + tokens)
    index = (at // SLOTS).unsqueeze(0) * rows + torch.arange(rows).unsqueeze(1)
    return index.to(torch.int32), (at % SLOTS).to(torch.uint8).repeat(rows, 1)


def expected(
    pool: ops.Pool, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Payload and positions of a pool that was poisoned before these tokens came."""
    kind, dp = ops.FORMATS[pool.format], reference.padded(pool.head_dim)
    poison = torch.full((2, pool.pages[0], SLOTS, dp), 0).to(kind)
    poison.view(torch.uint8).fill_(POISON)
    positions = torch.full((pool.pages[0], SLOTS), -1, dtype=torch.int32)
    for r in range(k.shape[0]):
        padded = [torch.nn.functional.pad(t[r], (0, dp - pool.head_dim)).to(kind) for t in (k, v)]
        reference.append(poison[0], poison[1], positions, *padded, pages[r], slots[r], int(start[r]))
    return reference.pack(poison[0], poison[1], pool.format), positions


def check(
    fmt: str,
    dtype: torch.dtype,
    dim: int,
    first: int,
    tokens: int,
    *,
    skip: bool = False,
    threads: int = 1,
    rows: int = 2,
    offset: int = 0,
) -> None:
    pages = (first + tokens) // SLOTS + 1
    pool = poisoned_pools((fmt,), dim, rows * pages, 1)[0]
    g = torch.Generator().manual_seed(dim + tokens)
    size = rows * tokens * dim
    k, v = (torch.randn(offset + size, generator=g).to(dtype)[offset:].view(rows, tokens, dim) for _ in range(2))
    index, slots = places(rows, pages, first, tokens)
    if skip:
        index[torch.rand(index.shape, generator=g) < 0.2] = -1
    start = first + 1000 * torch.arange(rows, dtype=torch.int32)
    ops.append(k, v, index, slots, [pool], start, threads=threads)
    payload, positions = expected(pool, k, v, index, slots, start)
    assert torch.equal(pool.positions(), positions)
    assert torch.equal(pool.payload(), payload)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_head_dims(isa: str, fmt: str, dim: int) -> None:
    check(fmt, ops.FORMATS[fmt], dim, 3, 40)
    check(fmt, torch.float32, dim, 0, 33)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_types(isa: str, fmt: str, dtype: torch.dtype) -> None:
    check(fmt, dtype, 64, 0, 50)
    check(fmt, dtype, 40, 5, 50, skip=True)


@pytest.mark.parametrize("tokens", [0, 1, 3, 15, 16, 17, 31, 32, 33, 300])
@pytest.mark.parametrize("first", [0, 1, 15])
def test_lengths(isa: str, tokens: int, first: int) -> None:
    check("bf16", torch.bfloat16, 48, first, tokens)


@pytest.mark.parametrize("fmt", FORMATS)
def test_many_rows(isa: str, fmt: str) -> None:
    check(fmt, torch.bfloat16, 32, 7, 20, rows=40)
    check(fmt, torch.bfloat16, 64, 3, 1, rows=40)  # a step of decode


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_that_begin_anywhere_in_memory(isa: str, dtype: torch.dtype, offset: int) -> None:
    check("bf16", dtype, 64, 0, 17, offset=offset)
    check("f32", dtype, 36, 5, 20, offset=offset)


def test_long_stretches_are_skipped(isa: str) -> None:
    """Tokens of a page stand anywhere in the row, and whole stretches of it go nowhere."""
    g = torch.Generator().manual_seed(7)
    pool = poisoned_pools(("bf16",), 32, 8, 1)[0]
    k, v = torch.randn(1, 900, 32, generator=g), torch.randn(1, 900, 32, generator=g)
    kept = torch.randperm(900, generator=g)[:110].sort().values
    kept = kept[(kept < 200) | (kept > 330)]
    index = torch.full((1, 900), -1, dtype=torch.int32)
    slots = torch.full((1, 900), 99, dtype=torch.uint8)
    index[0, kept], slots[0, kept] = (t[0] for t in places(1, 8, 5, len(kept)))
    start = torch.tensor([10], dtype=torch.int32)
    ops.append(k, v, index, slots, [pool], start)
    payload, positions = expected(pool, k, v, index, slots, start)
    assert torch.equal(pool.positions(), positions) and torch.equal(pool.payload(), payload)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(isa: str, threads: int) -> None:
    check("bf16", torch.bfloat16, 32, 5, 2000, threads=threads)
    check("f16", torch.float32, 32, 5, 2000, threads=threads, skip=True)


def test_one_token_at_a_time_is_all_at_once(isa: str) -> None:
    k, v = torch.randn(1, 40, 24), torch.randn(1, 40, 24)
    index, slots = places(1, 3, 0, 40)
    pools = [poisoned_pools(("bf16",), 24, 3, 1) for _ in range(2)]
    ops.append(k, v, index, slots, pools[0], torch.zeros(1, dtype=torch.int32))
    for t in range(40):
        one = slice(t, t + 1)
        ops.append(k[:, one], v[:, one], index[:, one], slots[:, one], pools[1], torch.full((1,), t, dtype=torch.int32))
    assert torch.equal(pools[0][0].slabs[0], pools[1][0].slabs[0])


def test_strided_rows_and_tokens(isa: str) -> None:
    wide = torch.randn(40, 3, 2, 64)  # token, head, k or v, dim: as a fused projection leaves them
    k, v = wide[:, :, 0].transpose(0, 1), wide[:, :, 1].transpose(0, 1)
    index, slots = places(3, 3, 0, 40)
    pools = [poisoned_pools(("f32",), 64, 9, 1) for _ in range(2)]
    start = torch.zeros(3, dtype=torch.int32)
    ops.append(k, v, index, slots, pools[0], start)
    ops.append(k.contiguous(), v.contiguous(), index, slots, pools[1], start)
    assert torch.equal(pools[0][0].slabs[0], pools[1][0].slabs[0])


def test_several_pools_and_slabs(isa: str) -> None:
    pools = poisoned_pools(("f32", "bf16", "f16"), 16, 2, 2)
    k, v = torch.randn(1, 96, 16), torch.randn(1, 96, 16)
    ids = [ops.make_page(p, s, 1) for p in (2, 0, 1) for s in (1, 0)]
    pages = torch.tensor(ids, dtype=torch.int32).repeat_interleave(16).unsqueeze(0)
    slots = torch.arange(16, dtype=torch.uint8).repeat(6).unsqueeze(0)
    ops.append(k, v, pages, slots, pools, torch.zeros(1, dtype=torch.int32))
    for i, (p, s) in enumerate((p, s) for p in (2, 0, 1) for s in (1, 0)):
        got = reference.unpack(pools[p].payload(s)[1:], pools[p].format, 16)
        kind, part = ops.FORMATS[pools[p].format], slice(16 * i, 16 * i + 16)
        assert torch.equal(got[0][0], k[0, part].to(kind)) and torch.equal(got[1][0], v[0, part].to(kind))
        assert torch.all(pools[p].payload(s)[0] == POISON)


def bits(pattern: list[int], dtype: torch.dtype) -> Tensor:
    code = "I" if dtype == torch.float32 else "H"
    return torch.frombuffer(bytearray(struct.pack(f"{len(pattern)}{code}", *pattern)), dtype=dtype)


def special_values(dtype: torch.dtype) -> Tensor:
    """Every 16-bit pattern; or f32 around every rounding edge: ties, subnormals, overflow."""
    if dtype != torch.float32:
        return bits(list(range(65536)), dtype)
    g = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (1 << 16,), generator=g).to(torch.int32).view(torch.float32)
    halves = bits(list(range(65536)), torch.float16).float()
    halves = halves[halves.isfinite()]
    edges = halves.double().unsqueeze(1) * torch.tensor(
        [1 - 2.0**-24, 1, 1 + 2.0**-12, 1 + 2.0**-11 * 0.5, 1 + 2.0**-11]
    )
    ties = torch.cat([(halves[:-1].double() + halves[1:].double()) / 2, torch.arange(64).double() * 2.0**-26])
    return torch.cat([random, edges.flatten().float(), ties.float(), torch.tensor([65504.0, 65519.9, 65520.0, 1e38])])


@pytest.mark.parametrize("source", TYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_conversion_of_every_value(isa: str, fmt: str, source: torch.dtype) -> None:
    """Round to nearest even, subnormals and infinities included; equal types bit for bit, NaN payloads too."""
    values = special_values(source)
    dim = 512
    tokens = -(-len(values) // (16 * dim)) * 16
    k = torch.nn.functional.pad(values, (0, tokens * dim - len(values))).view(1, tokens, dim)
    pool = poisoned_pools((fmt,), dim, tokens // 16, 1)[0]
    index, slots = places(1, tokens // 16, 0, tokens)
    ops.append(k, k, index, slots, [pool], torch.zeros(1, dtype=torch.int32))
    target = ops.FORMATS[fmt]
    want = k.to(target).flatten()
    for got in reference.unpack(pool.payload(), fmt, dim):
        flat = got.reshape(-1)
        if source == target:
            assert torch.equal(flat.view(torch.uint8), k.flatten().view(torch.uint8))
            continue
        integer = torch.int32 if target == torch.float32 else torch.int16
        plain = ~want.isnan()
        assert torch.equal(flat[plain].view(integer), want[plain].view(integer))
        assert torch.equal(flat[~plain].view(integer), quiet_nans(k.flatten()[~plain], target))


def quiet_nans(x: Tensor, target: torch.dtype) -> Tensor:
    """What NaNs become, as integers: the sign and the upper bits of the payload stay, and rounding sets its first bit."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).to(torch.int64)
    if x.dtype == torch.bfloat16:
        bits <<= 16
    elif x.dtype == torch.float16:
        bits = (bits & 0x8000) << 16 | 0x7FC00000 | (bits & 0x3FF) << 13
    if target == torch.float32:
        return bits.to(torch.int32)
    if target == torch.bfloat16:
        return (bits >> 16 | 0x40).to(torch.int16)
    return (bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x3FF).to(torch.int16)
