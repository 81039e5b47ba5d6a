"""summarize_groups beside torch: the means of 32 pages' means, each counted as its slots, and their 8-bit codes.

Bytes are the blocks of summaries, each once. The baseline's means are f32 and stand ready.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.clock import Clock
from kvstrata.cli.bench.common import SLOTS, begin, digest, parser, run_facts, show
from kvstrata.cli.bench.select import all_visible, random_blocks
from kvstrata.cli.output import Output


def torch_groups(mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    whole = mean.shape[1] // ops.GROUP_PAGES * ops.GROUP_PAGES
    n = count[:, :whole].view(len(mean), -1, ops.GROUP_PAGES, 1)
    m = (n * mean[:, :whole].view(*n.shape[:3], -1)).sum(2) / n.sum(2)
    scale = m.abs().amax(-1, keepdim=True) / 127
    return (torch.round(m / scale) + 128).to(torch.uint8), scale


def case(args: argparse.Namespace, clock: Clock, tokens: int, read_gbps: float) -> dict[str, Any]:
    pages, device = tokens // SLOTS, clock.device
    size = args.kv_rows * -(-pages // SLOTS) * ops.summary_bytes(args.dim)
    count, means = clock.buffers(size), clock.buffers(4 * size)
    blocks = [random_blocks(args, pages, device) for _ in range(count)]
    mean = [torch.randn(args.kv_rows, pages, args.dim) for _ in range(means)]
    visible, slots = all_visible(args, pages, device), torch.full((args.kv_rows, pages), 16.0)
    times, base = clock.measure(
        [
            lambda i: ops.summarize_groups(blocks[i % count], visible, head_dim=args.dim),
            lambda i: torch_groups(mean[i % means], slots),
        ],
        args.reps,
    )
    gbps = size / times.p50 / 1e6
    return {
        "kind": "summarize_groups",
        "kv_rows": args.kv_rows,
        "head_dim": args.dim,
        "pages": pages,
        "bytes_read": size,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_read": gbps / read_gbps,
        "digest": digest(ops.summarize_groups(blocks[0], visible, head_dim=args.dim)),
        "baseline": {"name": "torch operators on f32 means", "ms_p50": base.p50},
        "speedup_vs_torch": base.p50 / times.p50,
    }


def main() -> None:
    args = parser(__doc__ or "", reps=31).parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    sizes = (32_768, 262_144)
    show("summarize_groups", run, [case(args, clock, n, run["read_gbps"]) for n in sizes], Output(args.json))


if __name__ == "__main__":
    main()
