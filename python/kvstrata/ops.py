"""The ops on torch tensors: thin, checked, typed.

Letters: R rows (one sequence and KV head each), G query heads per KV head, T queries or tokens of this call, K page-list
entries per row, D head dimension, P pages; a page has 16 slots. Every op checks its arguments before it writes anything
and raises ValueError with the op, the argument, what was expected and what was given. All work is deterministic: bits
depend neither on the number of threads nor on which rows share a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kvstrata import _C
from kvstrata.choices import choose_chunks, choose_states, chunk_order
from kvstrata.pools import (
    FORMATS,
    QUANTIZED,
    SLOTS,
    Pool,
    host_view,
    make_page,
    maybe_view,
    native_pools,
    page_bytes,
    scale_groups,
    thread_count,
    view,
)
from kvstrata.scores import (
    Spread,
    Stats,
    accumulate,
    measure,
    pool,
    score_keys,
    score_max,
    score_window,
    score_window_workspace_bytes,
)
from kvstrata.summaries import cluster, cluster_greedy, estimate, score_pages, select, summarize, summary_bytes

__all__ = [
    "FORMATS", "QUANTIZED", "SLOTS", "Pool", "Reduce", "Spread", "Stats", "accumulate", "append", "attend",
    "attend_workspace_bytes", "choose_chunks", "choose_states", "chunk_order", "cluster", "cluster_greedy", "compact",
    "dequantize", "estimate", "make_page", "mass", "measure", "merge", "pack", "page_bytes", "pool", "quantize", "rotate",
    "scale_groups", "score_keys", "score_max", "score_pages", "score_window", "score_window_workspace_bytes", "select",
    "summarize", "summary_bytes", "unpack",
]  # fmt: skip

Reduce = Literal["sum", "mean", "max"]
_REDUCE: dict[str, int] = {"sum": 0, "mean": 1, "max": 2}


def append(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slots: Tensor,
    pools: Sequence[Pool],
    position: Tensor,
    *,
    threads: int | None = None,
) -> None:
    """Writes tokens into slots of pages, and their positions beside them.

    k, v       [R, T, D] f32, bf16 or f16, any strides over R and T; converted to the page's format by rounding to nearest
               even, or copied bit for bit where the types are equal
    pages      i32 [R, T] destination page, -1 skips the token
    slots      u8 [R, T] destination slot, 0 to 15
    position   i32 [R] position of token 0; token t has position + t. From a device it is fetched first

    Dimensions up to the next multiple of 16 become zero. Slots that are not named keep their bytes. No two tokens of a
    call may name the same slot, a row's tokens of one page follow each other, and rows do not share pages.
    """
    native = native_pools("append", pools)
    start = position.cpu() if isinstance(position, Tensor) else position
    _C.append(
        view("append", "k", k),
        view("append", "v", v),
        view("append", "pages", pages),
        view("append", "slots", slots),
        native,
        host_view("append", "position", start),
        thread_count("append", threads),
    )


def attend(
    q: Tensor,
    pages: Tensor,
    pools: Sequence[Pool],
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    centre: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    own: Tensor | None = None,
    tree: Tensor | None = None,
    window: int = 0,
    q_pos: Tensor | None = None,
    out: Tensor | None = None,
    want_mass: bool = False,
    want_logits: Tensor | bool | None = None,
    workspace: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, ...]:
    """Attention of each row's queries over its list of pages. Returns (out, lse[, mass][, logits]).

    q            [R, G, D] or [R, T, G, D] f32, bf16 or f16, any strides over R, T and G
    pages        i32 [R, K] page ids in order, of any formats; -1 is skipped. Quantized: D a multiple of 16 in 32..512
    scale        of q.k; default 1 / sqrt(D)
    visible      u16 [R, K] bit i: slot i may be read; default all. An entry with no bit is not looked at
    bias         f32 [R, K, 16] added to the logits (log n: a slot that stands for n tokens)
    centre       f32 [R, D] what `quantize` took off the keys of the row's quantized pages; default none
    softcap      z = softcap * tanh(z / softcap) before the bias; 0: none
    sinks        f32 [R, G] logits without a value; pass them in one of several calls that are merged
    own          i32 [R] the last `own` visible slots are this call's tokens in order: query t sees own tokens 0..t.
                 From a device it is fetched first
    tree         u64 or i64 [R, T] instead: query t sees own token j where bit j is set (own <= 64)
    window       > 0: only slots with q_pos - position < window are read; needs
    q_pos        i32 [R, T] positions of the queries
    out          like q, f32, bf16 or f16; default q's dtype. Parts that will be merged want f32
    want_mass    also f32 [R, K, 16]: sum over G and T of exp(z - lse), with this call's lse
    want_logits  f32 [R, G, T, K, 16] to receive z, -inf where unread, or True to have it allocated
    workspace    uint8 of at least `attend_workspace_bytes`, 64-byte aligned, reusable between calls
    threads      default torch.get_num_threads()

    lse is f32 with out's leading shape, natural log. Nothing visible: out 0, lse -inf (or the sink). Sums in f32, over
    codes in whole numbers: logits of quantized pages, without softcap, have the same bits at every instruction set.
    """
    if q.dim() not in (3, 4):
        raise ValueError(f"attend: q is {list(q.shape)}, expected [R, G, D] or [R, T, G, D]")
    q4 = q if q.dim() == 4 else q.unsqueeze(1)
    queries, group, dim = q4.shape[1:]
    if out is not None and out.dim() != q.dim():
        raise ValueError(f"attend: out is {list(out.shape)}, expected {list(q.shape)} (as q)")
    result = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    count = thread_count("attend", threads)
    entries = pages.shape[1] if pages.dim() == 2 else 0
    logits = want_logits if isinstance(want_logits, Tensor) else None
    if logits is None and (want_logits or want_mass):
        logits = torch.empty(q4.shape[0], group, queries, entries, SLOTS, dtype=torch.float32, device=q.device)
    if workspace is None:
        workspace = torch.empty(attend_workspace_bytes(q, entries, threads=count), dtype=torch.uint8, device=q.device)
    here = own.cpu() if isinstance(own, Tensor) else own
    tensors: _C.AttendTensors = {
        "q": view("attend", "q", q4),
        "pages": view("attend", "pages", pages),
        "visible": maybe_view("attend", "visible", visible),
        "bias": maybe_view("attend", "bias", bias),
        "centre": maybe_view("attend", "centre", centre),
        "sinks": maybe_view("attend", "sinks", sinks),
        "own": None if here is None else host_view("attend", "own", here),
        "tree": maybe_view("attend", "tree", tree),
        "q_pos": maybe_view("attend", "q_pos", q_pos),
        "out": view("attend", "out", result if q.dim() == 4 else result.unsqueeze(1)),
        "lse": view("attend", "lse", lse if q.dim() == 4 else lse.unsqueeze(1)),
        "want_logits": maybe_view("attend", "logits", logits),
        "workspace": view("attend", "workspace", workspace),
    }
    factor = 1.0 / math.sqrt(max(dim, 1)) if scale is None else scale
    _C.attend(tensors, native_pools("attend", pools), factor, softcap, window, count)
    results = [result, lse]
    if want_mass and logits is not None:
        results.append(mass(logits, lse, threads=count))
    if want_logits is not None and want_logits is not False and logits is not None:
        results.append(logits)
    return tuple(results)


def attend_workspace_bytes(q: Tensor, entries: int, *, threads: int | None = None) -> int:
    """Bytes that `attend` needs for these queries, where they lie, over lists of up to `entries` entries; grows with each."""
    queries = q.shape[1] if q.dim() == 4 else 1
    count, device = thread_count("attend", threads), view("attend", "q", q)[4]
    return _C.attend_workspace_bytes(q.shape[0], queries, q.shape[-2], q.shape[-1], entries, count, device)


def merge(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Joins partial results by their log-sum-exp, in the order given. Returns (out, lse).

    outs   f32 [..., D] each, contiguous
    lses   f32 [...] each, contiguous
    out    [..., D] f32, bf16 or f16, contiguous; default f32. May be outs[0]
    lse    f32 [...]; may be lses[0]

    A part with lse = -inf takes no part, whatever its out holds. Only such parts: out 0, lse -inf.
    """
    if not outs:
        raise ValueError("merge: outs has 0 parts, expected at least 1")
    shape = outs[0].shape
    if not shape:
        raise ValueError("merge: outs[0] is [], expected [..., D]")
    for i, part in enumerate(outs):
        if part.shape != shape:
            raise ValueError(f"merge: outs[{i}] is {list(part.shape)}, expected {list(shape)} (set by outs[0])")
    for i, part in enumerate(lses):
        if part.shape != shape[:-1]:
            raise ValueError(f"merge: lses[{i}] is {list(part.shape)}, expected {list(shape[:-1])} (set by outs[0])")
    joined = torch.empty(shape, dtype=torch.float32, device=outs[0].device) if out is None else out
    weight = torch.empty(shape[:-1], dtype=torch.float32, device=outs[0].device) if lse is None else lse
    for name, t, expected in (("out", joined, shape), ("lse", weight, shape[:-1])):
        if t.shape != expected:
            raise ValueError(f"merge: {name} is {list(t.shape)}, expected {list(expected)} (set by outs[0])")

    def flat(name: str, t: Tensor, dims: int) -> _C.Tensor:
        if not t.is_contiguous():
            raise ValueError(f"merge: {name} has strides {list(t.stride())}, expected contiguous")
        n = math.prod(shape[:-1])
        return view("merge", name, t.view(n, shape[-1]) if dims == 2 else t.view(n))

    _C.merge(
        [flat(f"outs[{i}]", t, 2) for i, t in enumerate(outs)],
        [flat(f"lses[{i}]", t, 1) for i, t in enumerate(lses)],
        flat("out", joined, 2),
        flat("lse", weight, 1),
        thread_count("merge", threads),
    )
    return joined, weight


def mass(
    logits: Tensor, lse: Tensor, reduce: Reduce = "sum", *, out: Tensor | None = None, threads: int | None = None
) -> Tensor:
    """Attention mass per slot: exp(z - lse) reduced over G and T (g outer, t inner). Returns f32 [R, K, 16].

    logits   f32 [R, G, T, K, 16] as `attend` wrote them, contiguous
    lse      f32 [R, T, G] or, for T = 1, [R, G]: the log-sum-exp after the last merge
    reduce   sum, mean (over G * T) or max
    """
    if reduce not in _REDUCE:
        raise ValueError(f"mass: reduce is {reduce!r}, expected one of {', '.join(_REDUCE)}")
    if logits.dim() != 5:
        raise ValueError(f"mass: logits is {list(logits.shape)}, expected [R, G, T, K, 16]")
    rows, group, queries, entries = logits.shape[:4]
    by_query = lse.unsqueeze(1) if lse.dim() == 2 else lse
    if by_query.shape != (rows, queries, group):
        raise ValueError(f"mass: lse is {list(lse.shape)}, expected [R={rows}, T={queries}, G={group}] (set by logits)")
    shape = rows, entries, SLOTS
    result = torch.empty(shape, dtype=torch.float32, device=logits.device) if out is None else out
    by_head = by_query.transpose(1, 2).contiguous()
    _C.mass(
        view("mass", "logits", logits),
        view("mass", "lse", by_head),
        view("mass", "out", result),
        _REDUCE[reduce],
        thread_count("mass", threads),
    )
    return result


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
