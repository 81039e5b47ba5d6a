"""The ops that choose what stored tokens become.

Part of `ops`, which has the letters. N stored tokens of a row, in any order; states as in a plan's column: 0 Evicted, 1 Full,
2 int8, 3 int4, 4 int2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata import _C
from kvstrata.pools import device_number, host_view, on_host, thread_count, view


def choose_states(
    score: Tensor,
    now: Tensor,
    positions: Tensor,
    protect: Tensor,
    full_pages: Tensor,
    quant_pages: Tensor,
    quantized_state: int,
    *,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """The state that each token takes, by rank and pages: u8 [R, N], 0 where no token is.

    score            f32 [R, N], higher is kept
    now              u8 [R, N] what each token is stored as
    positions        i32 [R, N], -1 where no token is
    protect          bool [R, N] tokens that keep their state and take no page
    full_pages       i64 [R] pages for those that stay Full, at least 0. Read by the host, as the next
    quant_pages      i64 [R] pages for those that do not
    quantized_state  2, 3 or 4: what a token becomes that does not stay Full
    out              u8 [R, N], contiguous

    By rank, the first 16 * full_pages tokens that are still Full stay Full, the next 16 * quant_pages others are quantized,
    the rest is Evicted. Ranks: score descending, ties the older token first (one position twice: the lower index), scores
    that are not finite last. Bits only fall: a token of fewer bits than quantized_state keeps its format. Where those make
    a second format, pages are taken in order of rank until one more would be too many, and pages begun are filled.
    Source: ARKV (arXiv 2603.08727) over pages; ours.
    """
    op = "choose_states"
    if not isinstance(protect, Tensor) or protect.dtype != torch.bool:
        raise ValueError(f"{op}: protect is {getattr(protect, 'dtype', type(protect).__name__)}, expected torch.bool")
    view(op, "positions", positions)  # refuses what is no tensor
    result = torch.empty(positions.shape, dtype=torch.uint8, device=positions.device) if out is None else out
    count = thread_count(op, threads)
    rows, columns = positions.shape if positions.dim() == 2 else (0, 0)
    size = _C.choose_states_workspace_bytes(rows, columns, count, device_number(op, "positions", positions))
    workspace = torch.empty(size, dtype=torch.uint8, device=positions.device)
    # By name: a copy has to live until the call is over.
    score, now, positions = _adjacent(score), _adjacent(now), _adjacent(positions)
    shield, full_pages, quant_pages = (
        _adjacent(protect.view(torch.uint8)),
        _adjacent(on_host(op, "full_pages", full_pages)),
        _adjacent(on_host(op, "quant_pages", quant_pages)),
    )
    _C.choose_states(
        view(op, "score", score),
        view(op, "now", now),
        view(op, "positions", positions),
        view(op, "protect", shield),
        host_view(op, "full_pages", full_pages),
        host_view(op, "quant_pages", quant_pages),
        view(op, "out", result),
        view(op, "workspace", workspace),
        quantized_state,
        count,
    )
    return result


def chunk_order(
    value: Tensor, kind: Tensor, pos: Tensor, *, threads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of each row sorted into chunks of 16 of one kind. Returns (order i32 [R, N], w f32 [R, M], items i32 [R]).

    value   f32 [R, N], at least 0 (NaN comes first)
    kind    u8 [R, N], 0: in no chunk
    pos     i32 [R, N]

    order: the row's token indices by rising kind, then by falling value, ties the older first; -1 beyond. Each kind's
    tokens are cut in 16s, so that the last chunk of a kind may be short. items: chunks of each row, M the most of them, which
    is waited for on a device; w[m]: sum of the values of chunk m, 0 from items[r] on.
    """
    op = "chunk_order"
    view(op, "value", value)  # refuses what is no tensor
    rows, columns = value.shape if value.dim() == 2 else (0, 0)
    count, device = thread_count(op, threads), value.device
    order = torch.empty(rows, columns, dtype=torch.int32, device=device)
    wide = torch.empty(rows, _C.most_chunks(columns), device=device)
    items = torch.empty(rows, dtype=torch.int32, device=device)
    size = _C.chunk_order_workspace_bytes(rows, columns, count, device_number(op, "value", value))
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    value, kind, pos = _adjacent(value), _adjacent(kind), _adjacent(pos)
    _C.chunk_order(
        view(op, "value", value),
        view(op, "kind", kind),
        view(op, "pos", pos),
        view(op, "order", order),
        view(op, "w", wide),
        view(op, "items", items),
        view(op, "workspace", workspace),
        count,
    )
    return order, wide[:, : int(items.max()) if rows else 0], items


def choose_chunks(w: Tensor, ladder: Tensor, cost: Tensor, fidelity: Tensor, budget: int) -> tuple[Tensor, float, int]:
    """The step of each item on its ladder, for the most sum(w * fidelity) with sum(cost) <= budget.

    Returns (step u8 [n], lambda, the sum of the costs).

    w          f32 [n], finite, at least 0
    ladder     u8 [n], each item's column of cost and fidelity
    cost       i64 [J, F], rising from step to step; a shorter ladder repeats its last
    fidelity   f32 [J, F], finite; the steps of a column lie on an upper concave hull
    budget     at least the sum of the items' cost[0]

    An item goes up while w * df > lambda * dc; lambda is bisected 64 times; then the remaining steps by falling density
    w * df / dc, ties by index, each if it fits. fp64. Loses at most the largest step against the optimum. On a device the
    result is waited for, and what w, ladder, cost and fidelity hold is not checked.
    """
    op = "choose_chunks"
    view(op, "w", w)  # refuses what is no tensor
    items, device = w.shape[0] if w.dim() else 0, w.device
    step = torch.empty(items, dtype=torch.uint8, device=device)
    found = torch.empty(2, dtype=torch.int64, device=device)
    steps, ladders = cost.shape if isinstance(cost, Tensor) and cost.dim() == 2 else (1, 1)
    size = _C.choose_chunks_workspace_bytes(items, max(steps, 1), ladders, device_number(op, "w", w))
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    w, ladder = _adjacent(w), _adjacent(ladder)
    _C.choose_chunks(
        view(op, "w", w),
        view(op, "ladder", ladder),
        view(op, "cost", cost),
        view(op, "fidelity", fidelity),
        budget,
        view(op, "step", step),
        view(op, "found", found),
        view(op, "workspace", workspace),
    )
    return step, float(found.view(torch.float64)[0]), int(found[1])


def _adjacent(t: Tensor) -> Tensor:
    """With the elements of a row side by side: what a scorer of one's own gives need not be so."""
    return t.contiguous() if isinstance(t, Tensor) and t.dim() and t.stride(-1) != 1 else t
