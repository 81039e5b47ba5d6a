"""Attention between torch's own operators: whether its threads and ours get in each other's way.

    python bench/threads.py --rounds 1000

Also how much of its speed a Python loop keeps while another thread attends: attend holds no lock of Python's.

Rounds of (torch matmul, attend) beside rounds of attend alone, in turns of one run; torch's workers spin after an operator, and
attend borrows them. Prints medians in microseconds and their ratio. Run it without OMP_WAIT_POLICY, as users do.
"""

from __future__ import annotations

import argparse
import statistics
import threading
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


def loops(seconds: float) -> float:
    """Turns of a Python loop per second."""
    turns, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        for _ in range(1000):
            turns += 1
    return turns / taken


def measure_loop(args: argparse.Namespace) -> dict[str, float]:
    """Share of its speed that a loop keeps beside attends over 16 times as many tokens on one thread; turns about, medians."""
    tokens = 16 * args.tokens
    data = filled(args.format, args.kv_rows, tokens, args.dim)
    q = torch.randn(args.kv_rows, 1, args.group, args.dim).bfloat16()
    out, stop, go = torch.empty_like(q), threading.Event(), threading.Event()
    work = torch.empty(ops.attend_workspace_bytes(q, tokens // 16), dtype=torch.uint8)

    def attend() -> None:
        while not stop.is_set():
            if go.wait(0.1):
                ops.attend(q, data.pages, [data.pool], out=out, workspace=work, threads=1)

    worker = threading.Thread(target=attend)
    worker.start()
    found: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(10):
        go.set() if turn % 2 else go.clear()
        time.sleep(0.2)
        found[bool(turn % 2)].append(loops(0.5))
    stop.set()
    worker.join()
    return {"loop_beside_attend": statistics.median(found[True]) / statistics.median(found[False])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int8")
    for name, value in (("rounds", 1000), ("tokens", 2048), ("kv-rows", 8), ("group", 4), ("dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    for name, value in (measure(args) | measure_loop(args)).items():
        print(f"{name:20s} {value:8.2f}")


if __name__ == "__main__":
    main()
