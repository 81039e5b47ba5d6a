"""chunk_order beside the same order by torch's stable sorts, all rows of several layers in one call."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops, reference
from kvstrata.cli.bench.clock import Clock
from kvstrata.cli.bench.common import begin, digest, parser, run_facts, show
from kvstrata.cli.output import Output


def case(args: argparse.Namespace, clock: Clock, order: str, kinds: int) -> dict[str, Any]:
    shape = args.layers * args.kv_rows, args.tokens
    value = torch.rand(shape) ** 8
    kind = torch.randint(1, kinds + 1, shape).to(torch.uint8)
    pos = torch.arange(args.tokens, dtype=torch.int32).repeat(shape[0], 1)
    if order == "shuffled":
        pos = torch.rand(shape).argsort(1).int()
    times, base = clock.measure(
        [lambda _: ops.chunk_order(value, kind, pos), lambda _: reference.chunk_order(value, kind, pos)], args.reps
    )
    return {
        "kind": "chunk_order",
        "order": order,
        "kinds": kinds,
        "rows": shape[0],
        "tokens": args.tokens,
        "reps": args.reps,
        **times.row(),
        "ns_per_token": 1e6 * times.p50 / (shape[0] * args.tokens),
        "digest": digest(*ops.chunk_order(value, kind, pos)),
        "baseline": {"name": "torch, three stable sorts", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    p = parser(__doc__ or "", tokens=25_000)
    p.add_argument("--layers", type=int, default=4)
    args = p.parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    rows = [case(args, clock, order, kinds) for order in ("in order", "shuffled") for kinds in (1, 3)]
    show("chunk_order", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
