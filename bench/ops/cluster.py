"""cluster beside dense attention of the same chunk: what pages by meaning add to a prompt.

A row's segment of keys at a time, all KV heads in one call; the baseline is torch's causal SDPA of that chunk with --group
query heads to a KV head, in f32 and in bf16. Cases: keys about topics and keys without any, with the summaries of the new
pages (of a bf16 cache) made after it, and cluster_greedy instead. Dense attention of a chunk reads earlier chunks too, so
this is its least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cli.bench.clock import DEVICES, Clock
from kvstrata.cli.bench.common import SLOTS, begin, digest, filled, parser, run_facts, show
from kvstrata.cli.output import Output

TOPICS_OF = 16  # tokens to a topic, on average


def keys_of(args: argparse.Namespace, clock: Clock, topics: bool) -> Tensor:
    shape = args.kv_rows, args.tokens, args.dim
    if not topics:
        return torch.randn(shape, device=clock.device)
    centres = torch.randn(args.kv_rows, args.tokens // TOPICS_OF, args.dim, device=clock.device)
    label = torch.randint(centres.shape[1], shape[:2], device=clock.device)
    return centres.gather(1, label.unsqueeze(-1).expand(shape)) + torch.randn(shape, device=clock.device)


def attention(args: argparse.Namespace, clock: Clock, dtype: torch.dtype) -> Callable[[int], object]:
    q = torch.randn(1, args.kv_rows * args.group, args.tokens, args.dim, dtype=dtype, device=clock.device)
    k, v = (torch.randn(1, args.kv_rows, args.tokens, args.dim, dtype=dtype, device=clock.device) for _ in range(2))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda _: sdpa(q, k, v, is_causal=True, enable_gqa=True)


def case(args: argparse.Namespace, clock: Clock, topics: bool, iters: int | None, summaries: bool) -> dict[str, Any]:
    """iters None: cluster_greedy."""
    keys = [keys_of(args, clock, topics) for _ in range(2)]
    stored = filled("bf16", args.kv_rows, args.tokens, args.dim, device=clock.device)

    def made(i: int) -> tuple[Tensor, Tensor]:
        return ops.cluster_greedy(keys[i]) if iters is None else ops.cluster(keys[i], iters=iters)

    def ours(i: int) -> None:
        made(i % 2)
        if summaries:
            ops.summarize(stored.pages, [stored.pool])

    times, wide, narrow = clock.measure(
        [ours, attention(args, clock, torch.float32), attention(args, clock, torch.bfloat16)],
        args.reps,
    )
    pages = args.tokens // SLOTS
    products = 2 * args.kv_rows * args.tokens * pages * args.dim * (1 if iters is None else iters + 1)
    return {
        "kind": "cluster",
        "packer": "greedy" if iters is None else "k-means",
        "keys": "topics" if topics else "random",
        "iters": iters or 0,
        "then": "summarize" if summaries else "",
        "kv_rows": args.kv_rows,
        "group": args.group,
        "head_dim": args.dim,
        "tokens": args.tokens,
        "reps": args.reps,
        **times.row(),
        "gflops": products / times.p50 / 1e6,
        "digest": digest(*made(0)),
        "baseline": {"name": "torch SDPA of the chunk", "ms_p50_f32": wide.p50, "ms_p50_bf16": narrow.p50},
        "share_of_sdpa_f32": times.p50 / wide.p50,
        "share_of_sdpa_bf16": times.p50 / narrow.p50,
    }


def main() -> None:
    args = parser(__doc__ or "", devices=DEVICES, tokens=4096, reps=5).parse_args()
    clock = begin(args)
    run = run_facts(args, clock)
    rows = [
        case(args, clock, True, 4, False),
        case(args, clock, True, 10, False),
        case(args, clock, False, 4, False),
        case(args, clock, True, 4, True),
        case(args, clock, True, None, False),
    ]
    show("cluster", run, rows, Output(args.json))


if __name__ == "__main__":
    main()
