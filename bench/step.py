"""Host overhead of one decode step: what a layer's call costs beyond its kernels.

Times, at 16 stored tokens (so that the kernels have next to nothing to do): the native append + attend call alone, a whole
``Step.attend``, and opening and committing a step per layer. Prints microseconds; ``--json`` for one object.
On CUDA a call's time is the host's, until it returns.

With ``--ledger``: what a ledger whose limit is near adds to opening and committing a step, and a report, beside a step's
attention over ``--tokens``, all layers, and beside that with a decoder's matrix products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from kvstrata import Cache, LayerSpec, Shape
from kvstrata.budget import Ledger
from kvstrata.cli.bench.clock import DEVICES, Clock, clock_of
from kvstrata.config import DTYPES
from plan import WIDE, layer_ms


def measure(clock: Clock, kv_heads: int, group: int, dim: int, layers: int, reps: int) -> dict[str, float]:
    torch.set_num_threads(1)
    spec = LayerSpec(kv_heads, kv_heads * group, dim)
    shape = Shape([spec] * layers, torch.bfloat16, clock.device)
    q = torch.randn(1, 1, spec.q_heads, dim, device=clock.device).bfloat16()
    k, v = (torch.randn(1, 1, kv_heads, dim, device=clock.device).bfloat16() for _ in range(2))
    out = torch.empty_like(q)

    def filled() -> tuple[Cache, list]:  # type: ignore[type-arg]
        cache = Cache(shape)
        seqs = cache.new(1)
        with cache.step(seqs, columns=15) as step:
            for layer in range(layers):
                step.attend(layer, *(x.expand(1, 15, -1, -1) for x in (q, k, v)))
        return cache, seqs

    native, wrapped, rest = [], [], []
    for _ in range(reps):
        cache, seqs = filled()
        step = cache.step(seqs, columns=1).open()
        args = [(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)) for x in (q, k, v, out)]
        clock.wait()
        start = time.perf_counter_ns()
        for layer in range(layers):
            cache._store.append_attend(layer, *args, (0, 0, 0, 0), 0, DTYPES[q.dtype], dim**-0.5, 0.0, 1)
        native.append((time.perf_counter_ns() - start) / layers / 1e3)
        step.rollback()
        clock.wait()
        start = time.perf_counter_ns()
        step = cache.step(seqs, columns=1).open()
        opened = time.perf_counter_ns() - start
        start = time.perf_counter_ns()
        for layer in range(layers):
            step.attend(layer, q, k, v)
        wrapped.append((time.perf_counter_ns() - start) / layers / 1e3)
        start = time.perf_counter_ns()
        step.commit()
        rest.append((opened + time.perf_counter_ns() - start) / layers / 1e3)
    return {
        "native_call_us": statistics.median(native),
        "step_attend_us": statistics.median(wrapped),
        "open_commit_us_per_layer": statistics.median(rest),
    }


def accounts(spec: LayerSpec, layers: int, tokens: int, reps: int) -> dict[str, float]:
    """Medians of a step's parts without a ledger and with one; steps of both take turns."""
    shape = Shape([spec] * layers, torch.bfloat16)
    k = torch.randn(1, 2048, spec.kv_heads, spec.head_dim).bfloat16()
    q = torch.randn(1, 1, spec.q_heads, spec.head_dim).bfloat16()
    near = int(1.05 * shape.token_bytes() * (tokens + 16 * (reps + 2))) + (64 << 20)
    caches = [Cache(shape, f"{near}B"), Cache(shape, f"{near}B", ledger=Ledger(near=near))]
    found: dict[str, list[float]] = {name: [] for name in ("plain", "ledger", "report", "attend")}
    every = [cache.new(1) for cache in caches]
    for cache, seqs in zip(caches, every, strict=True):
        for first in range(0, tokens, 2048):
            part = k[:, : min(2048, tokens - first)]
            with cache.step(seqs, columns=part.shape[1]) as step:
                for layer in range(layers):
                    step.append(layer, part, part)
    for _ in range(reps):
        for name, cache, seqs in zip(("plain", "ledger"), caches, every, strict=True):
            start = time.perf_counter_ns()
            step = cache.step(seqs, columns=1).open()
            opened = time.perf_counter_ns()
            for layer in range(layers):
                step.attend(layer, q, k[:, :1], k[:, :1])
            attended = time.perf_counter_ns()
            step.commit()
            found[name].append((time.perf_counter_ns() - attended + opened - start) / 1e3)
            found["attend"].append((attended - opened) / 1e3)
        start = time.perf_counter_ns()
        caches[1].report()
        found["report"].append((time.perf_counter_ns() - start) / 1e3)
    plain, ledger, report, attend = (statistics.median(found[n]) for n in ("plain", "ledger", "report", "attend"))
    more, products = ledger - plain + report, 1e3 * layers * layer_ms(*WIDE, spec, 5)
    return {
        "open_commit_us": plain,
        "open_commit_with_ledger_us": ledger,
        "report_us": report,
        "attention_step_us": attend + plain,
        "matrix_products_us": products,
        "percent_of_attention_step": 100 * more / (attend + plain),
        "percent_of_step": 100 * more / (attend + plain + products),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--reps", type=int, default=50)
    parser.add_argument("--ledger", action="store_true")
    parser.add_argument("--tokens", type=int, default=8192, help="with --ledger")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    args = parser.parse_args()
    if args.ledger and args.device != "cpu":
        parser.error("--ledger measures on the CPU only")
    if args.ledger:
        spec = LayerSpec(args.kv_heads, args.kv_heads * args.group, args.dim)
        result = accounts(spec, args.layers, args.tokens, args.reps)
    else:
        result = measure(clock_of(args.device), args.kv_heads, args.group, args.dim, args.layers, args.reps)
    if args.json:
        print(json.dumps({"schema": 1, "bench": "step", "case": vars(args), **result}))
        return
    for name, value in result.items():
        print(f"{name:32s} {value:10.2f}")


if __name__ == "__main__":
    main()
