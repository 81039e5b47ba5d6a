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
from kvstrata.formats import compact, dequantize, pack, quantize, rotate, unpack
from kvstrata.pools import (
    FORMATS,
    QUANTIZED,
    SLOTS,
    Pool,
    device_number,
    host_view,
    make_page,
    maybe_view,
    native_pools,
    on_host,
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
from kvstrata.summaries import (
    GROUP_PAGES,
    cluster,
    cluster_greedy,
    estimate,
    score_pages,
    select,
    summarize,
    summarize_groups,
    summary_bytes,
)

__all__ = [
    "FORMATS", "GROUP_PAGES", "QUANTIZED", "SLOTS", "Pool", "Reduce", "Spread", "Stats", "accumulate", "append", "attend",
    "attend_workspace_bytes", "choose_chunks", "choose_states", "chunk_order", "cluster", "cluster_greedy", "compact",
    "dequantize", "estimate", "make_page", "mass", "measure", "merge", "pack", "page_bytes", "pool", "quantize", "rotate",
    "scale_groups", "score_keys", "score_max", "score_pages", "score_window", "score_window_workspace_bytes", "select",
    "summarize", "summarize_groups", "summary_bytes", "unpack",
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
    position   i32 [R] position of token 0; token t has position + t. From a device it is fetched first, unless T = 1

    Dimensions up to the next multiple of 16 become zero. Slots that are not named keep their bytes. No two tokens of a
    call may name the same slot, a row's tokens of one page follow each other, and rows do not share pages.
    """
    native = native_pools("append", pools)
    one = k.dim() == 3 and k.shape[1] == 1 and device_number("append", "position", position) > 0
    here = position if one else on_host("append", "position", position)
    _C.append(
        view("append", "k", k),
        view("append", "v", v),
        view("append", "pages", pages),
        view("append", "slots", slots),
        native,
        (view if one else host_view)("append", "position", here),
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
