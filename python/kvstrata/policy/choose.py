"""Which of its states each token takes, from scores and pages: what every planner that drops or quantizes ends with.

Survivors are packed by format, 16 to a page, so p pages hold 16 * p tokens of one format. Nothing here loops over rows or
tokens; where everything fits, nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstrata.config import SLOTS
from kvstrata.policy.base import EVICTED, FULL, INT2, STATES

_LAST = 0x7FFFFFFF
_FEW = 8
"""A selection of more than 1 / 8 of a row is faster by a whole sort."""


def choose_states(
    score: Tensor,
    now: Tensor,
    positions: Tensor,
    protect: Tensor,
    full_pages: Tensor,
    quant_pages: Tensor,
    quantized_state: int,
) -> Tensor:
    """The state of each token: u8 [R, N], 0 where no token is.

    score: f32 [R, N], higher is kept; now: u8 [R, N], what each token is stored as; positions: i32 [R, N], -1 where no token
    is; protect: bool [R, N], tokens that keep their state; full_pages, quant_pages: i64 [R], pages for the others;
    quantized_state: the state that a token takes which does not stay Full.

    By rank, the first 16 * full_pages tokens that are still Full stay Full, the next 16 * quant_pages others are quantized,
    the rest is Evicted. Ranks: score descending, ties the older token first, scores that are not finite last. Bits only
    fall: a token of fewer bits than the target keeps its format. Where those make a second format, pages are taken in order
    of rank until one more would be too many, and pages begun are filled. ValueError for shapes, types and values.
    Source: ARKV (arXiv 2603.08727) over pages; ours.
    """
    _check(score, now, positions, protect, full_pages, quant_pages, quantized_state)
    movable = (positions >= 0) & (now != EVICTED) & ~protect
    stays = fit(score, positions, movable & (now == FULL), now, (FULL,), full_pages)
    target = now.clamp_min(quantized_state)  # states count up as bits fall
    formats = range(quantized_state, INT2 + 1)
    taken = fit(score, positions, movable & ~stays, target, formats, quant_pages)
    planned = torch.where(stays, FULL, torch.where(taken, target, EVICTED))
    return torch.where(movable, planned, torch.where(positions >= 0, now, EVICTED)).to(torch.uint8)


def at_most(state: Tensor, score: Tensor, positions: Tensor, protect: Tensor, most: int) -> Tensor:
    """The planned states u8 [R, N] with no more than ``most`` tokens kept in any row, in whatever state.

    score: f32 [R, N]; positions: i32 [R, N], -1 where no token is; protect: bool [R, N]. The unprotected tokens of the lowest
    scores go, of equal ones the newest, first those whose score is not finite; protected ones stay even where they are more.
    """
    kept = (positions >= 0) & (state != EVICTED)
    among = kept & ~protect
    drop = torch.minimum((kept.sum(1) - most).clamp_min(0), among.sum(1))
    if not bool((drop > 0).any()):
        return state
    worth = torch.where(score.isfinite(), score, float("-inf")).masked_fill(~among, float("inf"))
    newest = positions.argsort(dim=1, descending=True)  # positions of a row differ, where they are any
    order = newest.gather(1, worth.gather(1, newest).argsort(dim=1, stable=True))
    goes = torch.arange(state.shape[1], device=state.device) < drop.unsqueeze(1)
    return state.masked_fill(torch.zeros_like(among).scatter_(1, order, goes), EVICTED)


def fall(now: Tensor, target: Tensor) -> Tensor:
    """The state that a token takes which is ``now`` and shall be ``target``: the one of fewer bits, u8 as ``now``."""
    gone = (now == EVICTED) | (target == EVICTED)
    return torch.where(gone, EVICTED, torch.maximum(now, target)).to(torch.uint8)  # states count up as bits fall


def rank_keys(score: Tensor, positions: Tensor) -> Tensor:
    """Distinct keys of the tokens of a row, the larger the better: i64, shaped as both.

    The upper half orders the scores, the lower half the ages: one unstable sort of integers is several times faster than
    stable sorts of floats, and gives the same plan on every device.
    """
    finite = torch.where(score.isfinite(), score, float("-inf")) + 0.0  # -0 is 0
    bits = finite.to(torch.float32).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ _LAST, bits)  # negative floats order the other way round
    return (ordered.to(torch.int64) << 32) | (_LAST - positions.to(torch.int64).clamp_min(0))


def fit(score: Tensor, positions: Tensor, among: Tensor, kind: Tensor, kinds: Sequence[int], pages: Tensor) -> Tensor:
    """Those of the tokens ``among`` that fit into so many pages, best first: bool [R, N].

    score, positions: as in :func:`choose_states`; among: bool [R, N]; kind: u8 [R, N], one of ``kinds`` for each of them;
    pages: i64 [R]. Tokens of different kinds do not share a page.
    """
    counts = torch.stack([(among & (kind == k)).sum(1) for k in kinds])
    if bool((pages_of(counts).sum(0) <= pages).all()):
        return among
    if not bool((pages > 0).any()):
        return torch.zeros_like(among)
    key = torch.where(among, rank_keys(score, positions), torch.iinfo(torch.int64).max)
    if int((counts.sum(1) > 0).sum()) == 1:
        return _all_but_worst(key, among, (counts.sum(0) - SLOTS * pages).clamp_min(0))
    worst_first = key.sort(dim=1).indices
    order = worst_first.flip(1)  # what is not among them comes first, and is of no kind
    ordered = torch.where(among, kind, EVICTED).gather(1, order)
    upto = torch.stack([(ordered == k).cumsum(1) for k in kinds])  # tokens of each kind up to a rank: [kinds, R, N]
    fits = pages_of(upto).sum(0) <= pages.unsqueeze(1)
    taken = torch.zeros_like(among)
    for k, count in zip(kinds, upto, strict=True):
        mine = ordered == k
        room = SLOTS * pages_of((mine & fits).sum(1))
        taken |= mine & (count <= room.unsqueeze(1))
    return torch.zeros_like(among).scatter_(1, order, taken)


def _all_but_worst(key: Tensor, among: Tensor, drop: Tensor) -> Tensor:
    """``among`` without so many tokens of each row, drop i64 [R], those of the smallest keys: bool [R, N].

    Between two plans few tokens arrive, so few have to go: a partial sort finds them.
    """
    rows, columns = key.shape
    most = int(drop.max())
    few = most <= columns // _FEW
    worst = key.topk(most, largest=False).indices if few else key.sort(dim=1).indices[:, :most]
    goes = torch.arange(most, device=key.device) < drop.unsqueeze(1)
    out = torch.zeros(rows, columns + 1, dtype=torch.bool, device=key.device)
    out[:, :columns] = among
    return out.scatter_(1, torch.where(goes, worst, columns), False)[:, :columns]


def pages_of(tokens: Tensor) -> Tensor:
    """Pages for so many tokens of one format, i64 as ``tokens``."""
    return torch.div(tokens + SLOTS - 1, SLOTS, rounding_mode="floor")


def _check(
    score: Tensor,
    now: Tensor,
    positions: Tensor,
    protect: Tensor,
    full_pages: Tensor,
    quant_pages: Tensor,
    quantized_state: int,
) -> None:
    shape, rows = tuple(positions.shape), tuple(positions.shape[:1])
    expected = {
        "score": (score, shape, torch.float32),
        "now": (now, shape, torch.uint8),
        "positions": (positions, shape, torch.int32),
        "protect": (protect, shape, torch.bool),
        "full_pages": (full_pages, rows, torch.int64),
        "quant_pages": (quant_pages, rows, torch.int64),
    }
    if positions.dim() != 2:
        raise ValueError(f"choose_states: positions is {list(shape)}, expected [R, N]")
    for name, (value, size, dtype) in expected.items():
        if tuple(value.shape) != size or value.dtype != dtype:
            raise ValueError(
                f"choose_states: {name} is {value.dtype} {list(value.shape)}, expected {dtype} {list(size)}"
            )
    if quantized_state not in STATES.values():
        raise ValueError(
            f"choose_states: quantized_state is {quantized_state}, expected one of {sorted(STATES.values())}"
        )
