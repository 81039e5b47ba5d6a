"""Far pages on their way while a step goes on: what a step of one token waits for the disk, with reading ahead and without.

    python bench/fetch.py --path /folder/on/the/disk --tokens 8192 --layers 4

Steps over a cache that archives all, in turns of one run, with the same queries: *near*, no Far tier; *wait*, a page that is
not Near is read when it is its turn; *ahead*, as caches do it. Warm: the system holds the files in memory; cold: it drops them
before each step. A step's time is that of its layers' attention; what it waits for is that beyond *near*. ``--near-pages 0``:
rows keep no copies, so each page is read each time, and those of the last step are asked for a layer ahead; ``--work``: of a
layer that is no attention, a matrix product of that width, not timed. Prints microseconds per layer, p50 and p99, and the
ratio of the waits. On a file system that lies in memory there is nothing to wait for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace

import torch

from kvstrata import Cache, LayerSpec, Sequence, Shape
from kvstrata.policy import icecache
from kvstrata.recall import Archive, Far, PageMeans, Position

TURN = 16  # steps of a kind at a time, of which the first QUIET are not counted
QUIET = 4


def drop(cache: Cache) -> None:
    """The system holds nothing of the cache's files."""
    for file, _ in cache._slabs._files.values():
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def bring(cache: Cache) -> None:
    """It holds them all."""
    for file, size in cache._slabs._files.values():
        for place in range(0, size, 1 << 20):
            os.pread(file, 1 << 20, place)


class Run:
    """Caches of the same tokens, one with a Far tier, and the queries of their steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        spec = LayerSpec(args.kv_heads, args.kv_heads * args.group, args.dim)
        self.spec, self.layers, self.work = spec, args.layers, args.work
        policy = replace(
            icecache(args.budget),
            planner=Archive(Position()),
            selector=PageMeans(budget=args.budget, near_pages=args.near_pages),
        )
        shape = Shape([spec] * args.layers, torch.bfloat16)
        self.near, self.far = (
            Cache(shape, policy=policy, far=None),
            Cache(shape, policy=policy, far=Far(path=args.path)),
        )
        self.weight = torch.randn(args.work, args.work).bfloat16() if args.work else None
        self.seqs: dict[Cache, list[Sequence]] = {}
        for cache in (self.near, self.far):
            generator = torch.Generator().manual_seed(0)
            self.seqs[cache] = cache.new(1)
            for first in range(0, args.tokens, 2048):
                n = min(2048, args.tokens - first)
                with cache.step(self.seqs[cache], [n]) as step:
                    for layer in range(args.layers):
                        q, k, v = (
                            torch.randn(n, h, args.dim, generator=generator).bfloat16()
                            for h in (spec.q_heads, args.kv_heads, args.kv_heads)
                        )
                        step.attend(layer, q, k, v)

    def turn(self, cache: Cache, cold: bool, seed: int, keep: float) -> list[float]:
        """Microseconds per layer of each step; of a query so much is that of the step before it."""
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(self.layers, 1, self.spec.q_heads, self.spec.head_dim, generator=generator)
        nothing = torch.zeros(1, self.spec.kv_heads, self.spec.head_dim).bfloat16()
        x = torch.ones(1, self.work or 1).bfloat16()
        found = []
        bring(cache)
        for n in range(TURN):
            q = keep * q + (1 - keep**2) ** 0.5 * torch.randn(q.shape, generator=generator)
            asked = (4 * q).bfloat16()
            if cold:
                drop(cache)
            step, taken = cache.step(self.seqs[cache], [1]).open(), 0
            for layer in range(self.layers):
                start = time.perf_counter_ns()
                step.attend(layer, asked[layer], nothing, nothing)
                taken += time.perf_counter_ns() - start
                if self.weight is not None:
                    x @ self.weight
            step.rollback()
            if n >= QUIET:
                found.append(taken / self.layers / 1e3)
        return found


def measure(args: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(args.threads)
    run = Run(args)
    taken: dict[str, list[float]] = {n: [] for n in ("near", "wait_warm", "ahead_warm", "wait_cold", "ahead_cold")}
    pages: dict[str, list[int]] = {n: [0, 0] for n in taken}
    for turn in range(args.turns):
        for name, times in taken.items():
            cache = run.near if name == "near" else run.far
            cache._store.set_ahead(name.startswith("ahead"), 60_000)
            before, late = cache._store.fetched()[1], cache._store.late()[0]
            times += run.turn(cache, name.endswith("cold"), turn, args.keep)
            pages[name][0] += cache._store.fetched()[1] - before
            pages[name][1] += cache._store.late()[0] - late
    steps = TURN * args.turns * args.layers
    rows = {
        name: {
            "p50_us": statistics.median(times),
            "p99_us": statistics.quantiles(times, n=100)[98],
            "read": pages[name][0] / steps,
            "late": pages[name][1] / steps,
        }
        for name, times in taken.items()
    }
    base = rows["near"]["p50_us"]
    ratios = {
        kind: (rows[f"ahead_{kind}"]["p50_us"] - base) / (rows[f"wait_{kind}"]["p50_us"] - base)
        for kind in ("warm", "cold")
    }
    return {"rows": rows, "wait_ratio": ratios, "hinted": run.far._store.late()[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (
        ("tokens", 8192),
        ("layers", 4),
        ("kv-heads", 8),
        ("group", 4),
        ("dim", 128),
        ("budget", 256),
        ("turns", 8),
    )
    for name, value in (*sizes, ("threads", 1), ("work", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--near-pages", type=int, help="default: twice what a step reads")
    parser.add_argument("--keep", type=float, default=0.9)
    parser.add_argument("--path", help="default: the system's folder for temporary files")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args)
    if args.json:
        print(json.dumps(found))
        return
    for name, row in found["rows"].items():  # type: ignore[attr-defined]
        line = f"p50 {row['p50_us']:9.1f} us  p99 {row['p99_us']:9.1f} us"
        print(f"{name:12s} {line}  per layer {row['read']:6.1f} pages read, {row['late']:6.1f} late")
    for name, ratio in found["wait_ratio"].items():  # type: ignore[attr-defined]
        print(f"{name}: waits with the threads that read ahead, over waits without: {ratio:.2f}")
    print(f"pages asked for a layer ahead: {found['hinted']}")


if __name__ == "__main__":
    main()
