"""The ops of recall: keys that resemble each other to pages, what is known of a page without reading it, pages for a query.

Part of `ops`, which has the letters. T tokens of a segment, M entries of a row's page table in blocks of 16, K selected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
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

Aggregate = Literal["sum", "max"]
_AGGREGATE: dict[str, int] = {"sum": 0, "max": 1}
GROUP_PAGES = 32
"""Pages that follow each other of which one mean is made."""
LEAST_GROUPS = 4
"""Groups that are looked into however few there are."""
SummaryKind = Literal["mean", "bounds", "mean_value", "halves", "quarters"]
_KIND: dict[str, int] = {"mean": 0, "bounds": 1, "mean_value": 2, "halves": 3, "quarters": 4}


def summary_bytes(head_dim: int, kind: SummaryKind = "mean") -> int:
    """Bytes of a block of 16 summaries.

    mean        means u8 [D/4, 16, 4], then scale, spread and radius f32 [16] each
    bounds      lo bf16 [D, 16], hi bf16 [D, 16]
    mean_value  as mean, then value means u8 [16, D], their scale f32 [16], and the slots they were made from u32 [16]
    halves      means of two parts u4 [D/4, 16, 4, 2], scales and spreads bf16 [2, 16, 2], slots of parts u32 [16]
    quarters    means of four parts u4 [2, D/4, 16, 4, 2], scales and spreads bf16 [2, 2, 16, 2], slots of parts u32 [16]
    """
    return _C.summary_bytes(head_dim, _kind("summary_bytes", kind))


def cluster(
    keys: Tensor, live: Tensor | None = None, *, iters: int = 4, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pages of 16 keys that resemble each other. Returns (page_of i32 [R, T], pages i32 [R]).

    keys     f32 [R, T, D] contiguous, D 1..512, T up to 65,536
    live     bool [R, T]; default all. The others: page_of -1
    iters    assignments before the seats are given out

    Spherical k-means over the keys less their mean, seeds evenly spaced over the tokens, then exactly 16 seats to a page by
    bids (``csrc/ops/cluster.h``); ceil(live / 16) pages. Deterministic. Source: IceCache (arXiv 2604.10539) for pages by
    meaning; k-means as in RetroInfer (arXiv 2505.02922), balanced here.
    """
    return _cluster("cluster", keys, live, _C.cluster_workspace_bytes, _C.cluster, threads, iters)


def cluster_greedy(keys: Tensor, live: Tensor | None = None, *, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Pages of 16 keys that resemble each other, one page after the other. Returns (page_of i32 [R, T], pages i32 [R]).

    keys, live: as in `cluster`

    The seed of a page is the key farthest from the mean that has no page yet; with it go the 15 of largest inner product
    (``csrc/ops/cluster.h``). Time grows with T squared. Deterministic.
    """
    op = "cluster_greedy"
    return _cluster(op, keys, live, _C.cluster_greedy_workspace_bytes, _C.cluster_greedy, threads)


def _cluster(
    op: str,
    keys: Tensor,
    live: Tensor | None,
    workspace_bytes: Callable[..., int],
    native: Callable[..., None],
    threads: int | None,
    *more: int,
) -> tuple[Tensor, Tensor]:
    if isinstance(live, Tensor) and live.dtype != torch.bool:
        raise ValueError(f"{op}: live has dtype {live.dtype}, expected torch.bool")
    view(op, "keys", keys)  # refuses what is no tensor
    rows, tokens, dim = keys.shape if keys.dim() == 3 else (0, 0, 1)
    count, device = thread_count(op, threads), keys.device
    page_of = torch.empty(rows, tokens, dtype=torch.int32, device=device)
    pages = torch.empty(rows, dtype=torch.int32, device=device)
    size = workspace_bytes(rows, min(tokens, 1 << 16), dim, count, device_number(op, "keys", keys))
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    marks = None if live is None else live.contiguous().view(torch.uint8)
    native(
        view(op, "keys", keys),
        maybe_view(op, "live", marks),
        view(op, "page_of", page_of),
        view(op, "pages", pages),
        view(op, "workspace", workspace),
        *more,
        count,
    )
    return page_of, pages


def summarize(
    pages: Tensor,
    pools: Sequence[Pool],
    *,
    visible: Tensor | None = None,
    centre: Tensor | None = None,
    kind: SummaryKind = "mean",
    threads: int | None = None,
) -> Tensor:
    """What is known of pages without reading them. Returns blocks u8 [R, ceil(M / 16), summary_bytes(D, kind)].

    pages    i32 [R, M] of any formats, D a multiple of 16 in 32..512; -1: nothing is known. Pages and masks travel by value:
             those that lie on a device are waited for
    visible  u16 [R, M] slots that count; default all
    centre   f32 [R, D] what `quantize` took off the keys of the row's quantized pages; default none

    kind     mean: of each page the mean of its rotated keys in 8 bits with one scale, their mean variance per channel around
             it, and the distance of the farthest. bounds: the least and the largest value of its keys in every channel,
             not rotated, in bf16 rounded outwards (Quest, arXiv 2406.10774). mean_value: mean, and the mean of its values.
             halves, quarters: of each of two or four parts of the page, found by k-means, the mean in 4 bits and the variance
             around it (ours)

    Formulas: ``csrc/ops/summarize.h``.
    """
    op = "summarize"
    number = _kind(op, kind)
    if not pools:
        raise ValueError(f"{op}: pools has 0 pools, expected at least 1")
    view(op, "pages", pages)
    rows, entries = pages.shape if pages.dim() == 2 else (0, 0)
    dim = pools[0].head_dim
    device = pools[0].slabs[0].device if pools[0].slabs else pages.device
    blocks = torch.empty(rows, -(-entries // SLOTS), summary_bytes(dim, kind), dtype=torch.uint8, device=device)
    pages, visible = pages.cpu(), None if visible is None else on_host(op, "visible", visible)
    _C.summarize(
        host_view(op, "pages", pages),
        None if visible is None else host_view(op, "visible", visible),
        maybe_view(op, "centre", centre),
        view(op, "blocks", blocks),
        native_pools(op, pools),
        dim,
        number,
        thread_count(op, threads),
    )
    return blocks


def summarize_groups(
    blocks: Tensor, visible: Tensor, *, head_dim: int, kind: SummaryKind = "mean", threads: int | None = None
) -> Tensor:
    """What is known of groups of 32 pages that follow each other: blocks u8 [R, ceil(M // 32 / 16), summary_bytes(D)], of
    `select`'s first level. What is beyond the last whole group is in none.

    blocks   u8 [R, B, summary_bytes(D, kind)] of at least M entries, contiguous; kind mean or mean_value
    visible  u16 [R, M]

    Of kind mean: the mean of the pages' means, each counted as its visible slots; no spread and no radius
    (``csrc/ops/summarize_groups.h``). ValueError for other kinds. The CPU's.
    """
    op = "summarize_groups"
    number = _kind(op, kind)
    if kind not in ("mean", "mean_value"):
        raise ValueError(f"{op}: kind is {kind!r}, expected mean or mean_value")
    view(op, "visible", visible), view(op, "blocks", blocks)
    rows, entries = visible.shape if visible.dim() == 2 else (0, 0)
    made = -(-(entries // GROUP_PAGES) // SLOTS)
    groups = torch.empty(rows, made, summary_bytes(head_dim), dtype=torch.uint8, device=blocks.device)
    groups[..., : SLOTS * head_dim] = 128
    groups[..., SLOTS * head_dim :] = 0
    _C.summarize_groups(
        view(op, "blocks", blocks),
        view(op, "visible", visible),
        view(op, "groups", groups),
        head_dim,
        number,
        thread_count(op, threads),
    )
    return groups


def score_pages(
    q: Tensor,
    blocks: Tensor,
    visible: Tensor,
    *,
    kind: SummaryKind = "mean",
    scale: float | None = None,
    spread_weight: float = 1.0,
    softcap: float = 0.0,
    threads: int | None = None,
) -> Tensor:
    """The log of each page's estimated attention mass: f32 [R, G, M], -inf where nothing is visible.

    q              [R, G, D] f32, bf16 or f16, as the model has it: not rotated
    blocks         u8 [R, B, summary_bytes(D, kind)] of at least M entries, contiguous
    visible        u16 [R, M]
    kind           of the blocks. bounds: no estimate, but at least the log of the mass (Quest); scale 0 or more
    scale          of q.k; default 1 / sqrt(D)
    spread_weight  w: 0 takes every key for its page's mean, 1 adds the second-order term of log mean exp (ours)
    softcap        as attention's, on the page's logit before its count and its spread are added; 0: none

    ValueError also where a logit is not a number: a page that cannot be ranked would never be read. On a device that is
    waited for.
    """
    op = "score_pages"
    number = _kind(op, kind)
    rows, group, dim, entries, count, workspace = _scan(op, q, "visible", visible, threads, _C.select_workspace_bytes)
    x = torch.empty(rows, group, entries, device=q.device)
    starts, found = _starts(op, blocks), torch.empty(rows, 3, dtype=torch.int32, device=q.device)
    _C.score_pages(
        view(op, "q", q),
        view(op, "blocks", blocks),
        maybe_view(op, "starts", starts),
        view(op, "visible", visible),
        view(op, "x", x),
        view(op, "found", found),
        view(op, "workspace", workspace),
        dim**-0.5 if scale is None else scale,
        spread_weight,
        softcap,
        number,
        count,
    )
    _refuse_unranked(op, found[:, 1])
    return x


def select(
    q: Tensor,
    blocks: Tensor,
    visible: Tensor,
    k: Tensor | int,
    *,
    lse_base: Tensor | None = None,
    kind: SummaryKind = "mean",
    scale: float | None = None,
    spread_weight: float = 1.0,
    softcap: float = 0.0,
    aggregate: Aggregate = "sum",
    mass: float = 0.0,
    least: int = 0,
    zone: Tensor | None = None,
    groups: Tensor | None = None,
    expand: float = 0.25,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pages that a query reads. Returns (entries i32 [R, K], count i32 [R], lse_rest f32 [R, G]).

    q, blocks, visible, kind, scale, spread_weight, softcap: as in `score_pages`
    k          i32 [R], or one number for all rows: the most entries of each; K is the largest. Read by the host
    lse_base   f32 [R, G] log-sum-exp of what is read anyway; default -inf
    aggregate  of the shares of a KV head's query heads: their sum, the mass that they would capture, or the largest
    mass       > 0: of each row the fewest entries, `least` to k, that hold this share of its heads' estimated mass together
               with what is read anyway; aggregate sum only
    zone       i32 [R, E], written: of the entries not selected the E of highest vote, rising, -1 beyond, for `estimate`; kind
               mean_value. Without those whose summary was made from other slots than the visible ones
    groups     u8, as `summarize_groups` gives it: two levels. Each group is scored as one page, w = 0; of the groups, the share
               `expand` of highest vote, at least 4, is looked into, and what is in none. The others count in lse_rest by their
               own logit; their pages are not selected, and in no zone. Kinds mean and mean_value only; the CPU's

    entries: indices into the table of the row's pages of highest vote, ties the lower one, rising, -1 beyond `count`;
    lse_rest: logsumexp of the logits of the others, in the zone or not. ValueError as in `score_pages`.
    """
    op = "select"
    if aggregate not in _AGGREGATE:
        raise ValueError(f"{op}: aggregate is {aggregate!r}, expected one of {', '.join(_AGGREGATE)}")
    number = _kind(op, kind)
    rows, group, dim, entries, count, workspace = _scan(op, q, "visible", visible, threads, _C.select_workspace_bytes)
    most = torch.full((rows,), k, dtype=torch.int32) if isinstance(k, int) else on_host(op, "k", k)
    widest = int(most.max()) if most.numel() else 0
    if not 0.0 < expand <= 1.0:
        raise ValueError(f"{op}: expand is {expand}, expected above 0 and at most 1")
    chosen = torch.full((rows, max(widest, 0)), -1, dtype=torch.int32, device=q.device)
    rest = torch.empty(rows, group, device=q.device)
    starts, found = _starts(op, blocks), torch.empty(rows, 3, dtype=torch.int32, device=q.device)
    _C.select(
        view(op, "q", q),
        view(op, "blocks", blocks),
        maybe_view(op, "starts", starts),
        view(op, "visible", visible),
        host_view(op, "k", most),
        maybe_view(op, "lse_base", lse_base),
        view(op, "entries", chosen),
        view(op, "found", found),
        view(op, "lse_rest", rest),
        maybe_view(op, "zone", zone),
        maybe_view(op, "groups", groups),
        view(op, "workspace", workspace),
        dim**-0.5 if scale is None else scale,
        spread_weight,
        softcap,
        number,
        _AGGREGATE[aggregate],
        mass,
        least,
        looked_into(entries // GROUP_PAGES, expand),
        count,
    )
    _refuse_unranked(op, found[:, 1])
    return chosen, found[:, 0].contiguous(), rest


def estimate(
    q: Tensor,
    blocks: Tensor,
    visible: Tensor,
    zone: Tensor,
    *,
    scale: float | None = None,
    spread_weight: float = 1.0,
    softcap: float = 0.0,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to pages that are not read, by their summaries. Returns (out f32 [R, G, D], lse f32 [R, G]).

    q, visible, scale, spread_weight, softcap: as in `select`
    blocks   u8 [R, B, summary_bytes(D, "mean_value")] of at least M entries, contiguous
    zone     i32 [R, E] entries as `select` gives them: rising, -1 beyond the last

    Each page acts as its visible tokens would with the page's estimated logit and mean value; out is not rotated and merges
    with `attend`'s by lse. Entries whose summary was made from other slots than the visible ones take no part. An empty zone:
    zeros and -inf. Source: RetroInfer (arXiv 2505.02922), which takes every key for the mean (spread_weight 0).
    """
    op = "estimate"
    rows, group, dim, _, count, workspace = _scan(op, q, "zone", zone, threads, _C.estimate_workspace_bytes)
    out, lse = torch.empty(rows, group, dim, device=q.device), torch.empty(rows, group, device=q.device)
    starts, unranked = _starts(op, blocks), torch.empty(rows, dtype=torch.int32, device=q.device)
    _C.estimate(
        view(op, "q", q),
        view(op, "blocks", blocks),
        maybe_view(op, "starts", starts),
        view(op, "visible", visible),
        view(op, "zone", zone),
        view(op, "out", out),
        view(op, "lse", lse),
        view(op, "unranked", unranked),
        view(op, "workspace", workspace),
        dim**-0.5 if scale is None else scale,
        spread_weight,
        softcap,
        count,
    )
    _refuse_unranked(op, unranked)
    return out, lse


def looked_into(groups: int, expand: float) -> int:
    """Of so many groups of pages, how many are."""
    return max(LEAST_GROUPS, ceil(expand * groups))


def _kind(op: str, kind: str) -> int:
    if kind not in _KIND:
        raise ValueError(f"{op}: kind is {kind!r}, expected one of {', '.join(_KIND)}")
    return _KIND[kind]


def _scan(
    op: str, q: Tensor, name: str, entries: Tensor, threads: int | None, workspace_bytes: Callable[..., int]
) -> tuple[int, int, int, int, int, Tensor]:
    """R, G, D, width, threads and workspace of a scan of summaries of entries [R, width]; any for tensors of another rank,
    which the op refuses."""
    view(op, "q", q), view(op, name, entries)
    count = thread_count(op, threads)
    width = entries.shape[-1] if entries.dim() else 0
    rows, group, dim = q.shape if q.dim() == 3 else (0, 1, 32)
    size = workspace_bytes(rows, group, dim, width, count, device_number(op, "q", q))
    return rows, group, dim, width, count, torch.empty(size, dtype=torch.uint8, device=q.device)


def _starts(op: str, blocks: Tensor) -> Tensor | None:
    """Where each of the blocks u8 [R, B, bytes] begins, for kernels on a device: i64 [R, B]. None on the CPU."""
    if device_number(op, "blocks", blocks) == 0 or blocks.dim() != 3:
        return None
    rows, count, size = blocks.shape
    return (blocks.data_ptr() + size * torch.arange(rows * count, device=blocks.device)).view(rows, count)


def _refuse_unranked(op: str, entries: Tensor) -> None:
    """Of i32 [R]: the entry of each row that cannot be ranked, or -1. On the CPU the op has refused such rows itself."""
    if device_number(op, "q", entries) == 0:
        return
    for row, entry in enumerate(entries.tolist()):
        if entry >= 0:
            raise ValueError(
                f"{op}: the logits of row {row}, entry {entry} are not finite, expected finite keys and queries"
            )
