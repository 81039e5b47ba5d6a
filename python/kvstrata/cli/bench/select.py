"""Time the selection of pages by their summaries beside a scan of f32 page means by torch: a product, a sum over heads, top K.

One call per layer of a decode step: all KV heads, summaries of every page. The baseline is the least that a selector by means
can do: no spread, no count, no shares of mass. The kinds: `score_pages`, the scan alone; `select`; by one mean and on the CPU
`two levels`, which ranks groups of 32 pages first and looks into a quarter of them, beside `select`; and `select, attend`, with
the attention to the selected pages, to sinks and tail, and the merge, beside our attention to all pages in bf16.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.clock import Call, Clock, Times
from kvstrata.cli.bench.common import SLOTS, begin, digest, filled, op_arguments, run_facts, show
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output
from kvstrata.summaries import SummaryKind

STEADY = 4
"""Pages of sinks and tail."""
DRAWN = 64
"""Blocks of summaries that are made of keys."""
KINDS: tuple[SummaryKind, ...] = ("mean", "halves", "quarters", "bounds")


def arguments(parser: argparse.ArgumentParser) -> None:
    op_arguments(parser, reps=51, tokens=None)
    parser.add_argument("--most", type=positive, default=12, help="pages of each row, K; default: %(default)s")
    parser.add_argument(
        "--kind", choices=KINDS, default="halves", help="of summary; %(default)s, which icecache and strata rank by"
    )
    parser.add_argument("--cached", action="store_true", help="the same summaries every time, as a step just left them")


def run(args: argparse.Namespace, out: Output) -> int:
    clock = begin(args)
    facts = run_facts(args, clock)
    sizes = [args.tokens] if args.tokens else [8192, 32768, 131072]
    kinds = ("score_pages", "select")
    rows = [scan(args, clock, tokens, kind, facts["read_gbps"]) for tokens in sizes for kind in kinds]
    if args.device == "cpu" and args.kind == "mean":
        longer = [args.tokens] if args.tokens else [131_072, 1_048_576]
        rows += [levels(args, clock, tokens, facts["read_gbps"]) for tokens in longer]
    rows += [whole(args, clock, tokens, facts["read_gbps"]) for tokens in sizes[:2]]
    show("select", facts, rows, out)
    return 0


def random_blocks(args: argparse.Namespace, pages: int, device: torch.device) -> Tensor:
    """Summaries u8 [R, B, bytes] of pages of Gaussian keys; a few of them, drawn again and again: no time depends on it."""
    drawn = filled("bf16", 1, SLOTS * SLOTS * min(DRAWN, -(-pages // SLOTS)), args.dim, device=device)
    blocks = ops.summarize(drawn.pages, [drawn.pool], kind=args.kind)[0]
    places = torch.randint(0, blocks.shape[0], (args.kv_rows, -(-pages // SLOTS)), device=device)
    return blocks[places]


def all_visible(args: argparse.Namespace, pages: int, device: torch.device) -> Tensor:
    """Masks u16 [R, M]."""
    return torch.full((args.kv_rows, pages), -1, dtype=torch.int16, device=device).view(torch.uint16)


def torch_scan(q: Tensor, mean: Tensor, most: int) -> Tensor:
    return (q @ mean.mT).sum(1).topk(min(most, mean.shape[1])).indices


def scan(args: argparse.Namespace, clock: Clock, tokens: int, kind: str, read_gbps: float) -> dict[str, Any]:
    """A row of score_pages or of select, beside torch."""
    pages, device = tokens // SLOTS, clock.device
    size = args.kv_rows * -(-pages // SLOTS) * ops.summary_bytes(args.dim, args.kind)
    count, means = (1, 1) if args.cached else (clock.buffers(size), clock.buffers(4 * size))
    blocks = [random_blocks(args, pages, device) for _ in range(count)]
    mean = [torch.randn(args.kv_rows, pages, args.dim, device=device) for _ in range(means)]
    visible = all_visible(args, pages, device)
    q = torch.randn(args.kv_rows, args.group, args.dim, device=device)
    base = torch.zeros(args.kv_rows, args.group, device=device)

    def ours(i: int) -> object:
        if kind == "score_pages":
            return ops.score_pages(q, blocks[i % count], visible, kind=args.kind)
        return ops.select(q, blocks[i % count], visible, args.most, kind=args.kind, lse_base=base)

    calls: list[Call] = [ours, lambda i: torch_scan(q, mean[i % means], args.most)]
    times, theirs = clock.measure(calls, args.reps)
    entries, _, rest = ops.select(q, blocks[0], visible, args.most, kind=args.kind, lse_base=base)
    found = digest(entries, rest)
    return _row(args, kind, tokens, size, times, read_gbps, found, ("torch f32 scan and topk", theirs))


def levels(args: argparse.Namespace, clock: Clock, tokens: int, read_gbps: float) -> dict[str, Any]:
    """A row of select in two levels, beside one; bytes are those of all groups and of what is looked into."""
    pages, device, share = tokens // SLOTS, clock.device, 0.25
    size = args.kv_rows * -(-pages // SLOTS) * ops.summary_bytes(args.dim, args.kind)
    count = 1 if args.cached else clock.buffers(size)
    blocks = [random_blocks(args, pages, device) for _ in range(count)]
    visible = all_visible(args, pages, device)
    groups = [ops.summarize_groups(b, visible, head_dim=args.dim) for b in blocks]
    q = torch.randn(args.kv_rows, args.group, args.dim, device=device)
    base = torch.zeros(args.kv_rows, args.group, device=device)

    def select(i: int, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
        level = groups[i % count] if grouped else None
        return ops.select(q, blocks[i % count], visible, args.most, lse_base=base, groups=level, expand=share)

    times, flat = clock.measure([lambda i: select(i, True), lambda i: select(i, False)], args.reps)
    entries, _, rest = select(0, True)
    read = int(share * size) + groups[0].numel()
    return _row(
        args, "two levels", tokens, read, times, read_gbps, digest(entries, rest), ("select in one level", flat)
    )


def whole(args: argparse.Namespace, clock: Clock, tokens: int, read_gbps: float) -> dict[str, Any]:
    """A row of all that a selecting step does in a layer, beside attention to all pages."""
    page, device = ops.page_bytes("bf16", args.dim), clock.device
    pages, size = tokens // SLOTS, args.kv_rows * (tokens // SLOTS) * page
    data = [filled("bf16", args.kv_rows, tokens, args.dim, device=device) for _ in range(clock.buffers(size))]
    blocks = [ops.summarize(d.pages, [d.pool], kind=args.kind) for d in data]
    visible = all_visible(args, pages, device)
    q = torch.randn(args.kv_rows, args.group, args.dim, device=device).bfloat16()
    steady = [d.pages[:, :STEADY].contiguous() for d in data]

    def ours(i: int) -> tuple[Tensor, Tensor]:
        d = data[i % len(data)]
        first, base = ops.attend(q, steady[i % len(data)], [d.pool], out=torch.empty(q.shape, device=device))
        entries, _, _ = ops.select(q, blocks[i % len(data)], visible, args.most, kind=args.kind, lse_base=base)
        chosen = d.pages.gather(1, entries.clamp_min(0).long()).masked_fill(entries < 0, -1)
        second, lse = ops.attend(q, chosen, [d.pool], out=torch.empty(q.shape, device=device))
        return ops.merge([first, second], [base, lse])

    def everything(i: int) -> object:
        d = data[i % len(data)]
        return ops.attend(q, d.pages, [d.pool])

    times, theirs = clock.measure([ours, everything], args.reps)
    read = args.kv_rows * (-(-pages // SLOTS) * ops.summary_bytes(args.dim, args.kind) + (args.most + STEADY) * page)
    found = digest(*ours(0))
    return _row(args, "select, attend", tokens, read, times, read_gbps, found, ("attend to all pages", theirs))


def _row(
    args: argparse.Namespace,
    kind: str,
    tokens: int,
    size: int,
    times: Times,
    read_gbps: float,
    found: str,
    baseline: tuple[str, Times],
) -> dict[str, Any]:
    """What a row says of a call that reads so many bytes, beside a baseline; found: its digest."""
    gbps, (name, theirs) = size / times.p50 / 1e6, baseline
    return {
        "kind": kind,
        "summaries": args.kind,
        "kv_rows": args.kv_rows,
        "group": args.group,
        "head_dim": args.dim,
        "tokens": tokens,
        "pages": tokens // SLOTS,
        "most": args.most,
        "bytes_read": size,
        "reps": args.reps,
        "gbps": gbps,
        "share_read": gbps / read_gbps,
        "digest": found,
        **times.row(),
        "baseline": {"name": name, "ms_p50": theirs.p50},
        "speedup": theirs.p50 / times.p50,
    }
