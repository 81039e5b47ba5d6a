"""Time quantizing whole pages, and dequantizing them, beside a torch copy of the full pages' bytes."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.clock import Clock
from kvstrata.cli.bench.common import SLOTS, begin, beside_copy, digest, filled, op_arguments, run_facts, show
from kvstrata.cli.output import Output

SOURCE = {"int8": "bf16", "int4": "bf16", "int2": "bf16"}


def arguments(parser: argparse.ArgumentParser) -> None:
    op_arguments(parser, tuple(SOURCE), tokens=4096, format=",".join(SOURCE))


def run(args: argparse.Namespace, out: Output) -> int:
    clock = begin(args)
    facts = run_facts(args, clock)
    rows = []
    for fmt in args.format.split(","):
        rows += case(args, clock, fmt, "pages", facts["copy_gbps"])
        rows += case(args, clock, fmt, "scattered", facts["copy_gbps"])[:1]
    show("quantize", facts, rows, out)
    return 0


def page_moves(source: Tensor, target: Tensor, order: str) -> Tensor:
    """i32 [P * 16, 4]: every slot of each source page; `scattered`: from slots all over the source pages."""
    at = torch.arange(source.numel() * SLOTS, device=source.device)
    token = torch.randperm(len(at), device=source.device) if order == "scattered" else at
    columns = (source[token // SLOTS], token % SLOTS, target[at // SLOTS], at % SLOTS)
    return torch.stack(columns, 1).to(torch.int32)


def case(args: argparse.Namespace, clock: Clock, fmt: str, order: str, copy_gbps: float) -> list[dict[str, Any]]:
    """Of quantize and of dequantize, a row each."""
    pages = args.kv_rows * (args.tokens // SLOTS)
    size = pages * (ops.page_bytes(SOURCE[fmt], args.dim) + ops.page_bytes(fmt, args.dim))  # read and written
    count, device = clock.buffers(size), clock.device
    data = [filled(SOURCE[fmt], args.kv_rows, args.tokens, args.dim, device=device) for _ in range(count)]
    target = ops.Pool.allocate(fmt, args.dim, pages, device=device)
    target.slabs[0].zero_()
    ids = torch.arange(pages, dtype=torch.int32, device=device) + ops.make_page(1, 0, 0)
    moves = [page_moves(d.pages.view(-1), ids, order) for d in data]
    centre = torch.randn(args.kv_rows, args.dim, device=device)
    rows = (
        torch.arange(pages * SLOTS, device=device)
        .div(args.tokens, rounding_mode="floor")
        .clamp(max=args.kv_rows - 1)
        .int()
    )
    copies = torch.zeros_like(data[0].k)

    def quantize(i: int) -> None:
        j = i % count
        ops.quantize(moves[j], [data[j].pool, target], centre, rows)

    def dequantize(i: int) -> object:
        return ops.dequantize(ids, [data[0].pool, target])

    def copy(i: int) -> object:
        j = i % count
        return copies.copy_(data[j].k), copies.copy_(data[j].v)

    *ours, base = clock.measure([quantize, dequantize, copy], args.reps)
    quantize(0)
    rows_out = []
    for kind, times in zip(("quantize", "dequantize"), ours, strict=True):
        rows_out.append(
            {
                "kind": kind,
                "format": fmt,
                "from": SOURCE[fmt],
                "order": order,
                "kv_rows": args.kv_rows,
                "head_dim": args.dim,
                "tokens": args.tokens,
                "ns_per_token": 1e6 * times.p50 / (pages * SLOTS),
                **beside_copy(size, times, base, args, copy_gbps, digest(target.payload())),
            }
        )
    return rows_out
