"""score_window beside the same formula in torch operators on dense keys."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import begin, digest, element, filled, parser, run_facts, show
from kvstrata.cli.output import Output


def case(args: argparse.Namespace, clock: Clock, fmt: str, spread: ops.Spread, read_gbps: float) -> dict[str, Any]:
    size = args.kv_rows * (args.tokens // 16) * ops.page_bytes(fmt, args.dim) // 2  # of the keys, once
    data = [
        filled(fmt, args.kv_rows, args.tokens, args.dim, device=clock.device)
        for _ in range(min(clock.buffers(size), 4))
    ]
    q = torch.randn(args.kv_rows, args.queries, args.group, args.dim, device=clock.device).to(element(fmt))
    q_pos = torch.full((args.kv_rows, args.queries), args.tokens, dtype=torch.int32, device=clock.device)
    for d in data:
        d.pool.positions()[: d.pages.numel()] = 0
    out = torch.empty(args.kv_rows, args.group, args.tokens // 16, 16, device=clock.device)
    work = torch.empty(ops.score_window_workspace_bytes(q, args.tokens // 16), dtype=torch.uint8, device=clock.device)
    heads = q.permute(0, 2, 1, 3).contiguous()

    def ours(i: int) -> object:
        d = data[i % len(data)]
        return ops.score_window(q, d.pages, [d.pool], q_pos=q_pos, spread=spread, weight=1.0, out=out, workspace=work)

    def dense(i: int) -> object:
        d = data[i % len(data)]
        z = torch.matmul(heads, d.k.unsqueeze(1).transpose(2, 3)).float() / math.sqrt(args.dim)
        a = torch.softmax(z, -1)
        return a.mean(2) if spread == "none" else a.mean(2) + a.std(2)

    times, base = clock.measure([ours, dense], args.reps)
    ours(0)
    flops = 4 * args.kv_rows * args.group * args.queries * args.tokens * args.dim  # two passes
    return {
        "kind": "score_window",
        "format": fmt,
        "spread": spread,
        "kv_rows": args.kv_rows,
        "group": args.group,
        "queries": args.queries,
        "head_dim": args.dim,
        "tokens": args.tokens,
        "workspace_bytes": work.numel(),
        "reps": args.reps,
        **times.row(),
        "gflops": flops / times.p50 / 1e6,
        "gbps": 2 * size / times.p50 / 1e6,
        "share_read": 2 * size / times.p50 / 1e6 / read_gbps,
        "digest": digest(out),
        "baseline": {"name": "torch operators on dense keys", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    p = parser(__doc__ or "", devices=DEVICES, tokens=4096, format="f32,bf16,int8,int4,int2")
    p.add_argument("--queries", type=int, default=32)
    args = p.parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    spreads: list[ops.Spread] = ["none", "std"]
    rows = [case(args, clock, fmt, spread, run["read_gbps"]) for fmt in args.format.split(",") for spread in spreads]
    show("score_window", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
