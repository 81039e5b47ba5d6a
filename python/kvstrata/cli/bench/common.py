"""What the op benches share: arguments, timing, the machine's own bandwidth, and how results are printed.

A bench measures and never asserts. Inputs are random, never zeros; buffers rotate so that no call finds its data in the
last-level cache; ours and the baseline alternate; the share of bandwidth is of the bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvstrata import _C, ops
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output
from kvstrata.config import Unsupported

SLOTS = ops.SLOTS
SOURCE = "python/kvstrata/cli/bench/common.py"  # this file, in the repository
READS: tuple[tuple[torch.dtype, Callable[[Tensor], Tensor]], ...] = (
    (torch.int64, torch.max),
    (torch.float32, torch.sum),
    (torch.int32, torch.amax),
    (torch.uint8, torch.max),
)
"""Reductions that read memory about as fast as the machine does."""
ALL_FORMATS = (*ops.FORMATS, *ops.QUANTIZED)
Call = Callable[[int], object]  # given the number of the repetition, to choose a buffer by


def op_arguments(parser: argparse.ArgumentParser, formats: Sequence[str] = ALL_FORMATS, **defaults: Any) -> None:
    """Arguments that every op bench takes; `formats` are what --format may name, `defaults` override the defaults."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the ops run; default: %(default)s")
    add("--isa", metavar="L", default="", help="instruction-set level; default: the best")
    add("--threads", metavar="N", type=positive, default=torch.get_num_threads(), help="default: %(default)s")
    add("--tokens", metavar="N", type=positive, default=32768, help="of each row; default: %(default)s")
    add("--kv-rows", metavar="N", type=positive, default=8, help="sequences x KV heads; default: %(default)s")
    add("--group", metavar="N", type=positive, default=4, help="query heads per KV head; default: %(default)s")
    add("--dim", metavar="N", type=positive, default=128, help="of a head; default: %(default)s")
    add("--format", metavar="F,..", type=_known(formats), default="f32,bf16,f16", help="default: %(default)s")
    add("--reps", metavar="N", type=positive, default=15, help="default: %(default)s")
    add("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    parser.set_defaults(**defaults)


def _known(formats: Sequence[str]) -> Callable[[str], str]:
    """Takes names joined by commas, each one of `formats`."""

    def names(text: str) -> str:
        for name in text.split(","):
            if name not in formats:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(formats)}")
        return text

    return names


def parser(text: str, **defaults: Any) -> argparse.ArgumentParser:
    """Of a bench that is a script: arguments as above, and --json."""
    p = argparse.ArgumentParser(description=text)
    p.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    op_arguments(p, **defaults)
    return p


def begin(args: argparse.Namespace) -> None:
    """Seed, threads and level as asked for. Unsupported on a device that has no ops yet."""
    if args.device != "cpu":
        raise Unsupported(f"bench: device is {args.device!r}, this build computes on the CPU only")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    _C.set_isa(args.isa)


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    p10: float
    p50: float
    p90: float

    def row(self) -> dict[str, float]:
        return {"ms_p10": self.p10, "ms_p50": self.p50, "ms_p90": self.p90}


def measure(calls: Sequence[Call], reps: int) -> list[Times]:
    """Times of each call; they alternate, so that all meet the same machine."""
    seconds: list[list[float]] = [[] for _ in calls]
    for rep in range(-2, reps):  # two rounds of warming up
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call(rep)
            if rep >= 0:
                taken.append(time.perf_counter() - start)
    result = []
    for taken in seconds:
        at = sorted(taken)
        result.append(Times(*(1e3 * at[min(len(at) - 1, int(share * len(at)))] for share in (0.1, 0.5, 0.9))))
    return result


def beside_copy(
    size: int, times: Times, base: Times, args: argparse.Namespace, copy_gbps: float, found: str
) -> dict[str, Any]:
    """What a row says of a call that moves so many bytes in and out, beside torch's copy of as many; found: its digest."""
    gbps = size / times.p50 / 1e6
    return {
        "bytes_in_and_out": size,
        "reps": args.reps,
        **times.row(),
        "gbps": gbps,
        "share_copy": gbps / copy_gbps,
        "digest": found,
        "baseline": {"name": "torch copy", "ms_p50": base.p50},
        "speedup_vs_copy": base.p50 / times.p50,
    }


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * {"K": 1024, "M": 1 << 20}[s[-1]] for s in sizes), default=32 << 20)


def buffers(bytes_each: int) -> int:
    """How many buffers of this size make four times the last-level cache."""
    return max(2, math.ceil(4 * last_level_cache() / max(bytes_each, 1)))


def bandwidth(reps: int = 9) -> dict[str, float]:
    """GB/s of reading and of copying (read plus written), medians, over memory of twice the last-level cache.

    Reading is the best of `READS`. On a Zen 4 of two cores all four read 26 to 27 GB/s; other sums and maxima (f64, 16
    bit) 22 to 26, a sum of int32 1. Which one is fastest depends on what torch vectorizes for the processor.
    """
    size = max(64 << 20, 2 * last_level_cache())
    source = [torch.randint(0, 1 << 30, (size // 8,)) for _ in range(2)]
    target = torch.empty_like(source[0])
    reads = [_reading([s.view(dtype) for s in source], reduction) for dtype, reduction in READS]
    *read, copy = measure([*reads, lambda i: target.copy_(source[i % 2])], reps)
    return {"read_gbps": size / min(t.p50 for t in read) / 1e6, "copy_gbps": 2 * size / copy.p50 / 1e6}


def _reading(source: Sequence[Tensor], reduction: Callable[[Tensor], Tensor]) -> Call:
    return lambda i: reduction(source[i % len(source)])


def commit() -> str | None:
    """Of the repository of kvstrata that this package lies in; None where it lies in none, or there is no git."""
    command = ["git", "rev-parse", "--show-toplevel", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    top, _, found = done.stdout.strip().partition("\n")
    return found if done.returncode == 0 and (Path(top) / SOURCE).exists() else None


def run_facts(args: argparse.Namespace) -> dict[str, Any]:
    """The `run` part of the JSON output."""
    return {
        "backend": "cpu",
        "isa": _C.isa(),
        "device": args.device,
        "threads": args.threads,
        "threads_source": _C.threads_source(),
        **bandwidth(),
        "torch": torch.__version__,
        "commit": commit(),
        "seed": args.seed,
    }


def digest(*tensors: Tensor) -> str:
    """Of the bytes of results: equal digests are equal bits."""
    state = hashlib.sha256()
    for t in tensors:
        state.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


@dataclass(frozen=True)
class Filled:
    """A pool full of random pages, and each row's list of them."""

    pool: ops.Pool
    pages: Tensor  # i32 [R, K]
    k: Tensor  # [R, N, D], what full pages hold; what quantized ones were made of, as bf16
    v: Tensor


def element(fmt: str) -> torch.dtype:
    """Of a full format; bf16 for a quantized one, whose tokens come from a model in it."""
    return ops.FORMATS.get(fmt, torch.bfloat16)


def write_quantized(pool: ops.Pool, pages: Tensor, k: Tensor, v: Tensor, at_once: int = 4096) -> None:
    """Tokens k, v [P, 16, D] into pages [P] of a quantized pool, by way of bf16 pages."""
    source = ops.Pool.allocate("bf16", pool.head_dim, at_once)
    for first in range(0, len(pages), at_once):
        part = slice(first, min(first + at_once, len(pages)))
        count = (part.stop - first) * SLOTS
        at = torch.arange(count)
        full = torch.arange(count // SLOTS, dtype=torch.int32)
        ops.pack(k[part], v[part], full, [source])
        columns = (at // SLOTS, at % SLOTS, pages[part][at // SLOTS] | 1 << 28, at % SLOTS)
        ops.quantize(torch.stack(columns, 1).to(torch.int32), [source, pool])


def filled(fmt: str, rows: int, tokens: int, dim: int, order: str = "random") -> Filled:
    """Rows of whole pages; their places in the slab are shuffled, or in order."""
    if tokens % SLOTS:
        raise ValueError(f"bench: tokens is {tokens}, expected a multiple of {SLOTS}")
    entries = tokens // SLOTS
    count = rows * entries
    per_slab = min(count, 65536)
    slabs = -(-count // per_slab)
    pool = ops.Pool.allocate(fmt, dim, per_slab, slabs)
    places = torch.randperm(count) if order == "random" else torch.arange(count)
    pages = (places // per_slab << 16 | places % per_slab).to(torch.int32).view(rows, entries)
    k, v = (torch.randn(rows, tokens, dim).to(element(fmt)) for _ in range(2))
    if fmt in ops.FORMATS:
        ops.pack(k.view(-1, SLOTS, dim), v.view(-1, SLOTS, dim), pages.view(-1), [pool])
    else:
        write_quantized(pool, pages.view(-1), k.view(-1, SLOTS, dim), v.view(-1, SLOTS, dim))
    return Filled(pool, pages, k, v)


def show(title: str, run: dict[str, Any], rows: list[dict[str, Any]], out: Output) -> None:
    """A line of facts and a table of the rows' plain columns, or the whole as JSON. What all rows share heads the table."""
    facts = f"isa {run['isa']}, {run['threads']} threads of {run['threads_source']}"
    out.line(f"{title}: {facts}, read {run['read_gbps']:.1f} GB/s, copy {run['copy_gbps']:.1f} GB/s")
    flat = [{k: v for k, v in row.items() if not isinstance(v, dict) and v is not None} for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    columns = [name for name in names if _differs(name, flat)]
    shared = ", ".join(f"{name} {flat[0][name]}" for name in names if name not in columns)
    cells = [[_text(row.get(name, "")) for name in columns] for row in flat]
    out.table(shared, [f">{name}" for name in columns], cells)
    out.result({"schema": 1, "run": run, "rows": rows})


def _differs(name: str, rows: list[dict[str, Any]]) -> bool:
    """Between rows. What was measured always does."""
    values = [row.get(name) for row in rows]
    return isinstance(values[0], float) or any(value != values[0] for value in values)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
