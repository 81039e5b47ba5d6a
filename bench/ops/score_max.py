"""score_max beside the same formula in torch operators on dense keys: a product of [W, N] for each head, then its maxima."""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from typing import Any

import torch

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import begin, digest, element, filled, parser, run_facts, show
from kvstrata.cli.output import Output


def case(args: argparse.Namespace, clock: Clock, fmt: str, read_gbps: float) -> dict[str, Any]:
    size = args.kv_rows * (args.tokens // 16) * ops.page_bytes(fmt, args.dim) // 2  # of the keys, once
    data = [
        filled(fmt, args.kv_rows, args.tokens, args.dim, device=clock.device)
        for _ in range(min(clock.buffers(size), 4))
    ]
    width = args.spans * args.queries
    q = torch.randn(args.kv_rows, args.group, width, args.dim, device=clock.device).to(element(fmt))
    lse = torch.full((args.kv_rows, args.group, width), math.log(args.tokens) + 0.5, device=clock.device)
    spans = torch.arange(0, width + 1, args.queries, dtype=torch.int32, device=clock.device)
    out = torch.empty(args.spans, args.kv_rows, args.tokens // 16, 16, device=clock.device)

    def ours(i: int) -> object:
        d = data[i % len(data)]
        return ops.score_max(q, lse, spans, d.pages, [d.pool], out=out)

    def dense(i: int) -> object:
        k = data[i % len(data)].k
        found = torch.empty(args.spans, args.kv_rows, args.tokens, device=clock.device)
        for r in range(args.kv_rows):  # a row at a time: all of them would be gigabytes
            z = torch.matmul(q[r], k[r].T).float() / math.sqrt(args.dim) - lse[r, :, :, None]
            for e, (a, b) in enumerate(pairwise(spans.tolist())):
                found[e, r] = z[:, a:b].amax((0, 1)).exp()
        return found

    times, base = clock.measure([ours, dense], args.reps)
    ours(0)
    flops = 2 * args.kv_rows * args.group * width * args.tokens * args.dim
    return {
        "kind": "score_max",
        "format": fmt,
        "kv_rows": args.kv_rows,
        "group": args.group,
        "spans": args.spans,
        "queries": args.queries,
        "head_dim": args.dim,
        "tokens": args.tokens,
        "reps": args.reps,
        **times.row(),
        "gflops": flops / times.p50 / 1e6,
        "gbps": size / times.p50 / 1e6,
        "share_read": size / times.p50 / 1e6 / read_gbps,
        "digest": digest(out),
        "baseline": {"name": "torch operators on dense keys", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    p = parser(__doc__ or "", devices=DEVICES, tokens=8192, group=2, format="bf16,int8", reps=5)
    p.add_argument("--spans", type=int, default=4, help="default: %(default)s")
    p.add_argument("--queries", type=int, default=512, help="of a span; default: %(default)s")
    args = p.parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    rows = [case(args, clock, fmt, run["read_gbps"]) for fmt in args.format.split(",")]
    show("score_max", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
