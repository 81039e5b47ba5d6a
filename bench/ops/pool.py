"""pool beside torch's pooling of the same scores, already in order."""

from __future__ import annotations

import argparse
from typing import Any, Literal

import torch

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import begin, digest, parser, run_facts, show
from kvstrata.cli.output import Output


def case(
    args: argparse.Namespace, clock: Clock, kind: Literal["avg", "max"], order: str, kernel: int
) -> dict[str, Any]:
    entries = args.tokens // 16
    pool = ops.Pool.allocate("f32", 1, args.kv_rows * entries, device=clock.device)
    pages = torch.arange(args.kv_rows * entries, dtype=torch.int32, device=clock.device).view(args.kv_rows, entries)
    at = torch.arange(args.tokens, dtype=torch.int32, device=clock.device)
    rows = [
        at if order == "in order" else at[torch.randperm(args.tokens, device=clock.device)] for _ in range(args.kv_rows)
    ]
    pool.positions()[:] = torch.cat(rows).view(-1, 16)
    score = torch.rand(args.kv_rows, args.group, entries, 16, device=clock.device)
    out = torch.empty(args.kv_rows, entries, 16, device=clock.device)
    torch_pool = torch.nn.functional.avg_pool1d if kind == "avg" else torch.nn.functional.max_pool1d
    times, base = clock.measure(
        [
            lambda _: ops.pool(score, pages, [pool], kernel=kernel, kind=kind, out=out),
            lambda _: torch_pool(score.flatten(2), kernel, stride=1, padding=kernel // 2).mean(1),
        ],
        args.reps,
    )
    return {
        "kind": "pool",
        "pooling": kind,
        "order": order,
        "kernel": kernel,
        "kv_rows": args.kv_rows,
        "group": args.group,
        "tokens": args.tokens,
        "reps": args.reps,
        **times.row(),
        "ns_per_token": 1e6 * times.p50 / (args.kv_rows * args.tokens),
        "digest": digest(out),
        "baseline": {"name": f"torch {kind}_pool1d", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    p = parser(__doc__ or "", devices=DEVICES)
    p.add_argument("--kernel", type=int, default=5)
    args = p.parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    rows = [case(args, clock, "avg", order, args.kernel) for order in ("in order", "shuffled")]
    show("pool", run, [*rows, case(args, clock, "max", "in order", args.kernel)], Output(args.json))


if __name__ == "__main__":
    main()
