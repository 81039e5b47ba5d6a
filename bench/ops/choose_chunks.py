"""choose_chunks beside the same choice by torch's reductions: the chunks of all rows of several layers at once."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops, reference
from kvstrata.cli.bench.clock import Clock
from kvstrata.cli.bench.common import begin, digest, parser, run_facts, show
from kvstrata.cli.output import Output

COST = [[0, 0, 0], [1152, 1152, 1152], [2240, 1152, 2240], [4224, 1152, 2240]]  # of what is Full, int4 and int8 now
FIDELITY = [[0.0, 0.0, 0.0], [0.905, 0.905, 0.905], [0.9935, 0.905, 0.9935], [1.0, 0.905, 0.9935]]


def case(args: argparse.Namespace, clock: Clock, worth: str, share: float) -> dict[str, Any]:
    items = args.layers * args.kv_rows * args.tokens // 16
    w = torch.full((items,), 0.5) if worth == "equal" else torch.rand(items) ** 8
    ladder = torch.randint(0, 3, (items,)).to(torch.uint8)
    cost, fidelity = torch.tensor(COST), torch.tensor(FIDELITY)
    budget = int(share * int(cost[-1][ladder.long()].sum()))
    times, base = clock.measure(
        [
            lambda _: ops.choose_chunks(w, ladder, cost, fidelity, budget),
            lambda _: reference.choose_chunks(w, ladder, cost, fidelity, budget),
        ],
        args.reps,
    )
    return {
        "kind": "choose_chunks",
        "worth": worth,
        "share": share,
        "items": items,
        "reps": args.reps,
        **times.row(),
        "ns_per_item": 1e6 * times.p50 / items,
        "digest": digest(ops.choose_chunks(w, ladder, cost, fidelity, budget)[0]),
        "baseline": {"name": "torch, a reduction per step", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    p = parser(__doc__ or "", tokens=25_000)
    p.add_argument("--layers", type=int, default=4)
    args = p.parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    rows = [case(args, clock, w, share) for w in ("skewed", "equal") for share in (0.25, 0.5, 1.0)]
    show("choose_chunks", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
