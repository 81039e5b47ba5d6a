"""measure beside the same formulas in torch operators on dense keys."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import begin, digest, element, filled, parser, run_facts, show
from kvstrata.cli.output import Output


def dense(heads: Tensor, k: Tensor, stats: ops.Stats) -> Tensor:
    z = torch.matmul(heads, k.unsqueeze(1).transpose(2, 3)).float() / math.sqrt(k.shape[-1])
    a = torch.softmax(z, -1)  # [R, G, W, N]
    moved = a - a.mean(2, keepdim=True)
    m2, m4 = (moved**2).mean(2), (moved**4).mean(2)
    if stats == "code":
        entropy = -(a * torch.log(a + 1e-10)).sum((2, 3))
        return torch.stack([entropy, a.var(2).sum(2), (m4 / m2.clamp_min(1e-8) ** 2).sum(2)])
    entropy = -(torch.xlogy(a, a)).sum(3).mean(2)
    return torch.stack([entropy, m2.sum(2) / (a**2).mean(2).sum(2), (m4 / m2).sum(2) / m2.sum(2)])


def case(args: argparse.Namespace, clock: Clock, fmt: str, stats: ops.Stats) -> dict[str, Any]:
    size = args.kv_rows * (args.tokens // 16) * ops.page_bytes(fmt, args.dim) // 2
    data = [
        filled(fmt, args.kv_rows, args.tokens, args.dim, device=clock.device)
        for _ in range(min(clock.buffers(size), 4))
    ]
    q = torch.randn(args.kv_rows, args.queries, args.group, args.dim, device=clock.device).to(element(fmt))
    q_pos = torch.full((args.kv_rows, args.queries), args.tokens, dtype=torch.int32, device=clock.device)
    for d in data:
        d.pool.positions()[: d.pages.numel()] = 0
    heads = q.permute(0, 2, 1, 3).contiguous()
    times, base = clock.measure(
        [
            lambda i: ops.measure(q, data[i % len(data)].pages, [data[i % len(data)].pool], q_pos, stats=stats),
            lambda i: dense(heads, data[i % len(data)].k, stats),
        ],
        args.reps,
    )
    flops = 4 * args.kv_rows * args.group * args.queries * args.tokens * args.dim
    return {
        "kind": "measure",
        "format": fmt,
        "stats": stats,
        "kv_rows": args.kv_rows,
        "group": args.group,
        "queries": args.queries,
        "head_dim": args.dim,
        "tokens": args.tokens,
        "reps": args.reps,
        **times.row(),
        "gflops": flops / times.p50 / 1e6,
        "digest": digest(ops.measure(q, data[0].pages, [data[0].pool], q_pos, stats=stats)),
        "baseline": {"name": "torch operators on dense keys", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    p = parser(__doc__ or "", devices=DEVICES, tokens=4096, format="f32,bf16,int8,int4,int2")
    p.add_argument("--queries", type=int, default=32)
    args = p.parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    kinds: list[ops.Stats] = ["sound", "code"]
    rows = [case(args, clock, fmt, stats) for fmt in args.format.split(",") for stats in kinds]
    show("measure", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
