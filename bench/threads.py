"""Attention between torch's own operators: whether its threads and ours get in each other's way.

    python bench/threads.py --rounds 1000

Rounds of (torch matmul, attend) beside rounds of attend alone, in turns of one run; torch's workers spin after an operator, and
attend borrows them. Prints medians in microseconds and their ratio. Run it without OMP_WAIT_POLICY, as users do.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from kvstrata import ops
from kvstrata.cli.bench.common import filled

TURN = 20  # rounds of a kind at a time


def measure(args: argparse.Namespace) -> dict[str, float]:
    data = filled(args.format, args.kv_rows, args.tokens, args.dim)
    q = torch.randn(args.kv_rows, 1, args.group, args.dim).bfloat16()
    out = torch.empty_like(q)
    work = torch.empty(ops.attend_workspace_bytes(q, args.tokens // 16), dtype=torch.uint8)
    x, w = torch.randn(64, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
    taken: dict[bool, list[float]] = {False: [], True: []}
    for rounds in range(2 * args.rounds // TURN):
        after = bool(rounds % 2)
        for _ in range(TURN):
            if after:
                torch.nn.functional.linear(x, w)
            start = time.perf_counter_ns()
            ops.attend(q, data.pages, [data.pool], out=out, workspace=work)
            taken[after].append((time.perf_counter_ns() - start) / 1e3)
    alone, beside = (statistics.median(taken[after]) for after in (False, True))
    return {"alone_us": alone, "after_matmul_us": beside, "ratio": beside / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int8")
    for name, value in (("rounds", 1000), ("tokens", 2048), ("kv-rows", 8), ("group", 4), ("dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    for name, value in measure(args).items():
        print(f"{name:20s} {value:8.2f}")


if __name__ == "__main__":
    main()
