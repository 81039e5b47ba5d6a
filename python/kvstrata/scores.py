"""The ops that rank stored tokens: what window queries saw, what keys look like, and the statistics over both.

Part of `ops`, which has the letters. W window queries: a row's last ones. Scores are f32, higher is kept; slots that are
hidden or of no page score 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kvstrata import _C
from kvstrata.pools import (
    SLOTS,
    Pool,
    device_number,
    host_view,
    maybe_view,
    native_pools,
    on_host,
    thread_count,
    view,
)

Spread = Literal["none", "variance", "std"]
Stats = Literal["sound", "code"]

SPREAD: dict[str, int] = {"none": 0, "variance": 1, "std": 2}
STATS: dict[str, int] = {"sound": 0, "code": 1}
POOL: dict[str, int] = {"avg": 0, "max": 1}
DIVIDE: dict[str, int] = {"present": 0, "kernel": 1}
COMBINE: dict[str, int] = {"sum": 0, "max": 1}
KEYS: dict[str, int] = {"norm": 0, "diversity": 1}


def _code(op: str, name: str, value: str, known: dict[str, int]) -> int:
    if value not in known:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(known)}")
    return known[value]


def _window_tensors(
    op: str,
    q: Tensor,
    pages: Tensor,
    q_pos: Tensor | None,
    queries: Tensor | None,
    visible: Tensor | None,
    centre: Tensor | None,
    sinks: Tensor | None,
    workspace: Tensor,
) -> _C.WindowTensors:
    return {
        "q": view(op, "q", q),
        "pages": view(op, "pages", pages),
        "q_pos": maybe_view(op, "q_pos", q_pos),
        "queries": None if queries is None else host_view(op, "queries", queries),
        "visible": maybe_view(op, "visible", visible),
        "centre": maybe_view(op, "centre", centre),
        "sinks": maybe_view(op, "sinks", sinks),
        "workspace": view(op, "workspace", workspace),
    }


def _window_shape(op: str, q: Tensor, pages: Tensor) -> tuple[int, int, int, int, int]:
    """R, W, G, D, K."""
    if q.dim() != 4:
        raise ValueError(f"{op}: q is {list(q.shape)}, expected [R, W, G, D]")
    if pages.dim() != 2:
        raise ValueError(f"{op}: pages is {list(pages.shape)}, expected [R, K]")
    rows, width, group, dim = q.shape
    return rows, width, group, dim, pages.shape[1]


def score_window(
    q: Tensor,
    pages: Tensor,
    pools: Sequence[Pool],
    *,
    spread: Spread = "none",
    weight: float = 0.0,
    q_pos: Tensor | None = None,
    queries: Tensor | None = None,
    visible: Tensor | None = None,
    centre: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    window: int = 0,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What window queries saw of each stored slot. Returns (score f32 [R, G, K, 16], lse f32 [R, G, W]).

    q          [R, W, G, D] f32, bf16 or f16, any strides over R, W and G; W at most 256
    pages      i32 [R, K] page ids of any formats; -1 is skipped
    spread     none: mean_t A.  variance: mean + weight * unbiased var_t A (ARKV, where weight is gamma).  std: mean +
               weight * its square root. 0 for a row of one query
    q_pos      i32 [R, W] positions of the queries: slots of later positions are not read; default: all are earlier
    queries    i32 [R] row r has only the first queries[r] of the W; 0: its scores are zeros. Default W. The others' lse
               is -inf. Read on the CPU: a tensor on CUDA is waited for
    visible    u16 [R, K] as in `attend`
    centre     f32 [R, D] of the keys of quantized pages; default none
    scale, softcap, sinks, window    as in `attend`; sinks count in lse, a window needs q_pos
    out        f32 [R, G, K, 16], any strides over R and G
    workspace  uint8 of at least `score_window_workspace_bytes`, 64-byte aligned

    A = exp(z - lse) with the lse over every slot that the query may read. Two passes; memory is bounded by W and the
    number of threads (CUDA: of queries), not by the length of a row but for a float per 512 slots and query.
    """
    op = "score_window"
    rows, width, group, dim, entries = _window_shape(op, q, pages)
    count, native = thread_count(op, threads), native_pools(op, pools)
    queries = None if queries is None else on_host(op, "queries", queries)
    score = torch.empty(rows, group, entries, SLOTS, device=q.device) if out is None else out
    lse = torch.full((rows, group, width), -math.inf, device=q.device)
    if workspace is None:
        *_, dtype, device, _ = view(op, "q", q)
        size = _C.score_window_workspace_bytes(rows, width, group, dim, entries, count, device, dtype, native)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    tensors: _C.ScoreTensors = {
        **_window_tensors(op, q, pages, q_pos, queries, visible, centre, sinks, workspace),
        "score": view(op, "out", score),
        "lse": view(op, "lse", lse),
    }
    factor = 1.0 / math.sqrt(max(dim, 1)) if scale is None else scale
    kind = _code(op, "spread", spread, SPREAD)
    _C.score_window(tensors, native, factor, softcap, window, kind, weight, count)
    return score, lse


def score_window_workspace_bytes(q: Tensor, entries: int, *, threads: int | None = None) -> int:
    """Bytes for these queries over lists of up to `entries` entries of any formats; grows with each of its inputs."""
    op, (rows, width, group, dim) = "score_window_workspace_bytes", q.shape
    *_, dtype, device, _ = view(op, "q", q)
    count = thread_count(op, threads)
    return _C.score_window_workspace_bytes(rows, width, group, dim, entries, count, device, dtype, None)


def score_max(
    q: Tensor,
    lse: Tensor,
    spans: Tensor,
    pages: Tensor,
    pools: Sequence[Pool],
    *,
    visible: Tensor | None = None,
    centre: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """The most that a query of each span saw of each stored slot. Returns f32 [E, R, K, 16].

    exp(max over g, and t in span e, of z - lse), of E spans of W queries in all (after EpiCache, arXiv 2509.17396, whose code
    normalises over the stored slots alone).

    q        [R, G, W, D] f32, bf16 or f16, any strides over R, G and W; any W
    lse      f32 [R, G, W] of all that each query read, its own span too, which is not stored; any strides over R and G. -inf:
             the query saw nothing and takes no part
    spans    i32 [E + 1] rising from 0 or more to at most W: span e is queries spans[e] to spans[e + 1], none: zeros
    pages    i32 [R, K] of any formats
    visible, centre, scale, softcap    as in `score_window`
    out      f32 [E, R, K, 16], any strides over E and R

    A NaN in q or lse shows in all its span and row, one in a slot in this slot of its row. Keys are read once for all spans;
    memory depends on D and threads alone, on CUDA on R * G * W * D up to 64 MiB. What `spans` says is checked on the CPU only.
    """
    op = "score_max"
    if q.dim() != 4:
        raise ValueError(f"{op}: q is {list(q.shape)}, expected [R, G, W, D]")
    if pages.dim() != 2:
        raise ValueError(f"{op}: pages is {list(pages.shape)}, expected [R, K]")
    if spans.dim() != 1 or len(spans) < 2:
        raise ValueError(f"{op}: spans is {list(spans.shape)}, expected [E + 1] with E at least 1")
    count, dim = thread_count(op, threads), q.shape[3]
    rows, group, width, _ = q.shape
    result = torch.empty(len(spans) - 1, *pages.shape, SLOTS, device=q.device) if out is None else out
    size = _C.score_max_workspace_bytes(dim, count, rows, group, width, device_number(op, "q", q))
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    tensors: _C.MaxTensors = {
        "q": view(op, "q", q),
        "lse": view(op, "lse", lse),
        "spans": view(op, "spans", spans),
        "pages": view(op, "pages", pages),
        "visible": maybe_view(op, "visible", visible),
        "centre": maybe_view(op, "centre", centre),
        "out": view(op, "out", result),
        "workspace": view(op, "workspace", workspace),
    }
    factor = 1.0 / math.sqrt(max(dim, 1)) if scale is None else scale
    _C.score_max(tensors, native_pools(op, pools), factor, softcap, count)
    return result


def measure(
    q: Tensor,
    pages: Tensor,
    pools: Sequence[Pool],
    q_pos: Tensor,
    *,
    stats: Stats = "sound",
    skip: int = 0,
    queries: Tensor | None = None,
    visible: Tensor | None = None,
    centre: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    window: int = 0,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Entropy, variance and kurtosis of the window queries' attention to the past. Returns f32 [R, G, 3].

    The past: visible slots older than the row's oldest window query. After ARKV (arXiv 2603.08727).

    stats   sound: shares p of the past alone, without positions below `skip` (sinks); E in [0, 1] is the mean entropy
            over log n, V < 1 the part of the energy that moves between queries, K the kurtosis between queries, weighted
            by variance, 1 at its largest. Independent of length, batch and head count.
            code: sums as the public code has them; the sinks belong to them. Slower: a logarithm per query and slot
    skip    positions below it take no part (sound only)

    The rest as in `score_window`; `q_pos` is needed. No query or no past: zeros.
    """
    rows, width, group, dim, entries = _window_shape("measure", q, pages)
    count, native = thread_count("measure", threads), native_pools("measure", pools)
    queries = None if queries is None else on_host("measure", "queries", queries)
    result = torch.empty(rows, group, 3, device=q.device) if out is None else out
    *_, dtype, device, _ = view("measure", "q", q)
    size = _C.measure_workspace_bytes(rows, width, group, dim, entries, count, device, dtype, native)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    view("measure", "q_pos", q_pos)  # refuses None
    tensors: _C.MeasureTensors = {
        **_window_tensors("measure", q, pages, q_pos, queries, visible, centre, sinks, workspace),
        "out": view("measure", "out", result),
    }
    factor = 1.0 / math.sqrt(max(dim, 1)) if scale is None else scale
    which = _code("measure", "stats", stats, STATS)
    _C.measure(tensors, native, factor, softcap, window, which, skip, count)
    return result


def pool(
    score: Tensor,
    pages: Tensor,
    pools: Sequence[Pool],
    *,
    kernel: int = 5,
    kind: Literal["avg", "max"] = "avg",
    divide: Literal["present", "kernel"] = "present",
    visible: Tensor | None = None,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Scores of neighbourhoods, per query head, then their mean over G. Returns f32 [R, K, 16].

    score    f32 [R, G, K, 16], contiguous
    pages    i32 [R, K] of the pages whose positions say who is near
    kernel   odd; neighbours are the row's visible slots with |pos - pos_i| <= kernel // 2
    kind     avg or max over those present
    divide   of avg: by those present, or by `kernel` (a padded average pool)
    visible  u16 [R, K]

    Slots need not be in the order of their positions.
    """
    if score.dim() != 4:
        raise ValueError(f"pool: score is {list(score.shape)}, expected [R, G, K, 16]")
    count = thread_count("pool", threads)
    result = torch.empty(score.shape[0], *score.shape[2:], device=score.device) if out is None else out
    size = _C.pool_workspace_bytes(score.shape[0], score.shape[2], count, device_number("pool", "score", score))
    workspace = torch.empty(size, dtype=torch.uint8, device=score.device)
    _C.pool(
        view("pool", "score", score),
        view("pool", "pages", pages),
        maybe_view("pool", "visible", visible),
        view("pool", "out", result),
        view("pool", "workspace", workspace),
        native_pools("pool", pools),
        kernel,
        _code("pool", "kind", kind, POOL),
        _code("pool", "divide", divide, DIVIDE),
        count,
    )
    return result


def accumulate(
    score: Tensor,
    mass: Tensor,
    decay: float = 1.0,
    *,
    combine: Literal["sum", "max"] = "sum",
    threads: int | None = None,
) -> None:
    """score = decay * score + mass, or max(decay * score, mass), in place.

    score, mass   f32 of one shape, contiguous
    """
    if score.shape != mass.shape:
        raise ValueError(f"accumulate: mass is {list(mass.shape)}, expected {list(score.shape)} (as score)")
    for name, t in (("score", score), ("mass", mass)):
        if not t.is_contiguous():
            raise ValueError(f"accumulate: {name} has strides {t.stride()}, expected contiguous")
    _C.accumulate(
        view("accumulate", "score", score.view(-1)),
        view("accumulate", "mass", mass.view(-1)),
        decay,
        _code("accumulate", "combine", combine, COMBINE),
        thread_count("accumulate", threads),
    )


def score_keys(
    pages: Tensor,
    pools: Sequence[Pool],
    kind: Literal["norm", "diversity"],
    *,
    visible: Tensor | None = None,
    centre: Tensor | None = None,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Scores that need no query. Returns f32 [R, K, 16].

    pages    i32 [R, K] of any formats
    kind     norm: -|k|_2 (arXiv 2406.11430).  diversity: -cos(k, mean of the row's visible k / |k|) (KeyDiff, arXiv
             2504.15364), one anchor per row, never over several heads
    visible  u16 [R, K]
    centre   f32 [R, D] of the keys of quantized pages; default none
    """
    if pages.dim() != 2:
        raise ValueError(f"score_keys: pages is {list(pages.shape)}, expected [R, K]")
    if not pools:
        raise ValueError("score_keys: pools has 0 pools, expected at least 1")
    (rows, entries), dim, count = pages.shape, pools[0].head_dim, thread_count("score_keys", threads)
    code = _code("score_keys", "kind", kind, KEYS)
    result = torch.empty(rows, entries, SLOTS, device=pages.device) if out is None else out
    device = device_number("score_keys", "pages", pages)
    size = _C.score_keys_workspace_bytes(rows, dim, entries, code, count, device)
    workspace = torch.empty(size, dtype=torch.uint8, device=pages.device)
    _C.score_keys(
        view("score_keys", "pages", pages),
        maybe_view("score_keys", "visible", visible),
        maybe_view("score_keys", "centre", centre),
        view("score_keys", "out", result),
        view("score_keys", "workspace", workspace),
        native_pools("score_keys", pools),
        dim,
        code,
        count,
    )
    return result
