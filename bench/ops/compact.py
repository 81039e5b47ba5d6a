"""compact beside a torch copy of the same bytes: whole pages, and slots gathered from all over."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import SLOTS, begin, beside_copy, digest, parser, run_facts, show
from kvstrata.cli.output import Output


def case(args: argparse.Namespace, clock: Clock, fmt: str, order: str, copy_gbps: float) -> dict[str, Any]:
    pages = args.kv_rows * (args.tokens // SLOTS)
    size = 2 * pages * ops.page_bytes(fmt, args.dim)  # read and written
    count = clock.buffers(size)
    source = [ops.Pool.allocate(fmt, args.dim, pages, device=clock.device) for _ in range(count)]
    for pool in source:
        pool.slabs[0].random_(0, 255)
    target = ops.Pool.allocate(fmt, args.dim, pages, device=clock.device)
    target.slabs[0].zero_()
    copies = torch.zeros_like(target.payload())
    at = torch.arange(pages * SLOTS, device=clock.device)
    token = torch.randperm(pages * SLOTS, device=clock.device) if order == "scattered" else at
    columns = (token // SLOTS, token % SLOTS, at // SLOTS + ops.make_page(1, 0, 0), at % SLOTS)
    moves = torch.stack(columns, 1).to(torch.int32)

    def ours(i: int) -> object:
        return ops.compact(moves, [source[i % count], target])

    def copy(i: int) -> object:
        return copies.copy_(source[i % count].payload())

    times, base = clock.measure([ours, copy], args.reps)
    ours(0)
    return {
        "kind": "compact",
        "format": fmt,
        "order": order,
        "kv_rows": args.kv_rows,
        "head_dim": args.dim,
        "tokens": args.tokens,
        "ns_per_token": 1e6 * times.p50 / (pages * SLOTS),
        **beside_copy(size, times, base, args, copy_gbps, digest(target.payload())),
    }


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES, tokens=4096, format="bf16,int8,int4,int2").parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    rows = [
        case(args, clock, fmt, order, run["copy_gbps"])
        for fmt in args.format.split(",")
        for order in ("pages", "scattered")
    ]
    show("compact", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
