"""Pages and their formats: arrangement, rotation, codes, and the ops that write slots."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLOTS = 16
ELEMENT = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BITS = {"int8": 8, "int4": 4, "int2": 2}
INF = float("inf")


def padded(head_dim: int) -> int:
    """D rounded up to a multiple of 16: the dimensions a page has room for."""
    return -(-head_dim // SLOTS) * SLOTS


def unpack(page: Tensor, format: str, head_dim: int) -> tuple[Tensor, ...]:
    """Canonical k, v [P, 16, D] from pages of arrangement version 1, uint8 [P, bytes].

    f32: K [D][16], V [16][D].  bf16, f16: K [D/2][16 slots][2 dims], V [8][D][2 slots].
    Quantized: codes k, v int8 [P, 16, D] and scales bf16 [P, 2, groups, 16]; c codes to a byte (int8 1, int4 2, int2 4),
    K [D/4c][16 slots][4 dims], V [4/c][D][4 slots], bit field i of a byte from the i-th successive line.
    """
    if format in BITS:
        return _unpack_codes(page, format, head_dim)
    count, dp = page.shape[0], padded(head_dim)
    elements = page.contiguous().view(ELEMENT[format]).view(count, 2, SLOTS * dp)
    k, v = elements[:, 0], elements[:, 1]
    if format == "f32":
        k, v = k.view(count, dp, SLOTS).transpose(1, 2), v.view(count, SLOTS, dp)
    else:
        k = k.view(count, dp // 2, SLOTS, 2).permute(0, 2, 1, 3).reshape(count, SLOTS, dp)
        v = v.view(count, SLOTS // 2, dp, 2).permute(0, 1, 3, 2).reshape(count, SLOTS, dp)
    return k[..., :head_dim], v[..., :head_dim]


def pack(k: Tensor, v: Tensor, format: str, scales: Tensor | None = None) -> Tensor:
    """Pages uint8 [P, bytes] from what `unpack` gives; padding is zero. Codes keep their low bits."""
    if format in BITS:
        assert scales is not None
        return _pack_codes(k, v, scales, format)
    count, _, head_dim = k.shape
    dp = padded(head_dim)
    full = torch.zeros(2, count, SLOTS, dp, dtype=ELEMENT[format])
    full[0, ..., :head_dim], full[1, ..., :head_dim] = k, v
    if format == "f32":
        halves = full[0].transpose(1, 2), full[1]
    else:
        halves = (
            full[0].view(count, SLOTS, dp // 2, 2).permute(0, 2, 1, 3),
            full[1].view(count, SLOTS // 2, 2, dp).permute(0, 1, 3, 2),
        )
    joined = torch.stack([half.reshape(count, SLOTS * dp) for half in halves], dim=1)
    return joined.view(torch.uint8).view(count, -1)


def _pack_codes(k: Tensor, v: Tensor, scales: Tensor, format: str) -> Tensor:
    count, _, dim = k.shape
    bits = BITS[format]
    share = 8 // bits
    lines = (
        k.view(count, SLOTS, -1, share, 4).permute(0, 2, 1, 4, 3),  # [P, D/4c, 16 slots, 4 dims, c]
        v.view(count, -1, share, 4, dim).permute(0, 1, 4, 3, 2),  # [P, 4/c, D, 4 slots, c]
    )
    fields = torch.arange(share, dtype=torch.int32) * bits
    halves = [((line.to(torch.int32) & ((1 << bits) - 1)) << fields).sum(-1) for line in lines]
    parts = [half.to(torch.uint8).reshape(count, -1) for half in halves]
    return torch.cat([*parts, scales.contiguous().view(torch.uint8).view(count, -1)], dim=1)


def _unpack_codes(page: Tensor, format: str, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    count, bits = page.shape[0], BITS[format]
    share, half = 8 // bits, SLOTS * dim * bits // 8
    fields = torch.arange(share, dtype=torch.int32) * bits
    codes = (page[:, : 2 * half].to(torch.int32).unsqueeze(-1) >> fields) & ((1 << bits) - 1)
    if format != "int2":
        codes = torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    k, v = codes.to(torch.int8).view(count, 2, half, share).unbind(1)
    k = k.reshape(count, -1, SLOTS, 4, share).permute(0, 2, 1, 4, 3).reshape(count, SLOTS, dim)
    v = v.reshape(count, -1, dim, 4, share).permute(0, 1, 4, 3, 2).reshape(count, SLOTS, dim)
    scales = page[:, 2 * half :].contiguous().view(torch.bfloat16)
    return k, v, scales.view(count, 2, -1, SLOTS)


def splitmix64(d: int) -> int:
    """The d-th number of splitmix64 started from d."""
    word = (1 << 64) - 1
    z = (d + 0x9E3779B97F4A7C15) & word
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & word
    return z ^ z >> 31


def rotate(x: Tensor, inverse: bool = False) -> Tensor:
    """R x over the last dimension of x [..., D], or its inverse: signs, Walsh-Hadamard in blocks of b, mix of the blocks.

    D = m b, b the largest power of two that divides D. In x's own type, in a fixed order.
    """
    dim = x.shape[-1]
    block = dim & -dim
    signs = torch.tensor([1.0 if splitmix64(d) % 2 == 0 else -1.0 for d in range(dim)], dtype=x.dtype)
    y = x.reshape(-1, dim // block, block)
    if inverse:
        y = _butterflies(_mix(y))
        return (y.reshape(x.shape)) * signs
    y = (x * signs).reshape(-1, dim // block, block)
    return _mix(_butterflies(y)).reshape(x.shape)


def _butterflies(y: Tensor) -> Tensor:
    count, blocks, block = y.shape
    stride = 1
    while stride < block:
        u, v = y.reshape(count, blocks, block // stride // 2, 2, stride).unbind(3)
        y = torch.stack([u + v, u - v], dim=3).reshape(count, blocks, block)
        stride *= 2
    return y * torch.tensor(1 / math.sqrt(block), dtype=y.dtype)


def _mix(y: Tensor) -> Tensor:
    blocks = y.shape[1]
    if blocks == 1:
        return y
    total = y[:, 0]
    for i in range(1, blocks):
        total = total + y[:, i]
    return y - (total * torch.tensor(2 / blocks, dtype=y.dtype)).unsqueeze(1)


def group_size(format: str, dim: int) -> int:
    """Dimensions that share a scale."""
    if format == "int8" and dim <= 128:
        return dim
    return next(g for g in (128, 64, 32, 16) if g <= {"int8": 128, "int4": 64, "int2": 32}[format] and dim % g == 0)


def round_up_bf16(x: Tensor) -> Tensor:
    """f32 to the bf16 of the next magnitude at or above, as f32; finite x well inside the range."""
    bits = x.view(torch.int32)
    magnitude = ((bits & 0x7FFFFFFF) + 0xFFFF) & ~0xFFFF
    return (magnitude | (bits & -0x80000000)).view(torch.float32)


def encode(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, D] and scales bf16 [N, groups] of rotated f32 vectors [N, D]; the formulas of ops/quantize.h."""
    count, dim = x.shape
    groups = x.reshape(count, -1, group_size(format, dim))
    finite = groups.isfinite().all(-1, keepdim=True)
    most = groups.abs().amax(-1, keepdim=True)
    plain = finite & (most >= 2.0**-100)
    safe = torch.where(plain, groups, torch.ones(()))
    if format == "int2":
        scale, codes = _encode_int2(safe)
    else:
        if format == "int8":
            scale = round_up_bf16(safe.abs().amax(-1, keepdim=True) / 127)
        else:
            at = safe.abs().argmax(-1, keepdim=True)  # the first of equals
            scale = round_up_bf16(safe.gather(-1, at) / -8)
        least, largest = (-127, 127) if format == "int8" else (-8, 7)
        codes = torch.round(safe * (1.0 / scale)).clamp(least, largest)
    codes = torch.where(plain, codes, torch.zeros(()))
    stored = torch.where(plain, scale, torch.zeros(())).to(torch.bfloat16)
    stored.view(torch.int16)[~finite] = 0x7FC0  # a conversion may give any NaN
    return codes.to(torch.int8).view(count, dim), stored.squeeze(-1)


def _encode_int2(x: Tensor) -> tuple[Tensor, Tensor]:
    most = x.abs().amax(-1, keepdim=True)
    best = torch.full_like(most, INF)
    scale, codes = torch.zeros_like(most), torch.zeros_like(x)
    for i, share in enumerate((1.0, 0.9, 0.8, 0.7, 0.6, 0.5)):
        h = round_up_bf16(torch.tensor(share) * most / 3)
        c = torch.floor(x * (1.0 / (2 * h)) + 2).clamp(0, 3)
        error = (x - h * (2 * c - 3)) ** 2
        lanes = error.view(*x.shape[:2], -1, 16)
        total = lanes[..., 0, :]
        for part in range(1, lanes.shape[2]):
            total = total + lanes[..., part, :]
        while total.shape[-1] > 1:
            total = total[..., 0::2] + total[..., 1::2]
        better = (total < best) | (i == 0)
        best, scale = torch.where(better, total, best), torch.where(better, h, scale)
        codes = torch.where(better, c, codes)
    return scale, codes


def decode(codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """Rotated f32 vectors [N, D] of codes int8 [N, D] and scales bf16 [N, groups]."""
    count, dim = codes.shape
    c = codes.to(torch.float32).view(count, scales.shape[1], -1)
    if format == "int2":
        c = 2 * c - 3
    return (scales.to(torch.float32).unsqueeze(-1) * c).view(count, dim)


def quantize(x: Tensor, format: str, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, D] and scales bf16 [N, groups] of f32 vectors [N, D], less centre [N or 1, D] (keys)."""
    return encode(rotate(x if centre is None else x - centre), format)


def dequantize(codes: Tensor, scales: Tensor, format: str, centre: Tensor | None = None) -> Tensor:
    """f32 vectors [N, D] of codes and scales, rotated back, plus centre."""
    x = rotate(decode(codes, scales, format), inverse=True)
    return x if centre is None else x + centre


def widen(page: Tensor, format: str, head_dim: int, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """k, v f64 [P, 16, D] of pages uint8 [P, bytes] of any format, as `attend` may read them; centre [D].

    Attention over mixed formats is `attend` over these: rotation is orthonormal, so q . k = (R q) . (R k).
    """
    k, v, *scales = unpack(page, format, head_dim)
    if not scales:
        return k.double(), v.double()
    by_slot = scales[0].double().permute(1, 0, 3, 2)  # [2, P, 16, groups]
    pair = []
    for codes, scale in zip((k, v), by_slot, strict=True):
        c = codes.double().view(*scale.shape, -1)
        x = scale.unsqueeze(-1) * (2 * c - 3 if format == "int2" else c)
        pair.append(rotate(x.reshape(codes.shape), inverse=True))
    return pair[0] if centre is None else pair[0] + centre.double(), pair[1]


def compact(source: Tensor, target: Tensor, moves: Tensor) -> None:
    """Copies slots of canonical source [P, 16, ...] to target, in place, by moves [n, 4]; an entry with a -1 is skipped."""
    for page, slot, to, to_slot in moves.tolist():
        if page >= 0 and to >= 0:
            target[to, to_slot] = source[page, slot]


def append(
    k_pages: Tensor, v_pages: Tensor, positions: Tensor, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, start: int
) -> None:
    """Writes one row's tokens k, v [T, D] into canonical pages [P, 16, D] and positions [P, 16], in place."""
    for t in range(k.shape[0]):
        page, slot = int(pages[t]), int(slots[t])
        if page < 0:
            continue
        k_pages[page, slot] = k[t].to(k_pages.dtype)
        v_pages[page, slot] = v[t].to(v_pages.dtype)
        positions[page, slot] = start + t
