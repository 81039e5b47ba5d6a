"""The ops that change how tokens are stored: whole pages in and out, rotation, quantization, slots between pages.

Part of `ops`, which has the letters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstrata import _C
from kvstrata.pools import FORMATS, QUANTIZED, SLOTS, Pool, maybe_view, native_pools, scale_groups, thread_count, view


def pack(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    pools: Sequence[Pool],
    *,
    scales: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Writes whole pages from canonical k, v [P, 16, D], contiguous. Bytes only, lossless.

    k, v     elements of the pages' own type; quantized pages: their codes, int8 (int2: 0 to 3; low bits are stored)
    pages    i32 [P], none of them -1; quantized ones all of one format. Positions are not touched
    scales   bf16 [P, 2 (K, V), groups, 16], for quantized pages
    """
    native = native_pools("pack", pools)
    views = view("pack", "pages", pages), view("pack", "k", k), view("pack", "v", v)
    _C.pack(*views, maybe_view("pack", "scales", scales), native, thread_count("pack", threads))


def unpack(
    pages: Tensor,
    pools: Sequence[Pool],
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    scales: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, ...]:
    """What `pack` takes, from whole pages: (k, v), or (k, v, scales) of quantized pages.

    pages    i32 [P], none of them -1, all of one format
    """
    pool = _pool_of("unpack", pages, pools)
    quantized = pool.format in QUANTIZED
    shape = (pages.numel(), SLOTS, pool.head_dim)
    dtype = torch.int8 if quantized else FORMATS[pool.format]
    k = torch.empty(shape, dtype=dtype, device=pages.device) if k is None else k
    v = torch.empty(shape, dtype=dtype, device=pages.device) if v is None else v
    if quantized and scales is None:
        groups = scale_groups(pool.format, pool.head_dim)
        scales = torch.empty(pages.numel(), 2, groups, SLOTS, dtype=torch.bfloat16, device=pages.device)
    native = native_pools("unpack", pools)
    views = view("unpack", "pages", pages), view("unpack", "k", k), view("unpack", "v", v)
    _C.unpack(*views, maybe_view("unpack", "scales", scales), native, thread_count("unpack", threads))
    return (k, v, scales) if quantized and scales is not None else (k, v)


def _pool_of(op: str, pages: Tensor, pools: Sequence[Pool]) -> Pool:
    number = int(pages.view(-1)[0]) >> 28 if pages.numel() else 0
    if not 0 <= number < len(pools):
        raise ValueError(f"{op}: pages[0] names pool {number}, expected one of {len(pools)} pools")
    return pools[number]


def rotate(x: Tensor, inverse: bool = False, *, out: Tensor | None = None, threads: int | None = None) -> Tensor:
    """R x over the last dimension: signs, Walsh-Hadamard, and a mix where D is no power of two. Returns f32 [..., D].

    x         f32 [..., D], contiguous; D a multiple of 16 in 32..512
    inverse   R is orthonormal; its inverse is its transpose
    out       like x; may be x
    """
    result = torch.empty_like(x) if out is None else out
    if not x.dim() or result.shape != x.shape:
        raise ValueError(f"rotate: out is {list(result.shape)}, x is {list(x.shape)}, expected [..., D] twice")
    if not x.is_contiguous() or not result.is_contiguous():
        raise ValueError(f"rotate: strides of x, out are {x.stride()}, {result.stride()}, expected contiguous")
    if x.numel():
        source, target = (view("rotate", n, t.view(-1, x.shape[-1])) for n, t in (("x", x), ("out", result)))
        _C.rotate(source, target, inverse, thread_count("rotate", threads))
    return result


def quantize(
    moves: Tensor,
    pools: Sequence[Pool],
    centre: Tensor | None = None,
    row_of: Tensor | None = None,
    *,
    threads: int | None = None,
) -> None:
    """Encodes tokens into slots of quantized pages: from full pages, or from quantized pages of more bits.

    moves    i32 [n, 4] (source page, slot, destination page, slot), contiguous; a page of -1 skips the move. The moves
             into one page follow each other, no slot is written twice, no page is both read and written
    centre   f32 [R, D] subtracted from the keys of full pages before they are rotated; default none
    row_of   i32 [n] row of centre, with it

    Symmetric scheme, one bf16 scale per group of dimensions (`scale_groups`). Codes and scales have the same bits on every
    machine. Non-finite values make their groups' scale NaN. Positions move along; other slots keep their bytes.
    """
    _C.quantize(
        view("quantize", "moves", moves),
        native_pools("quantize", pools),
        maybe_view("quantize", "centre", centre),
        maybe_view("quantize", "row_of", row_of),
        thread_count("quantize", threads),
    )


def dequantize(
    pages: Tensor,
    pools: Sequence[Pool],
    centre: Tensor | None = None,
    row_of: Tensor | None = None,
    *,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """k, v f32 [P, 16, D] of whole pages, rotated back: for tests and debugging. Full pages are only widened.

    pages    i32 [P], none of them -1, of any formats
    centre   f32 [R, D] as `quantize` took it; default none
    row_of   i32 [P] row of centre, with it
    """
    shape = (pages.numel(), SLOTS, _pool_of("dequantize", pages, pools).head_dim)
    k, v = (torch.empty(shape, device=pages.device) for _ in range(2))
    _C.dequantize(
        view("dequantize", "pages", pages),
        view("dequantize", "k", k),
        view("dequantize", "v", v),
        native_pools("dequantize", pools),
        maybe_view("dequantize", "centre", centre),
        maybe_view("dequantize", "row_of", row_of),
        thread_count("dequantize", threads),
    )
    return k, v


def compact(moves: Tensor, pools: Sequence[Pool], *, threads: int | None = None) -> None:
    """Copies slots between pages of one format, any format: elements or codes, scales and positions, bytes only.

    moves    i32 [n, 4] (source page, slot, destination page, slot), as in `quantize`
    """
    native = native_pools("compact", pools)
    _C.compact(view("compact", "moves", moves), native, thread_count("compact", threads))
