"""score_keys beside the same formulas in torch operators on dense keys."""

from __future__ import annotations

import argparse
from typing import Any, Literal

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import SLOTS, begin, digest, filled, parser, run_facts, show
from kvstrata.cli.output import Output

Kind = Literal["norm", "diversity"]


def dense(k: Tensor, kind: Kind) -> Tensor:
    x = k.float()
    if kind == "norm":
        return -x.norm(dim=-1)
    anchor = torch.nn.functional.normalize(x, dim=-1).mean(1, keepdim=True)
    return -torch.nn.functional.cosine_similarity(x, anchor, dim=-1)


def case(args: argparse.Namespace, clock: Clock, fmt: str, kind: Kind, read_gbps: float) -> dict[str, Any]:
    count = args.kv_rows * (args.tokens // SLOTS)
    size = (
        count * ops.page_bytes(fmt, args.dim) // 2 * (1 if kind == "norm" else 2)
    )  # keys, and how often they are read
    data = [
        filled(fmt, args.kv_rows, args.tokens, args.dim, device=clock.device)
        for _ in range(min(clock.buffers(size), 4))
    ]
    out = torch.empty(args.kv_rows, args.tokens // SLOTS, SLOTS, device=clock.device)
    times, base = clock.measure(
        [
            lambda i: ops.score_keys(data[i % len(data)].pages, [data[i % len(data)].pool], kind, out=out),
            lambda i: dense(data[i % len(data)].k, kind),
        ],
        args.reps,
    )
    ops.score_keys(data[0].pages, [data[0].pool], kind, out=out)
    gbps = size / times.p50 / 1e6
    return {
        "kind": "score_keys",
        "score": kind,
        "format": fmt,
        "kv_rows": args.kv_rows,
        "head_dim": args.dim,
        "tokens": args.tokens,
        "bytes_read": size,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_read": gbps / read_gbps,
        "digest": digest(out),
        "baseline": {"name": "torch operators on dense keys", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES, tokens=8192, format="f32,bf16,int8,int4,int2").parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    kinds: list[Kind] = ["norm", "diversity"]
    rows = [case(args, clock, fmt, kind, run["read_gbps"]) for fmt in args.format.split(",") for kind in kinds]
    show("score_keys", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
