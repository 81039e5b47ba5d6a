"""Decode end to end: ms per token, tokens per second and bytes by context, policies beside transformers' own caches.

A model of a well-known shape with random weights, whose caches are filled directly with random tokens; then it decodes. Where
memory allows, all caches are held at once and take turns, step by step, so that all meet the same machine.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvstrata.cli.bench.clock import DEVICES, Clock, clock_of
from kvstrata.cli.bench.filled import RandomTokens, fill
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output, bytes_text
from kvstrata.hf.shapes import SHAPES

MEMORY_SHARE = 0.7
"""Of the free memory that caches held at once may take."""
WARM = 2
"""Steps before the measured ones."""


@dataclass(frozen=True)
class Row:
    """One cache at one context. Times of a whole model step with one new token; bytes of keys and values with all books."""

    context: int
    cache: str
    budget: str | None
    steps: int
    ms_p50: float
    ms_p99: float
    tokens_per_s: float
    near_bytes: int
    stored_tokens: float  # per KV head and layer
    peak_bytes: int
    dense_bytes: int  # of as many tokens
    turns: bool  # all caches of this context were held at once
    speedup: float | None = None  # of DynamicCache's median in the same run


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="of the model and its caches; %(default)s")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--context", type=_numbers, default="4096,16384,32768", metavar="N,..", help="%(default)s")
    parser.add_argument(
        "--policies", default="full,kivi,arkv", metavar="P,..", help="policies of kvstrata; %(default)s"
    )
    parser.add_argument(
        "--peers", default="DynamicCache", metavar="P,..", help="DynamicCache, QuantizedCache-hqq-4, ..."
    )
    parser.add_argument("--budgets", default="25%", metavar="B,..", help="of the policies that take one; %(default)s")
    parser.add_argument("--steps", type=positive, default=33, help="measured steps")
    parser.add_argument("--layers", type=positive, help="fewer layers than the shape has")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="writes the numbers and plots there")


def run(args: argparse.Namespace, out: Output) -> int:
    clock, contenders, model = begin(args, out)
    random, rows = RandomTokens(model, args.seed), []
    with out.progress("caches", len(contenders) * len(args.context)) as advance:
        for context in args.context:
            rows += at_context(clock, model, random, contenders, context, args.steps, advance)
    made = {"schema": 1, "run": run_facts(args, clock, model), "rows": [asdict(r) for r in rows]}
    show(args, rows, out)
    out.result(made)
    if args.out is not None:
        from kvstrata.cli.bench.plots import save

        fields = {"ms_p50": ("ms per token", 1.0), "near_bytes": ("KV MiB", 2.0**-20)}
        save(args.out / "decode", made, "context", fields)
    return 0


def begin(args: argparse.Namespace, out: Output) -> tuple[Clock, list[Any], Any]:
    """The device's clock, the contenders that were asked for, and the patched model on the device."""
    from kvstrata.hf import patch

    clock = clock_of(args.device)
    torch.set_num_threads(args.threads)
    contenders = line_of(args)
    with out.busy(f"building {args.shape}"):
        return clock, contenders, patch(SHAPES[args.shape].build(args.layers, args.seed, clock.device))


def peak_of(cache: Any) -> int:
    """The most bytes that a cache has held."""
    return int(cache.peak_bytes if hasattr(cache, "peak_bytes") else cache.report().peak_bytes)


def line_of(args: argparse.Namespace) -> list[Any]:
    """The contenders that were asked for. ValueError for an unknown one, or one that cannot run here."""
    from kvstrata.quality.contenders import line_up, missing

    names = [[n.strip() for n in getattr(args, f).split(",") if n.strip()] for f in ("policies", "peers", "budgets")]
    contenders: list[Any] = line_up(*names)
    for c in contenders:
        if reason := "it runs in an environment of its own" if c.outside else missing(c.name):
            raise ValueError(f"{c.name}: {reason}")
    return contenders


def at_context(
    clock: Clock, model: Any, random: RandomTokens, contenders: list[Any], context: int, steps: int, advance: Any
) -> list[Row]:
    """Rows of all contenders at one context."""
    dense = random.dense_bytes(context + WARM + steps)
    turns = len(contenders) * dense < MEMORY_SHARE * clock.free_bytes()
    found: list[Row] = []
    for group in [contenders] if turns else [[c] for c in contenders]:
        caches = []
        for c in group:
            cache = c.make(model, context + WARM + steps)
            fill(cache, random, context)
            caches.append(cache)
            advance(f"{c.label} at {context}")
        times = decode(clock, model, caches, context, steps)
        for c, cache, taken in zip(group, caches, times, strict=True):
            found.append(_row(c, cache, taken, context, dense, turns))
    base = next((r.ms_p50 for r in found if r.cache == "DynamicCache"), None)
    return [r if base is None else Row(**(asdict(r) | {"speedup": base / r.ms_p50})) for r in found]


def decode(clock: Clock, model: Any, caches: list[Any], context: int, steps: int) -> list[list[float]]:
    """Sorted ms of each cache's steps, until their logits are there; the caches take turns."""
    times: list[list[float]] = [[] for _ in caches]
    with torch.inference_mode():
        for step in range(-WARM, steps):
            token = torch.full((1, 1), 17 + step + WARM, device=clock.device)
            at = torch.full((1, 1), context + step + WARM, device=clock.device)
            for cache, taken in zip(caches, times, strict=True):
                more = {"position_ids": at, "past_key_values": cache, "use_cache": True}
                clock.wait()
                ms = clock.whole(partial(model, token, **more))
                if step >= 0:
                    taken.append(ms)
    return [sorted(taken) for taken in times]


def _row(contender: Any, cache: Any, taken: list[float], context: int, dense: int, turns: bool) -> Row:
    stored = float(context + WARM + len(taken))
    peak = peak_of(cache)
    if hasattr(cache, "report"):
        stored = cache.report().stored_tokens / cache.cache.shape.rows
    p50 = statistics.median(taken)
    p99 = taken[min(len(taken) - 1, int(0.99 * len(taken)))]
    numbers = (p50, p99, 1e3 / p50, cache.nbytes(), stored, peak, dense, turns)
    return Row(context, contender.name, contender.budget, len(taken), *numbers)


def run_facts(args: argparse.Namespace, clock: Clock, model: Any) -> dict[str, Any]:
    """What was run, with what and where."""
    from kvstrata.quality import manifest

    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("verb", "json")}
    parameters = sum(p.numel() for p in model.parameters())
    return manifest.of(asked) | {"parameters": parameters, "device": clock.facts()}


def show(args: argparse.Namespace, rows: list[Row], out: Output) -> None:
    from kvstrata.quality.contenders import label

    body = [
        [
            str(r.context),
            label(r.cache, r.budget),
            f"{r.ms_p50:.1f}",
            f"{r.ms_p99:.1f}",
            f"{r.tokens_per_s:.2f}",
            "-" if r.speedup is None else f"{r.speedup:.2f}",
            bytes_text(r.near_bytes),
            f"{100 * r.near_bytes / r.dense_bytes:.1f}",
            f"{100 * r.peak_bytes / r.dense_bytes:.1f}",
            f"{r.stored_tokens:.0f}",
        ]
        for r in rows
    ]
    header = ["context", "cache", ">ms p50", ">ms p99", ">tokens/s", ">x DynamicCache", ">KV bytes", ">% of dense"]
    out.table(f"Decoding, {args.shape}, batch 1, {args.device}", [*header, ">peak %", ">stored per row"], body)
    if not all(r.turns for r in rows):
        out.line("Not all caches of a context fitted memory together: those were measured one after another.")


def _numbers(text: str) -> list[int]:
    return [positive(n) for n in text.split(",")]
