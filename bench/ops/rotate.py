"""rotate beside a torch copy of the same bytes, and beside the same rotation as a matrix product."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import begin, digest, parser, run_facts, show
from kvstrata.cli.output import Output


def case(args: argparse.Namespace, clock: Clock, inverse: bool, copy_gbps: float) -> dict[str, Any]:
    vectors = args.kv_rows * args.tokens
    size = 2 * vectors * args.dim * 4  # read and written
    data = [torch.randn(vectors, args.dim, device=clock.device) for _ in range(clock.buffers(size))]
    out = torch.zeros_like(data[0])
    matrix = ops.rotate(torch.eye(args.dim, device=clock.device), not inverse)

    def ours(i: int) -> object:
        return ops.rotate(data[i % len(data)], inverse, out=out)

    def product(i: int) -> object:
        return torch.matmul(data[i % len(data)], matrix, out=out)

    def copy(i: int) -> object:
        return out.copy_(data[i % len(data)])

    times, base, copied = clock.measure([ours, product, copy], args.reps)
    ours(0)
    gbps = size / times.p50 / 1e6
    return {
        "kind": "inverse" if inverse else "rotate",
        "kv_rows": args.kv_rows,
        "head_dim": args.dim,
        "tokens": args.tokens,
        "bytes_in_and_out": size,
        "reps": args.reps,
        **times.row(),
        "ns_per_vector": 1e6 * times.p50 / vectors,
        "gbps": gbps,
        "share_copy": gbps / copy_gbps,
        "digest": digest(out),
        "baseline": {"name": "torch matmul", "ms_p50": base.p50, "copy_ms_p50": copied.p50},
        "speedup_vs_matmul": base.p50 / times.p50,
        "speedup_vs_copy": copied.p50 / times.p50,
    }


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES, tokens=4096).parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    show("rotate", run, [case(args, clock, inverse, run["copy_gbps"]) for inverse in (False, True)], Output(args.json))


if __name__ == "__main__":
    main()
