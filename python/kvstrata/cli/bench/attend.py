"""Time attention over stored pages beside torch SDPA on the same keys and values, the group packed as query rows.

On CUDA also beside flash-attn and FlashInfer, where they are installed and take the format of the queries.
Every format is also timed beside bf16 pages of as many tokens, call by call: `time_to_bf16` is the ratio of the medians.
`err_rel` is to f64 attention over what the pages hold. The seed alone decides a row's digest: neither the other formats of
the run nor the number of buffers do.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops
from kvstrata.cli.bench.clock import Clock
from kvstrata.cli.bench.common import Filled, begin, digest, element, filled, op_arguments, run_facts, show
from kvstrata.cli.bench.peers import NAMES, peers
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output

FORMATS = "bf16,int8,int4,int2"
COMPARED = 16  # queries of the first row, in f64
HOST_REPS = 200


def arguments(parser: argparse.ArgumentParser, queries: int = 1, reps: int = 15) -> None:
    op_arguments(parser, format=FORMATS, reps=reps)
    parser.add_argument(
        "--queries", metavar="N", type=positive, default=queries, help="of the call; default: %(default)s"
    )
    parser.add_argument("--order", choices=("random", "linear"), default="random", help="of pages in the slab")
    parser.add_argument("--mass", action="store_true", help="also the attention mass of each slot")


def run(args: argparse.Namespace, out: Output) -> int:
    return timed(args, out, "attend")


def timed(args: argparse.Namespace, out: Output, kind: str) -> int:
    """One row for each format."""
    clock = begin(args)
    facts = run_facts(args, clock)
    full = stored(args, clock, "bf16")
    rows = [case(args, clock, kind, fmt, full, facts["read_gbps"]) for fmt in args.format.split(",")]
    show(kind, facts, rows, out)
    return 0


def bytes_read(args: argparse.Namespace, fmt: str) -> int:
    """By a call: every page once."""
    return int(args.kv_rows * (args.tokens // 16) * ops.page_bytes(fmt, args.dim))


def stored(args: argparse.Namespace, clock: Clock, fmt: str) -> list[Filled]:
    """Buffers of pages to rotate over."""
    count = clock.buffers(bytes_read(args, fmt))
    return [filled(fmt, args.kv_rows, args.tokens, args.dim, args.order, clock.device) for _ in range(count)]


def held(data: Filled) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v of the first row as its pages hold them."""
    if data.pool.format in ops.FORMATS:
        return data.k[0], data.v[0]
    return ops.dequantize(data.pages[0].contiguous(), [data.pool])


def error(q: torch.Tensor, data: Filled, out: torch.Tensor) -> float:
    """Of q, out [R, T, G, D]: the largest relative error in norm to f64 on the same pages, over a few of its heads."""
    shape = (1, 1, -1, q.shape[-1])
    k, v = (t.double().reshape(shape) for t in held(data))
    few, found = (t[:1, :COMPARED].double().reshape(shape) for t in (q, out))
    exact = torch.nn.functional.scaled_dot_product_attention(few, k, v)
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def host_us(args: argparse.Namespace, clock: Clock, fmt: str) -> float:
    """Of one call at 16 tokens, where the kernel has nothing to do."""
    data = filled(fmt, args.kv_rows, 16, args.dim, device=clock.device)
    q = torch.randn(args.kv_rows, args.group, args.dim, device=clock.device).to(element(fmt))
    return clock.host(lambda: ops.attend(q, data.pages, [data.pool]), HOST_REPS).p50 * 1e3


def case(
    args: argparse.Namespace, clock: Clock, kind: str, fmt: str, full: list[Filled], read_gbps: float
) -> dict[str, Any]:
    """One format's row; `full` are bf16 pages of as many tokens."""
    size, device = bytes_read(args, fmt), clock.device
    torch.manual_seed(args.seed)
    q = torch.randn(args.kv_rows, args.queries, args.group, args.dim, device=device).to(element(fmt))
    data = stored(args, clock, fmt)
    out = torch.empty_like(q)
    work = torch.empty(ops.attend_workspace_bytes(q, args.tokens // 16), dtype=torch.uint8, device=device)
    slots = (args.kv_rows, args.group, args.queries, args.tokens // 16, 16)
    logits = torch.empty(slots, device=device) if args.mass else None
    packed = q.transpose(1, 2).reshape(1, args.kv_rows, -1, args.dim).contiguous()

    def ours(i: int) -> object:
        d = data[i % len(data)]
        return ops.attend(q, d.pages, [d.pool], out=out, workspace=work, want_logits=logits, want_mass=args.mass)

    def sdpa(i: int) -> object:
        d = data[i % len(data)]
        return torch.nn.functional.scaled_dot_product_attention(packed, d.k.unsqueeze(0), d.v.unsqueeze(0))

    def bf16(i: int) -> object:
        d = full[i % len(full)]
        return ops.attend(q, d.pages, [d.pool], out=out, workspace=work, want_logits=logits, want_mass=args.mass)

    others = peers(clock, q, data)
    times, on_bf16, base, *rest = clock.measure([ours, bf16, sdpa, *others.values()], args.reps)
    speedups = {name: theirs.p50 / times.p50 for name, theirs in zip(others, rest, strict=True)}
    ours(0)
    gbps = size / times.p50 / 1e6
    return {
        "kind": kind,
        "format": fmt,
        "kv_rows": args.kv_rows,
        "group": args.group,
        "queries": args.queries,
        "head_dim": args.dim,
        "tokens": args.tokens,
        "slots": 16,
        "arrangement": 1,
        "order": args.order,
        "mass": args.mass,
        "bytes_read": size,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_read": gbps / read_gbps,
        "host_us": host_us(args, clock, fmt),
        "err_rel": error(q, data[0], out),
        "digest": digest(out),
        "baseline": {
            "name": "torch sdpa",
            "version": torch.__version__,
            "dtype": str(element(fmt)).removeprefix("torch."),
            "packed_gqa": True,
            "ms_p50": base.p50,
        },
        "time_to_bf16": times.p50 / on_bf16.p50,
        "speedup_vs_sdpa": base.p50 / times.p50,
        **{f"speedup_vs_{name}": speedups.get(name) for name in NAMES},
    }
