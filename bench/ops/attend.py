"""attend beside torch SDPA on the same keys and values, the group packed as query rows.

Every format is also timed beside bf16 pages of as many tokens, call by call: `time_to_bf16` is the ratio of the medians.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvstrata import ops, reference
from kvstrata.cli.bench.common import Filled, begin, buffers, digest, element, filled, measure, parser, run_facts, show
from kvstrata.cli.output import Output


def held(data: Filled) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v of the first row as its pages hold them."""
    if data.pool.format in ops.FORMATS:
        return data.k[0], data.v[0]
    return ops.dequantize(data.pages[0].contiguous(), [data.pool])


def error(q: torch.Tensor, data: Filled, out: torch.Tensor) -> float:
    """Relative error in norm of a few rows' outputs to f64 on the same pages."""
    rows = slice(0, 1)
    shape = (1, -1, 16, q.shape[-1])
    k, v = (t.double().reshape(shape) for t in held(data))
    read = torch.ones(1, q.shape[1], k.shape[1], 16, dtype=torch.bool)
    ref, _ = reference.attend(q[rows].double(), k, v, read)
    return float(((out[rows].double() - ref).norm(dim=-1) / ref.norm(dim=-1)).max())


def host_us(args: argparse.Namespace, fmt: str) -> float:
    """Of one call at 16 tokens, where the kernel has nothing to do."""
    data = filled(fmt, args.kv_rows, 16, args.dim)
    q = torch.randn(args.kv_rows, args.group, args.dim).to(element(fmt))
    return measure([lambda _: ops.attend(q, data.pages, [data.pool])], 200)[0].p50 * 1e3


def case(args: argparse.Namespace, fmt: str, full: list[Filled], read_gbps: float) -> dict[str, Any]:
    size = args.kv_rows * (args.tokens // 16) * ops.page_bytes(fmt, args.dim)
    data = [filled(fmt, args.kv_rows, args.tokens, args.dim, args.order) for _ in range(buffers(size))]
    q = torch.randn(args.kv_rows, args.queries, args.group, args.dim).to(element(fmt))
    out = torch.empty_like(q)
    work = torch.empty(ops.attend_workspace_bytes(q, args.tokens // 16), dtype=torch.uint8)
    logits = torch.empty(args.kv_rows, args.group, args.queries, args.tokens // 16, 16) if args.mass else None
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

    times, on_bf16, base = measure([ours, bf16, sdpa], args.reps)
    ours(0)
    gbps = size / times.p50 / 1e6
    return {
        "kind": "attend",
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
        "host_us": host_us(args, fmt),
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
        "speedup_vs_flashinfer": None,
        "speedup_vs_flash_attn": None,
    }


def main() -> None:
    p = parser(__doc__ or "", format="f32,bf16,f16,int8,int4,int2")
    p.add_argument("--queries", type=int, default=1)
    p.add_argument("--order", choices=["random", "linear"], default="random")
    p.add_argument("--mass", action="store_true")
    args = p.parse_args()
    begin(args)
    run = run_facts(args)
    size = args.kv_rows * (args.tokens // 16) * ops.page_bytes("bf16", args.dim)
    full = [filled("bf16", args.kv_rows, args.tokens, args.dim, args.order) for _ in range(buffers(size))]
    show("attend", run, [case(args, fmt, full, run["read_gbps"]) for fmt in args.format.split(",")], Output(args.json))


if __name__ == "__main__":
    main()
