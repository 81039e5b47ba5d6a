"""summarize beside the same facts in torch operators on dense keys: mean, its 8-bit code, variance and radius of each page.

The baseline is the same for all kinds of summaries.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import SLOTS, begin, digest, filled, parser, run_facts, show
from kvstrata.cli.output import Output
from kvstrata.summaries import SummaryKind


def dense(k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of k [R, N, D], not rotated: a rotation of the means alone would cost the baseline little."""
    x = k.float().view(k.shape[0], -1, SLOTS, k.shape[2])
    mean = x.mean(2)
    scale = mean.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(mean / scale)
    square = ((x - (scale * codes).unsqueeze(2)) ** 2).sum(-1)
    return (codes + 128).to(torch.uint8), scale, square.mean(-1) / k.shape[2], square.amax(-1).sqrt()


def case(args: argparse.Namespace, clock: Clock, fmt: str, kind: SummaryKind, read_gbps: float) -> dict[str, Any]:
    count = args.kv_rows * (args.tokens // SLOTS)
    size = count * ops.page_bytes(fmt, args.dim) // (1 if kind == "mean_value" else 2)  # keys
    written = count // SLOTS * ops.summary_bytes(args.dim, kind)
    data = [
        filled(fmt, args.kv_rows, args.tokens, args.dim, device=clock.device)
        for _ in range(min(clock.buffers(size), 4))
    ]
    times, base = clock.measure(
        [
            lambda i: ops.summarize(data[i % len(data)].pages, [data[i % len(data)].pool], kind=kind),
            lambda i: dense(data[i % len(data)].k),
        ],
        args.reps,
    )
    gbps = (size + written) / times.p50 / 1e6
    return {
        "kind": "summarize",
        "summary": kind,
        "format": fmt,
        "kv_rows": args.kv_rows,
        "head_dim": args.dim,
        "tokens": args.tokens,
        "bytes_read": size,
        "bytes_written": written,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_read": gbps / read_gbps,
        "digest": digest(ops.summarize(data[0].pages, [data[0].pool], kind=kind)),
        "baseline": {"name": "torch operators on dense keys", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES, tokens=8192, format="f32,bf16,int8,int4,int2").parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    kinds: tuple[SummaryKind, ...] = ("mean", "bounds", "mean_value", "halves", "quarters")
    rows = [case(args, clock, fmt, kind, run["read_gbps"]) for kind in kinds for fmt in args.format.split(",")]
    show("summarize", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
