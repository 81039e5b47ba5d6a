"""merge beside the same formula in torch operators."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops, reference
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import begin, digest, parser, run_facts, show
from kvstrata.cli.output import Output


def case(args: argparse.Namespace, clock: Clock, parts: int, n: int, read_gbps: float) -> dict[str, Any]:
    size = (parts + 1) * n * (args.dim + 1) * 4  # read and written
    count = min(clock.buffers(size), 16)
    outs = [list(torch.randn(parts, n, args.dim, device=clock.device)) for _ in range(count)]
    lses = [list(torch.randn(parts, n, device=clock.device)) for _ in range(count)]
    out, lse = torch.empty(n, args.dim, device=clock.device), torch.empty(n, device=clock.device)
    times, base = clock.measure(
        [
            lambda i: ops.merge(outs[i % count], lses[i % count], out=out, lse=lse),
            lambda i: reference.merge(outs[i % count], lses[i % count]),
        ],
        args.reps,
    )
    ops.merge(outs[0], lses[0], out=out, lse=lse)
    gbps = size / times.p50 / 1e6
    return {
        "kind": "merge",
        "parts": parts,
        "n": n,
        "head_dim": args.dim,
        "bytes_in_and_out": size,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_read": gbps / read_gbps,
        "digest": digest(out, lse),
        "baseline": {"name": "torch operators", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES, tokens=4096).parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    step = args.kv_rows * args.group
    shapes = [(2, step), (8, step), (2, step * args.tokens), (4, step * args.tokens // 4)]  # decode, then prefill
    show("merge", run, [case(args, clock, parts, n, run["read_gbps"]) for parts, n in shapes], Output(args.json))


if __name__ == "__main__":
    main()
