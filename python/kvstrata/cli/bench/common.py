"""What the op benches share: arguments, pages to work on, and how results are printed.

A bench measures and never asserts. Inputs are random, never zeros; buffers rotate so that no call finds its data in the
last-level cache; ours and the baseline alternate; the share of bandwidth is of the bandwidth measured in the same run
(clock.py). Where a bench runs its tensors lie, and its ops work.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvstrata import _C, ops
from kvstrata.cli.bench.clock import DEVICES, Clock, Times, clock_of
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output

SLOTS = ops.SLOTS
SOURCE = "python/kvstrata/cli/bench/common.py"  # this file, in the repository
ALL_FORMATS = (*ops.FORMATS, *ops.QUANTIZED)


def op_arguments(
    parser: argparse.ArgumentParser,
    formats: Sequence[str] = ALL_FORMATS,
    *,
    devices: Sequence[str] = DEVICES,
    reps: int = 15,
    **defaults: Any,
) -> None:
    """Arguments that every op bench takes.

    formats: what --format may name; devices: where the bench runs; reps: the default on the CPU; `defaults` override the rest.
    """
    add = parser.add_argument
    add("--device", choices=devices, default="cpu", help="where the ops run; default: %(default)s")
    add("--isa", metavar="L", default="", help="instruction-set level of the CPU; default: the best")
    add("--threads", metavar="N", type=positive, default=torch.get_num_threads(), help="default: %(default)s")
    add("--tokens", metavar="N", type=positive, default=32768, help="of each row; default: %(default)s")
    add("--kv-rows", metavar="N", type=positive, default=8, help="sequences x KV heads; default: %(default)s")
    add("--group", metavar="N", type=positive, default=4, help="query heads per KV head; default: %(default)s")
    add("--dim", metavar="N", type=positive, default=128, help="of a head; default: %(default)s")
    add("--format", metavar="F,..", type=_known(formats), default="f32,bf16,f16", help="default: %(default)s")
    add("--reps", metavar="N", type=positive, help=f"default: {reps}, on cuda at least 100")
    add("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    parser.set_defaults(reps_on_cpu=reps, **defaults)


def _known(formats: Sequence[str]) -> Callable[[str], str]:
    """Takes names joined by commas, each one of `formats`."""

    def names(text: str) -> str:
        for name in text.split(","):
            if name not in formats:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(formats)}")
        return text

    return names


def parser(text: str, **defaults: Any) -> argparse.ArgumentParser:
    """Of a bench that is a script, on the CPU where `defaults` name no other devices: arguments as above, and --json."""
    p = argparse.ArgumentParser(description=text)
    p.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    op_arguments(p, **({"devices": ("cpu",)} | defaults))
    return p


def begin(args: argparse.Namespace) -> Clock:
    """Seed, threads, level and repetitions as asked for, and the device's clock. Unsupported where that device is not."""
    if args.isa and args.device != "cpu":
        raise ValueError(f"bench: isa is {args.isa!r}, expected none where the device is {args.device!r}")
    clock = clock_of(args.device)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    _C.set_isa(args.isa)
    args.reps = args.reps or clock.reps(args.reps_on_cpu)
    return clock


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


def commit() -> str | None:
    """Of the repository of kvstrata that this package lies in; None where it lies in none, or there is no git."""
    command = ["git", "rev-parse", "--show-toplevel", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    top, _, found = done.stdout.strip().partition("\n")
    return found if done.returncode == 0 and (Path(top) / SOURCE).exists() else None


def run_facts(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """The `run` part of the JSON output."""
    more = {"torch": torch.__version__, "commit": commit(), "seed": args.seed}
    return {**clock.facts(), **clock.bandwidth(), **more}


def digest(*tensors: Tensor) -> str:
    """Of the bytes of results: equal digests are equal bits."""
    state = hashlib.sha256()
    for t in tensors:
        state.update(t.cpu().contiguous().view(torch.uint8).numpy().tobytes())
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
    device = pages.device
    source = ops.Pool.allocate("bf16", pool.head_dim, at_once, device=device)
    for first in range(0, len(pages), at_once):
        part = slice(first, min(first + at_once, len(pages)))
        count = (part.stop - first) * SLOTS
        at = torch.arange(count, device=device)
        full = torch.arange(count // SLOTS, dtype=torch.int32, device=device)
        ops.pack(k[part], v[part], full, [source])
        columns = (at // SLOTS, at % SLOTS, pages[part][at // SLOTS] | 1 << 28, at % SLOTS)
        ops.quantize(torch.stack(columns, 1).to(torch.int32), [source, pool])


def filled(
    fmt: str, rows: int, tokens: int, dim: int, order: str = "random", device: torch.device | str = "cpu"
) -> Filled:
    """Rows of whole pages; their places in the slab are shuffled, or in order."""
    if tokens % SLOTS:
        raise ValueError(f"bench: tokens is {tokens}, expected a multiple of {SLOTS}")
    entries = tokens // SLOTS
    count = rows * entries
    per_slab = min(count, 65536)
    slabs = -(-count // per_slab)
    pool = ops.Pool.allocate(fmt, dim, per_slab, slabs, device)
    places = torch.randperm(count, device=device) if order == "random" else torch.arange(count, device=device)
    pages = (places // per_slab << 16 | places % per_slab).to(torch.int32).view(rows, entries)
    k, v = (torch.randn(rows, tokens, dim, device=device).to(element(fmt)) for _ in range(2))
    if fmt in ops.FORMATS:
        ops.pack(k.view(-1, SLOTS, dim), v.view(-1, SLOTS, dim), pages.view(-1), [pool])
    else:
        write_quantized(pool, pages.view(-1), k.view(-1, SLOTS, dim), v.view(-1, SLOTS, dim))
    return Filled(pool, pages, k, v)


def show(title: str, run: dict[str, Any], rows: list[dict[str, Any]], out: Output) -> None:
    """A line of facts and a table of the rows' plain columns, or the whole as JSON. What all rows share heads the table."""
    facts = f"isa {run['isa']}, "
    facts += run["name"] if "name" in run else f"{run['threads']} threads of {run['threads_source']}"
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
