"""pack and unpack beside a torch copy of the same bytes."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import begin, beside_copy, digest, filled, parser, run_facts, show
from kvstrata.cli.output import Output


def case(args: argparse.Namespace, clock: Clock, fmt: str, copy_gbps: float) -> list[dict[str, Any]]:
    size = 2 * args.kv_rows * (args.tokens // 16) * ops.page_bytes(fmt, args.dim)  # read and written
    data = [filled(fmt, args.kv_rows, args.tokens, args.dim, device=clock.device) for _ in range(clock.buffers(size))]
    shape = (-1, 16, args.dim)
    k, v = (torch.empty_like(t).view(shape) for t in (data[0].k, data[0].v))
    k.zero_(), v.zero_()

    def pack(i: int) -> object:
        d = data[i % len(data)]
        return ops.pack(d.k.view(shape), d.v.view(shape), d.pages.view(-1), [d.pool])

    def unpack(i: int) -> object:
        d = data[i % len(data)]
        return ops.unpack(d.pages.view(-1), [d.pool], k=k, v=v)

    def copy(i: int) -> object:
        d = data[i % len(data)]
        return k.copy_(d.k.view(shape)), v.copy_(d.v.view(shape))

    *ours, base = clock.measure([pack, unpack, copy], args.reps)
    unpack(0)
    rows = []
    for kind, times in zip(("pack", "unpack"), ours, strict=True):
        rows.append(
            {
                "kind": kind,
                "format": fmt,
                "kv_rows": args.kv_rows,
                "head_dim": args.dim,
                "tokens": args.tokens,
                **beside_copy(size, times, base, args, copy_gbps, digest(k, v)),
            }
        )
    return rows


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES, tokens=8192).parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    rows = [row for fmt in args.format.split(",") for row in case(args, clock, fmt, run["copy_gbps"])]
    show("pack", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
