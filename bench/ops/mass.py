"""mass beside the same formula in torch operators."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops, reference
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import begin, digest, parser, run_facts, show
from kvstrata.cli.output import Output


def case(
    args: argparse.Namespace, clock: Clock, queries: int, tokens: int, reduce: ops.Reduce, read_gbps: float
) -> dict[str, Any]:
    shape = (args.kv_rows, args.group, queries, tokens // 16, 16)
    size = args.kv_rows * args.group * queries * tokens * 4 + args.kv_rows * tokens * 4
    count = min(clock.buffers(size), 8)
    logits = [torch.randn(shape, device=clock.device) for _ in range(count)]
    lses = [z.flatten(3).logsumexp(3).transpose(1, 2).contiguous() for z in logits]
    out = torch.empty(args.kv_rows, tokens // 16, 16, device=clock.device)
    times, base = clock.measure(
        [
            lambda i: ops.mass(logits[i % count], lses[i % count], reduce, out=out),
            lambda i: reference.mass(logits[i % count], lses[i % count], reduce),
        ],
        args.reps,
    )
    ops.mass(logits[0], lses[0], reduce, out=out)
    gbps = size / times.p50 / 1e6
    return {
        "kind": "mass",
        "reduce": reduce,
        "kv_rows": args.kv_rows,
        "group": args.group,
        "queries": queries,
        "tokens": tokens,
        "bytes_in_and_out": size,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_read": gbps / read_gbps,
        "digest": digest(out),
        "baseline": {"name": "torch operators", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES).parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    shapes: list[tuple[int, int, ops.Reduce]] = [
        (1, args.tokens, "sum"),
        (1, args.tokens, "max"),
        (32, args.tokens // 8, "mean"),
    ]
    show("mass", run, [case(args, clock, q, n, reduce, run["read_gbps"]) for q, n, reduce in shapes], Output(args.json))


if __name__ == "__main__":
    main()
