"""The ops that choose what stored tokens become.

Part of `ops`, which has the letters. N stored tokens of a row, in any order; states as in a plan's column: 0 Evicted, 1 Full,
2 int8, 3 int4, 4 int2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata import _C
from kvstrata.pools import thread_count, view


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
    full_pages       i64 [R] pages for those that stay Full, at least 0
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
    result = torch.empty(positions.shape, dtype=torch.uint8) if out is None else out
    count = thread_count(op, threads)
    columns = positions.shape[1] if positions.dim() == 2 else 0
    workspace = torch.empty(_C.choose_states_workspace_bytes(columns, count), dtype=torch.uint8)
    # By name: a copy has to live until the call is over.
    score, now, positions = _adjacent(score), _adjacent(now), _adjacent(positions)
    shield, full_pages, quant_pages = (
        _adjacent(protect.view(torch.uint8)),
        _adjacent(full_pages),
        _adjacent(quant_pages),
    )
    _C.choose_states(
        view(op, "score", score),
        view(op, "now", now),
        view(op, "positions", positions),
        view(op, "protect", shield),
        view(op, "full_pages", full_pages),
        view(op, "quant_pages", quant_pages),
        view(op, "out", result),
        view(op, "workspace", workspace),
        quantized_state,
        count,
    )
    return result


def _adjacent(t: Tensor) -> Tensor:
    """With the elements of a row side by side: what a scorer of one's own gives need not be so."""
    return t.contiguous() if isinstance(t, Tensor) and t.dim() and t.stride(-1) != 1 else t
