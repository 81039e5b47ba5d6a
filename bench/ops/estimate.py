"""estimate of pages outside a selection, beside torch: a product with f32 means, softmax, a product with values.

The zone is every page, or a quarter of them at random. Bytes are the blocks that the zone lies in, each once; ours looks at
what it scores and at what it adds up one after the other. The baseline's means and values are f32, already of the zone alone.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import SLOTS, begin, digest, parser, run_facts, show
from kvstrata.cli.output import Output


def random_blocks(args: argparse.Namespace, clock: Clock, pages: int) -> Tensor:
    """Blocks u8 [R, B, bytes] of kind mean_value: random codes, scales and spreads as Gaussian keys have them, whole pages."""
    size, mean = ops.summary_bytes(args.dim, "mean_value"), SLOTS * args.dim
    made = torch.randint(1, 256, (args.kv_rows, pages // SLOTS, size), device=clock.device).to(torch.uint8)
    made[..., mean : mean + 192] = (torch.rand(*made.shape[:2], 48, device=clock.device) * 0.01).view(torch.uint8)
    made[..., -128:-64] = (torch.rand(*made.shape[:2], 16, device=clock.device) * 0.01).view(torch.uint8)
    made[..., -64:] = torch.full((*made.shape[:2], 16), 0xFFFF, dtype=torch.int32, device=clock.device).view(
        torch.uint8
    )
    return made


def torch_estimate(q: Tensor, mean: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    x = q @ mean.mT * q.shape[-1] ** -0.5
    return torch.softmax(x, -1) @ value, torch.logsumexp(x, -1)


def case(args: argparse.Namespace, clock: Clock, share: float, read_gbps: float) -> dict[str, Any]:
    pages = args.tokens // SLOTS
    kept = torch.rand(pages, device=clock.device) < share
    zone = kept.nonzero().flatten().to(torch.int32).expand(args.kv_rows, -1).contiguous()
    blocks_read = int(kept.view(-1, SLOTS).any(1).sum())
    size = args.kv_rows * blocks_read * ops.summary_bytes(args.dim, "mean_value")
    count, theirs_count = clock.buffers(size), clock.buffers(args.kv_rows * zone.shape[1] * args.dim * 8)
    blocks = [random_blocks(args, clock, pages) for _ in range(count)]
    dense = [torch.randn(2, args.kv_rows, zone.shape[1], args.dim, device=clock.device) for _ in range(theirs_count)]
    visible = torch.full((args.kv_rows, pages), -1, dtype=torch.int16, device=clock.device).view(torch.uint16)
    q = torch.randn(args.kv_rows, args.group, args.dim, device=clock.device)
    times, base = clock.measure(
        [
            lambda i: ops.estimate(q, blocks[i % count], visible, zone),
            lambda i: torch_estimate(q, *dense[i % theirs_count]),
        ],
        args.reps,
    )
    gbps = size / times.p50 / 1e6
    return {
        "kind": "estimate",
        "kv_rows": args.kv_rows,
        "group": args.group,
        "head_dim": args.dim,
        "pages": pages,
        "zone": zone.shape[1],
        "bytes_read": size,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_read": gbps / read_gbps,
        "digest": digest(*ops.estimate(q, blocks[0], visible, zone)),
        "baseline": {"name": "torch operators on f32 means", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES, reps=31).parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    show("estimate", run, [case(args, clock, share, run["read_gbps"]) for share in (1.0, 0.25)], Output(args.json))


if __name__ == "__main__":
    main()
