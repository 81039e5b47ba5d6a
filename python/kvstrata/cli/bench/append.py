"""Time append beside a torch copy of the same tokens: a prompt's whole pages, and one token per row."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops
from kvstrata.cli.bench.clock import Clock
from kvstrata.cli.bench.common import begin, beside_copy, digest, op_arguments, run_facts, show
from kvstrata.cli.output import Output


def arguments(parser: argparse.ArgumentParser) -> None:
    op_arguments(parser, tuple(ops.FORMATS), tokens=4096)


def run(args: argparse.Namespace, out: Output) -> int:
    clock = begin(args)
    facts = run_facts(args, clock)
    rows = []
    for fmt in args.format.split(","):
        own = ops.FORMATS[fmt]
        rows += [case(args, clock, fmt, tokens, own, facts["copy_gbps"]) for tokens in (args.tokens, 1)]
        if fmt != "f32":
            rows.append(case(args, clock, fmt, args.tokens, torch.float32, facts["copy_gbps"]))
    show("append", facts, rows, out)
    return 0


def case(
    args: argparse.Namespace, clock: Clock, fmt: str, tokens: int, source: torch.dtype, copy_gbps: float
) -> dict[str, Any]:
    """Tokens of the dtype `source` into pages of one format."""
    rows, dim, entries = args.kv_rows, args.dim, -(-tokens // 16)
    size = rows * tokens * dim * 2 * (source.itemsize + ops.FORMATS[fmt].itemsize)  # in and out
    count, device = min(clock.buffers(size), 64), clock.device
    k, v = (torch.randn(count, rows, tokens, dim, device=device).to(source) for _ in range(2))
    pools = [ops.Pool.allocate(fmt, dim, rows * entries, device=device) for _ in range(count)]
    copies = [torch.empty(2, rows, tokens, dim, dtype=ops.FORMATS[fmt], device=device) for _ in range(count)]
    for pool, target in zip(pools, copies, strict=True):  # memory comes at first touch: not part of an append
        pool.slabs[0].random_(0, 255)
        target.zero_()
    places = torch.randperm(rows * entries, device=device).to(torch.int32).view(rows, entries)
    pages = places.repeat_interleave(16, 1)[:, :tokens].contiguous()
    slots = (torch.arange(tokens, device=device) % 16).to(torch.uint8).repeat(rows, 1)
    start = torch.zeros(rows, dtype=torch.int32, device=device)

    def ours(i: int) -> None:
        j = i % count
        ops.append(k[j], v[j], pages, slots, [pools[j]], start)

    def copy(i: int) -> object:
        j = i % count
        copies[j][0].copy_(k[j])
        return copies[j][1].copy_(v[j])

    times, base = clock.measure([ours, copy], args.reps)
    ours(0)
    return {
        "kind": "append",
        "format": fmt,
        "from": str(source).removeprefix("torch."),
        "kv_rows": rows,
        "head_dim": dim,
        "tokens": tokens,
        **beside_copy(size, times, base, args, copy_gbps, digest(pools[0].payload())),
    }
