"""choose_states beside the same choice by torch's sorts: all rows of several layers, one call for each layer.

Cases: a cut prompt (all tokens Full, most must go), a cache between two plans (a few too many), and rows of two quantized
formats whose tokens do not share pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.clock import Clock
from kvstrata.cli.bench.common import begin, digest, parser, run_facts, show
from kvstrata.cli.output import Output

FULL, INT8, INT4, INT2 = 1, 2, 3, 4
Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def torch_states(rows: Rows, state: int) -> Tensor:
    """The baseline: 64-bit keys, a partial sort where few go, a whole one else."""
    score, now, positions, protect, full_pages, quant_pages = rows
    movable = (positions >= 0) & (now != 0) & ~protect
    stays = torch_fit(score, positions, movable & (now == FULL), now, [FULL], full_pages)
    target = now.clamp_min(state)
    taken = torch_fit(score, positions, movable & ~stays, target, list(range(state, INT2 + 1)), quant_pages)
    planned = torch.where(stays, FULL, torch.where(taken, target, 0))
    return torch.where(movable, planned, torch.where(positions >= 0, now, 0)).to(torch.uint8)


def torch_fit(score: Tensor, positions: Tensor, among: Tensor, kind: Tensor, kinds: list[int], pages: Tensor) -> Tensor:
    counts = torch.stack([(among & (kind == k)).sum(1) for k in kinds])
    if bool((((counts + 15) // 16).sum(0) <= pages).all()):
        return among
    if not bool((pages > 0).any()):
        return torch.zeros_like(among)
    finite = torch.where(score.isfinite(), score, float("-inf")) + 0.0
    bits = finite.view(torch.int32)
    high = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64) << 32
    key = torch.where(among, high | (0x7FFFFFFF - positions.to(torch.int64).clamp_min(0)), torch.iinfo(torch.int64).max)
    if int((counts.sum(1) > 0).sum()) == 1:
        drop = (counts.sum(0) - 16 * pages).clamp_min(0)
        most = int(drop.max())
        few = most <= key.shape[1] // 8
        worst = key.topk(most, largest=False).indices if few else key.sort(dim=1).indices[:, :most]
        out = torch.zeros(len(key), key.shape[1] + 1, dtype=torch.bool)
        out[:, :-1] = among
        goes = torch.arange(most) < drop.unsqueeze(1)
        return out.scatter_(1, torch.where(goes, worst, key.shape[1]), False)[:, :-1]
    order = key.sort(dim=1).indices.flip(1)
    ordered = torch.where(among, kind, 0).gather(1, order)
    upto = torch.stack([(ordered == k).cumsum(1) for k in kinds])
    fits = ((upto + 15) // 16).sum(0) <= pages.unsqueeze(1)
    taken = torch.zeros_like(among)
    for k, count in zip(kinds, upto, strict=True):
        mine = ordered == k
        taken |= mine & (count <= (16 * (((mine & fits).sum(1) + 15) // 16)).unsqueeze(1))
    return torch.zeros_like(among).scatter_(1, order, taken)


def layer(args: argparse.Namespace, states: list[int], full: float, quant: float, equal: bool) -> Rows:
    shape = args.kv_rows, args.tokens
    score = torch.full(shape, 0.5) if equal else torch.rand(shape) ** 8
    now = torch.tensor(states, dtype=torch.uint8)[torch.randint(len(states), shape)]
    positions = torch.arange(args.tokens, dtype=torch.int32).repeat(args.kv_rows, 1)
    protect = (positions < 16) | (positions >= args.tokens - 64)
    pages = [torch.full((args.kv_rows,), int(share * args.tokens / 16)) for share in (full, quant)]
    return score, now, positions, protect, pages[0], pages[1]


def case(args: argparse.Namespace, clock: Clock, name: str, state: int, *what: Any) -> dict[str, Any]:
    layers = [layer(args, *what) for _ in range(args.layers)]
    out = [torch.empty(args.kv_rows, args.tokens, dtype=torch.uint8) for _ in layers]

    def ours(_: int) -> None:
        for rows, states in zip(layers, out, strict=True):
            ops.choose_states(*rows, state, out=states)

    theirs: Callable[[int], object] = lambda _: [torch_states(rows, state) for rows in layers]  # noqa: E731
    times, base = clock.measure([ours, theirs], args.reps)
    return {
        "kind": "choose_states",
        "case": name,
        "layers": args.layers,
        "kv_rows": args.kv_rows,
        "tokens": args.tokens,
        "reps": args.reps,
        **times.row(),
        "ns_per_token": 1e6 * times.p50 / (args.layers * args.kv_rows * args.tokens),
        "digest": digest(*out),
        "baseline": {"name": "torch, keys and sorts", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    p = parser(__doc__ or "", tokens=25_000)
    p.add_argument("--layers", type=int, default=4)
    args = p.parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    rows = [
        case(args, clock, "everything fits", INT4, [FULL], 1.0, 0.0, False),
        case(args, clock, "keep an eighth", INT2, [FULL], 0.125, 0.0, False),
        case(args, clock, "keep an eighth, equal", INT2, [FULL], 0.125, 0.0, True),
        case(args, clock, "three states", INT4, [FULL], 0.125, 0.375, False),
        case(args, clock, "few too many", INT4, [FULL, INT4, INT4, INT4], 0.24, 0.75, False),
        case(args, clock, "two formats", INT8, [INT8, INT4], 0.0, 0.5, False),
    ]
    show("choose_states", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
