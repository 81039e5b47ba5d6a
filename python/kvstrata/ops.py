"""The ops on torch tensors: thin, checked, typed.

Letters: R rows (one sequence and KV head each), G query heads per KV head, T queries or tokens of this call, K page-list
entries per row, D head dimension, P pages; a page has 16 slots. Every op checks its arguments before it writes anything
and raises ValueError with the op, the argument, what was expected and what was given. All work is deterministic: bits
depend neither on the number of threads nor on which rows share a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvstrata import _C

SLOTS = 16
FORMATS: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Reduce = Literal["sum", "mean", "max"]

_POSITION_BYTES = SLOTS * 4
_REDUCE: dict[str, int] = {"sum": 0, "mean": 1, "max": 2}
_FORMAT_CODE = {"f32": 0, "bf16": 1, "f16": 2}
_DTYPE_CODE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.uint16: 4,
    torch.int32: 5,
    torch.int64: 6,
    torch.uint64: 7,
}


def make_page(pool: int, slab: int, index: int) -> int:
    """The i32 page id: 3 bits pool, 12 bits slab, 16 bits page in the slab. -1 means "skip"."""
    for name, value, limit in (("pool", pool, 8), ("slab", slab, 4096), ("index", index, 65536)):
        if not 0 <= value < limit:
            raise ValueError(f"make_page: {name} is {value}, expected 0 to {limit - 1}")
    return pool << 28 | slab << 16 | index


def page_bytes(format: str, head_dim: int) -> int:
    """Bytes of one page's payload. ValueError for an unknown format or a head_dim outside 1..512."""
    if format not in _FORMAT_CODE:
        raise ValueError(f"page_bytes: format is {format!r}, expected one of {', '.join(_FORMAT_CODE)}")
    return _C.page_bytes(_FORMAT_CODE[format], head_dim)


@dataclass(frozen=True)
class Pool:
    """Pages of one format. Its place in the `pools` of a call is the pool number of its page ids.

    A slab is one uint8 tensor, 64-byte aligned: the payload of its pages, then their slots' positions (i32 [pages, 16]).
    """

    format: str
    head_dim: int
    slabs: tuple[Tensor, ...]
    pages: tuple[int, ...]  # of each slab

    @classmethod
    def allocate(cls, format: str, head_dim: int, pages: int, slabs: int = 1) -> Pool:
        """A pool of `slabs` slabs of `pages` pages each, contents undefined."""
        if not 0 <= pages <= 65536:
            raise ValueError(f"Pool.allocate: pages is {pages}, expected 0 to 65536")
        size = pages * (page_bytes(format, head_dim) + _POSITION_BYTES)
        memory = tuple(torch.empty(size, dtype=torch.uint8) for _ in range(slabs))
        return cls(format, head_dim, memory, (pages,) * slabs)

    @property
    def stride(self) -> int:
        """Bytes from one page to the next."""
        return page_bytes(self.format, self.head_dim)

    def payload(self, slab: int = 0) -> Tensor:
        """The pages of a slab as bytes: uint8 [pages, stride], a view."""
        return self.slabs[slab][: self.pages[slab] * self.stride].view(self.pages[slab], self.stride)

    def positions(self, slab: int = 0) -> Tensor:
        """The positions of a slab's slots: i32 [pages, 16], a view."""
        return self.slabs[slab][self.pages[slab] * self.stride :].view(torch.int32).view(self.pages[slab], SLOTS)

    def native(self) -> _C.Pool:
        """This pool as the native core takes it."""
        stride = self.stride
        slabs = []
        for i, (memory, pages) in enumerate(zip(self.slabs, self.pages, strict=True)):
            needed = pages * (stride + _POSITION_BYTES)
            if memory.dtype != torch.uint8 or memory.numel() < needed or not memory.is_contiguous():
                raise ValueError(
                    f"Pool: slab {i} is {memory.dtype} {list(memory.shape)}, expected contiguous torch.uint8 of at least"
                    f" [{needed}] ({pages} pages)"
                )
            slabs.append((memory.data_ptr(), pages, memory.data_ptr() + pages * stride))
        return _FORMAT_CODE[self.format], self.head_dim, stride, slabs


def _native(op: str, pools: Sequence[Pool]) -> list[_C.Pool]:
    for i, pool in enumerate(pools):
        for slab in pool.slabs:
            if slab.device.type != "cpu":
                raise ValueError(f"{op}: pools[{i}] is on {slab.device}, expected cpu")
    return [pool.native() for pool in pools]


def _view(op: str, name: str, t: Tensor) -> _C.Tensor:
    if not isinstance(t, Tensor):
        raise ValueError(f"{op}: {name} is a {type(t).__name__}, expected a tensor")
    if t.device.type != "cpu":
        raise ValueError(f"{op}: {name} is on {t.device}, expected cpu")
    if t.dtype not in _DTYPE_CODE:
        raise ValueError(f"{op}: {name} has dtype {t.dtype}, expected one of {', '.join(map(str, _DTYPE_CODE))}")
    return t.data_ptr(), tuple(t.shape), t.stride(), _DTYPE_CODE[t.dtype], 0


def _maybe(op: str, name: str, t: Tensor | None) -> _C.Tensor | None:
    return None if t is None else _view(op, name, t)


def _threads(op: str, threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise ValueError(f"{op}: threads is {threads}, expected at least 1")
    return threads


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
    position   i32 [R] position of token 0; token t has position + t

    Dimensions up to the next multiple of 16 become zero. Slots that are not named keep their bytes. No two tokens of a
    call may name the same slot, a row's tokens of one page follow each other, and rows do not share pages.
    """
    native = _native("append", pools)
    _C.append(
        _view("append", "k", k),
        _view("append", "v", v),
        _view("append", "pages", pages),
        _view("append", "slots", slots),
        native,
        _view("append", "position", position),
        _threads("append", threads),
    )


def attend(
    q: Tensor,
    pages: Tensor,
    pools: Sequence[Pool],
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
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
    pages        i32 [R, K] page ids in order; -1 is skipped
    scale        of q.k; default 1 / sqrt(D)
    visible      u16 [R, K] bit i: slot i may be read; default all. An entry with no bit is not looked at
    bias         f32 [R, K, 16] added to the logits (log n: a slot that stands for n tokens)
    softcap      z = softcap * tanh(z / softcap) before the bias; 0: none
    sinks        f32 [R, G] logits without a value; pass them in one of several calls that are merged
    own          i32 [R] the last `own` visible slots are this call's tokens in order: query t sees own tokens 0..t
    tree         u64 or i64 [R, T] instead: query t sees own token j where bit j is set (own <= 64)
    window       > 0: only slots with q_pos - position < window are read; needs
    q_pos        i32 [R, T] positions of the queries
    out          like q, f32, bf16 or f16; default q's dtype. Parts that will be merged want f32
    want_mass    also f32 [R, K, 16]: sum over G and T of exp(z - lse), with this call's lse
    want_logits  f32 [R, G, T, K, 16] to receive z, -inf where unread, or True to have it allocated
    workspace    uint8 of at least `attend_workspace_bytes`, 64-byte aligned, reusable between calls
    threads      default torch.get_num_threads()

    lse is f32 with out's leading shape, natural log. Nothing visible: out 0, lse -inf (or the sink). All sums in f32.
    """
    if q.dim() not in (3, 4):
        raise ValueError(f"attend: q is {list(q.shape)}, expected [R, G, D] or [R, T, G, D]")
    q4 = q if q.dim() == 4 else q.unsqueeze(1)
    queries, group, dim = q4.shape[1:]
    if out is not None and out.dim() != q.dim():
        raise ValueError(f"attend: out is {list(out.shape)}, expected {list(q.shape)} (as q)")
    result = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    lse = torch.empty(q.shape[:-1], dtype=torch.float32)
    count = _threads("attend", threads)
    entries = pages.shape[1] if pages.dim() == 2 else 0
    logits = want_logits if isinstance(want_logits, Tensor) else None
    if logits is None and (want_logits or want_mass):
        logits = torch.empty(q4.shape[0], group, queries, entries, SLOTS, dtype=torch.float32)
    if workspace is None:
        workspace = torch.empty(attend_workspace_bytes(q, entries, threads=count), dtype=torch.uint8)
    tensors: _C.AttendTensors = {
        "q": _view("attend", "q", q4),
        "pages": _view("attend", "pages", pages),
        "visible": _maybe("attend", "visible", visible),
        "bias": _maybe("attend", "bias", bias),
        "sinks": _maybe("attend", "sinks", sinks),
        "own": _maybe("attend", "own", own),
        "tree": _maybe("attend", "tree", tree),
        "q_pos": _maybe("attend", "q_pos", q_pos),
        "out": _view("attend", "out", result if q.dim() == 4 else result.unsqueeze(1)),
        "lse": _view("attend", "lse", lse if q.dim() == 4 else lse.unsqueeze(1)),
        "want_logits": _maybe("attend", "logits", logits),
        "workspace": _view("attend", "workspace", workspace),
    }
    factor = 1.0 / math.sqrt(max(dim, 1)) if scale is None else scale
    _C.attend(tensors, _native("attend", pools), factor, softcap, window, count)
    results = [result, lse]
    if want_mass and logits is not None:
        results.append(mass(logits, lse, threads=count))
    if want_logits is not None and want_logits is not False and logits is not None:
        results.append(logits)
    return tuple(results)


def attend_workspace_bytes(q: Tensor, entries: int, *, threads: int | None = None) -> int:
    """Bytes that `attend` needs for these queries over lists of up to `entries` entries; grows with each of its inputs."""
    queries = q.shape[1] if q.dim() == 4 else 1
    count = _threads("attend", threads)
    return _C.attend_workspace_bytes(q.shape[0], queries, q.shape[-2], q.shape[-1], entries, count)


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
    joined = torch.empty(shape, dtype=torch.float32) if out is None else out
    weight = torch.empty(shape[:-1], dtype=torch.float32) if lse is None else lse
    for name, t, expected in (("out", joined, shape), ("lse", weight, shape[:-1])):
        if t.shape != expected:
            raise ValueError(f"merge: {name} is {list(t.shape)}, expected {list(expected)} (set by outs[0])")

    def flat(name: str, t: Tensor, dims: int) -> _C.Tensor:
        if not t.is_contiguous():
            raise ValueError(f"merge: {name} has strides {list(t.stride())}, expected contiguous")
        n = math.prod(shape[:-1])
        return _view("merge", name, t.view(n, shape[-1]) if dims == 2 else t.view(n))

    _C.merge(
        [flat(f"outs[{i}]", t, 2) for i, t in enumerate(outs)],
        [flat(f"lses[{i}]", t, 1) for i, t in enumerate(lses)],
        flat("out", joined, 2),
        flat("lse", weight, 1),
        _threads("merge", threads),
    )
    return joined, weight


def mass(
    logits: Tensor,
    lse: Tensor,
    reduce: Reduce = "sum",
    *,
    out: Tensor | None = None,
    threads: int | None = None,
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
    result = torch.empty(rows, entries, SLOTS, dtype=torch.float32) if out is None else out
    by_head = by_query.transpose(1, 2).contiguous()
    _C.mass(
        _view("mass", "logits", logits),
        _view("mass", "lse", by_head),
        _view("mass", "out", result),
        _REDUCE[reduce],
        _threads("mass", threads),
    )
    return result


def pack(k: Tensor, v: Tensor, pages: Tensor, pools: Sequence[Pool], *, threads: int | None = None) -> None:
    """Writes whole pages from canonical k, v [P, 16, D], contiguous, of the pages' own type. Bytes only, lossless.

    pages    i32 [P], none of them -1. Positions are not touched.
    """
    native = _native("pack", pools)
    views = _view("pack", "pages", pages), _view("pack", "k", k), _view("pack", "v", v)
    _C.pack(*views, native, _threads("pack", threads))


def unpack(
    pages: Tensor,
    pools: Sequence[Pool],
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The canonical k, v [P, 16, D] of whole pages, in the pages' own type: the inverse of `pack`.

    pages    i32 [P], none of them -1, all of one format
    """
    if k is None or v is None:
        number = int(pages[0]) >> 28 if pages.numel() else 0
        if not 0 <= number < len(pools):
            raise ValueError(f"unpack: pages[0] names pool {number}, expected one of {len(pools)} pools")
        pool = pools[number]
        shape = (pages.numel(), SLOTS, pool.head_dim)
        k = torch.empty(shape, dtype=FORMATS[pool.format]) if k is None else k
        v = torch.empty(shape, dtype=FORMATS[pool.format]) if v is None else v
    native = _native("unpack", pools)
    views = _view("unpack", "pages", pages), _view("unpack", "k", k), _view("unpack", "v", v)
    _C.unpack(*views, native, _threads("unpack", threads))
    return k, v
