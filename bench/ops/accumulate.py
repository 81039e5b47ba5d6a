"""accumulate beside torch's in-place operators."""

from __future__ import annotations

import argparse
from typing import Any, Literal

import torch

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import begin, digest, parser, run_facts, show
from kvstrata.cli.output import Output


def case(args: argparse.Namespace, clock: Clock, combine: Literal["sum", "max"], copy_gbps: float) -> dict[str, Any]:
    size = 3 * 4 * args.kv_rows * args.tokens  # two read, one written
    count = min(clock.buffers(size), 64)
    score = [torch.rand(args.kv_rows, args.tokens, device=clock.device) for _ in range(count)]
    mass = [torch.rand(args.kv_rows, args.tokens, device=clock.device) for _ in range(count)]

    def theirs(i: int) -> object:
        old = score[i % count].mul_(0.95)
        return old.add_(mass[i % count]) if combine == "sum" else torch.maximum(old, mass[i % count], out=old)

    times, base = clock.measure(
        [lambda i: ops.accumulate(score[i % count], mass[i % count], 0.95, combine=combine), theirs], args.reps
    )
    gbps = size / times.p50 / 1e6
    return {
        "kind": "accumulate",
        "combine": combine,
        "kv_rows": args.kv_rows,
        "tokens": args.tokens,
        "bytes_in_and_out": size,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_copy": gbps / copy_gbps,
        "digest": digest(score[0]),
        "baseline": {"name": "torch in place", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES).parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    combines: list[Literal["sum", "max"]] = ["sum", "max"]
    show("accumulate", run, [case(args, clock, combine, run["copy_gbps"]) for combine in combines], Output(args.json))


if __name__ == "__main__":
    main()
