"""KV bytes while a prompt is put in chunk by chunk: what each cache holds, and its peak, by tokens so far.

Caches are filled directly with random tokens, layer by layer as a chunked prefill would; no prompt is computed. Bytes are what
the allocator lent for keys and values, with all books of ours; activations are the model's and are the same for all.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from kvstrata.cli.bench.decode import arguments as shared
from kvstrata.cli.bench.decode import begin, peak_of, run_facts
from kvstrata.cli.bench.filled import RandomTokens, fill
from kvstrata.cli.output import Output, bytes_text


@dataclass(frozen=True)
class Row:
    """One cache after so many tokens of its prompt; peak_bytes: the most so far, within a layer's update, too."""

    tokens: int
    cache: str
    budget: str | None
    context: int
    near_bytes: int
    peak_bytes: int
    dense_bytes: int  # of a dense cache of the whole context


def arguments(parser: argparse.ArgumentParser) -> None:
    shared(parser)
    parser.set_defaults(context=[16384])


def run(args: argparse.Namespace, out: Output) -> int:
    clock, contenders, model = begin(args, out)
    random, rows = RandomTokens(model, args.seed), []
    with out.progress("caches", len(contenders) * len(args.context)) as advance:
        for context in args.context:
            for c in contenders:
                rows += filling(model, random, c, context)
                advance(f"{c.label} at {context}")
    made = {"schema": 1, "run": run_facts(args, clock, model), "rows": [asdict(r) for r in rows]}
    last = [r for r in rows if r.tokens == r.context]
    header = ["context", "cache", ">KV bytes", ">% of dense", ">peak", ">peak %"]
    out.table(f"Filling chunk by chunk, {args.shape}, batch 1", header, [_line(r) for r in last])
    out.result(made)
    if args.out is not None:
        from kvstrata.cli.bench.plots import save

        save(args.out / "memory", made, "tokens", {"peak_bytes": ("peak KV MiB", 2.0**-20)})
    return 0


def filling(model: Any, random: RandomTokens, contender: Any, context: int) -> list[Row]:
    """Rows of one cache, chunk by chunk."""
    cache = contender.make(model, context)
    dense = random.dense_bytes(context)
    rows: list[Row] = []

    def note(stored: int) -> None:
        rows.append(Row(stored, contender.name, contender.budget, context, cache.nbytes(), peak_of(cache), dense))

    fill(cache, random, context, note)
    return rows


def _line(r: Row) -> list[str]:
    share = f"{100 * r.near_bytes / r.dense_bytes:.1f}"
    from kvstrata.quality.contenders import label

    name = label(r.cache, r.budget)
    peak = f"{100 * r.peak_bytes / r.dense_bytes:.1f}"
    return [str(r.context), name, bytes_text(r.near_bytes), share, bytes_text(r.peak_bytes), peak]
