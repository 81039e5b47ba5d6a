"""select and score_pages beside a scan of f32 page means by torch: a matrix product, the sum over heads, and top K.

One call per layer of a decode step: all KV heads, summaries of every page. The baseline is the least that a selector by
means can do: no spread, no count, no shares of mass. Not called select.py: a script's folder comes first in the search for
modules, and Python has a module `select` of its own.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.common import SLOTS, begin, buffers, digest, measure, parser, run_facts, show
from kvstrata.cli.output import Output


def random_blocks(args: argparse.Namespace, pages: int) -> Tensor:
    """Summaries u8 [R, B, bytes]: random codes, scales and spreads as Gaussian keys have them."""
    blocks = torch.randint(1, 256, (args.kv_rows, pages // SLOTS, ops.summary_bytes(args.dim))).to(torch.uint8)
    facts = torch.rand(args.kv_rows, pages // SLOTS, 3 * SLOTS) * 0.01
    blocks[..., SLOTS * args.dim :] = facts.view(torch.uint8)
    return blocks


def torch_scan(q: Tensor, mean: Tensor, most: int) -> Tensor:
    return (q @ mean.mT).sum(1).topk(most).indices


def case(args: argparse.Namespace, tokens: int, scan_only: bool, read_gbps: float) -> dict[str, Any]:
    pages = tokens // SLOTS
    size = args.kv_rows * pages // SLOTS * ops.summary_bytes(args.dim)
    count = 1 if args.cached else buffers(size)
    blocks = [random_blocks(args, pages) for _ in range(count)]
    means = [torch.randn(args.kv_rows, pages, args.dim) for _ in range(1 if args.cached else buffers(4 * size))]
    visible = torch.full((args.kv_rows, pages), 0xFFFF).to(torch.uint16)
    q = torch.randn(args.kv_rows, args.group, args.dim)
    base = torch.zeros(args.kv_rows, args.group)

    def ours(i: int) -> object:
        if scan_only:
            return ops.score_pages(q, blocks[i % count], visible)
        return ops.select(q, blocks[i % count], visible, args.most, lse_base=base)

    times, theirs = measure([ours, lambda i: torch_scan(q, means[i % len(means)], args.most)], args.reps)
    entries, _, rest = ops.select(q, blocks[0], visible, args.most, lse_base=base)
    gbps = size / times.p50 / 1e6
    return {
        "kind": "score_pages" if scan_only else "select",
        "kv_rows": args.kv_rows,
        "group": args.group,
        "head_dim": args.dim,
        "tokens": tokens,
        "pages": pages,
        "most": args.most,
        "bytes_read": size,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_read": gbps / read_gbps,
        "digest": digest(entries, rest),
        "baseline": {"name": "torch f32 scan and topk", "ms_p50": theirs.p50},
        "speedup_vs_torch": theirs.p50 / times.p50,
    }


def main() -> None:
    p = parser(__doc__ or "", reps=51)
    p.set_defaults(tokens=None)
    p.add_argument("--most", type=int, default=12, help="pages of each row, K; default: %(default)s")
    p.add_argument("--cached", action="store_true", help="the same summaries every time, as a step just left them")
    args = p.parse_args()
    begin(args)
    run = run_facts(args)
    sizes = [args.tokens] if args.tokens else [8192, 32768, 131072]
    rows = [case(args, tokens, scan, run["read_gbps"]) for tokens in sizes for scan in (False, True)]
    show("score_pages", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
