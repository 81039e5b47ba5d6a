"""How near quantized caches stay to the full one: next tokens of held-out text, and answers.

    python bench/quality/formats.py --out bench/results/cpu/formats

Text: real text is read teacher-forced, a first chunk and then chunks of 64 tokens, so that the queries of every later
chunk attend to what was quantized before it. Policy ``kivi`` keeps 16 sinks and the newest 64 to 79 tokens Full and
quantizes every other token. Counted at the same positions for all: where the likeliest next token is another than under
policy ``full``, perplexity, KL. The first line is the noise of the model's own arithmetic: a dense cache, one forward. In
bfloat16 that alone turns more greedy tokens than int8 does, so the same is read in float32 too.

Answers: the retrieval tasks, the model as it was saved, the whole context quantized before the question is seen; paired
with ``full``.

Differences come with a bootstrap 95 % interval over contexts. Writes OUT.json and OUT.md; prints the tables.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from published import Section, publish
from torch import Tensor

from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output
from kvstrata.hf.cache import KVCache
from kvstrata.hf.load import dense_cache
from kvstrata.policy import kivi
from kvstrata.quality.contenders import shape_of
from kvstrata.quality.measure import Subject, measure
from kvstrata.quality.metrics import interval
from kvstrata.quality.reader import Reader
from kvstrata.quality.run import Config, made_example, subject
from kvstrata.quality.tasks import RETRIEVAL
from kvstrata.quality.text import lines

WINDOW, SINKS, CHUNK = 64, 16, 64
FULL, DENSE = "full", "dense cache"


@dataclass(frozen=True)
class Stored:
    """A cache whose tokens outside window and sinks are stored in one format; "full" stores all as they are."""

    format: str

    def make(self, model: Any, tokens: int = 0) -> Any:
        """An empty cache."""
        if self.format == DENSE:
            return dense_cache(model)
        policy = FULL if self.format == FULL else kivi(self.format, window=WINDOW, sinks=SINKS)
        return KVCache.for_model(model, policy=policy)


# --- Text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """log_probs f32 [T, V] of what follows each scored token; shares of the dense cache's bytes, None of a dense one."""

    log_probs: Tensor
    bytes: float | None = None
    pages: float | None = None


def passages(asked: Subject, n: int, length: int) -> Iterator[list[int]]:
    """n stretches of ``length`` + 1 tokens of held-out text that do not overlap, spread over all of it."""
    text = asked.encode("".join(lines("held-out")))
    if n * (length + 1) > len(text):
        raise ValueError(f"contexts: {n} of {length} tokens asked, the held-out text has {len(text)} tokens")
    for i in range(n):
        start = i * (len(text) - length - 1) // max(1, n - 1)
        yield text[start : start + length + 1]


def read(asked: Subject, form: str, ids: list[int], first: int, scored: int) -> Reading:
    """Reads ids[:-1] in a first chunk and chunks of CHUNK; what it says at positions from ``scored`` on."""
    reader = Reader(asked.model, Stored(form).make(asked.model), asked.stops)
    end = len(ids) - 1
    starts = [0] if form == DENSE else [0, *range(first, end, CHUNK)]
    found = []
    for a, b in zip(starts, [*starts[1:], end], strict=True):
        logits = reader.read(ids[a:b], logits=b - a)
        found.append(logits[max(0, scored - a) :].float().log_softmax(-1))
    log_probs = torch.cat(found)
    if form == DENSE:
        return Reading(log_probs)
    held, dense = reader.cache.report(), end * shape_of(asked.model).token_bytes()
    pages = sum(n for kind, n in held.bytes_by_kind.items() if kind.startswith("pages"))
    return Reading(log_probs, held.nbytes / dense, pages / dense)


def compared(found: Reading, full: Reading, ids: list[int]) -> dict[str, float]:
    """What one context says of one cache beside the full one."""
    nll, base = (-r.log_probs.gather(1, torch.tensor(ids[-len(r.log_probs) :])[:, None]) for r in (found, full))
    said, meant = found.log_probs, full.log_probs
    row = {
        "flips": float((said.argmax(1) != meant.argmax(1)).float().mean()),
        "nll": float(nll.mean()),
        "nll_more": float((nll - base).mean()),
        "kl": float((meant.exp() * (meant - said)).sum(1).mean()),
    }
    return row | {name: x for name in ("bytes", "pages") if (x := getattr(found, name)) is not None}


def text_rows(args: argparse.Namespace, out: Output) -> list[dict[str, Any]]:
    """One row per dtype of the model, first chunk and format."""
    return [row for dtype in args.dtypes for row in _dtype_rows(args, dtype, out)]


def _dtype_rows(args: argparse.Namespace, dtype: str, out: Output) -> list[dict[str, Any]]:
    asked, _ = subject(args.model, dtype)
    runs = [(first, form) for first in args.first for form in (FULL, *args.formats)]
    rows: dict[tuple[int, str], list[dict[str, float]]] = {run: [] for run in [(args.length, DENSE), *runs]}
    with out.progress("contexts", args.contexts) as advance:
        for ids in passages(asked, args.contexts, args.length):
            one = partial(read, asked, ids=ids, scored=max(args.first))
            full = {first: one(FULL, first=first) for first in args.first}
            for (first, form), kept in rows.items():
                beside = full.get(first, full[max(args.first)])
                kept.append(compared(beside if form == FULL else one(form, first=first), beside, ids))
            advance(dtype)
    scored = args.length - max(args.first)
    return [
        {"dtype": dtype, "first": first, "format": form, **summed(kept, scored)} for (first, form), kept in rows.items()
    ]


def summed(kept: list[dict[str, float]], scored: int) -> dict[str, Any]:
    """Means over contexts, with intervals."""
    mean = {name: fmean(row[name] for row in kept) for name in kept[0]}
    low, high = interval([row["nll_more"] for row in kept], "ratio")
    return {
        "positions": scored * len(kept),
        "flips": mean["flips"],
        "flips_interval": interval([row["flips"] for row in kept], "flips"),
        "perplexity": math.exp(mean["nll"]),
        "ratio": math.exp(mean["nll_more"]),
        "ratio_interval": (math.exp(low), math.exp(high)),
        "kl": mean["kl"],
        "bytes_share": mean.get("bytes"),
        "pages_share": mean.get("pages"),
    }


def text_section(rows: list[dict[str, Any]], args: argparse.Namespace) -> Section:
    first, last = max(args.first), args.length
    said = (
        f"{args.contexts} stretches of {last} tokens of held-out text, positions {first} to {last - 1} of each counted: "
        f"{rows[0]['positions']} positions. A row's keys are centred where it had 256 tokens when its first was "
        "quantized: with a first chunk of 64 tokens they are not. Bytes: in per cent of a dense cache's in the model's "
        "dtype, which Full pages have; held takes in tables, positions and free pages."
    )
    header = [
        "stored as",
        "model",
        "first chunk",
        "other greedy token %",
        "95 %",
        "perplexity",
        "to full",
        "95 %",
        "KL, nats",
    ]
    body = [
        [
            str(r["format"]),
            str(r["dtype"]),
            str(r["first"]),
            f"{100 * r['flips']:.2f}",
            _range(r["flips_interval"], 100, 2),
            f"{r['perplexity']:.3f}",
            f"{r['ratio']:.4f}",
            _range(r["ratio_interval"], 1, 4),
            f"{r['kl']:.5f}",
            *("-" if r[name] is None else f"{100 * r[name]:.1f}" for name in ("pages_share", "bytes_share")),
        ]
        for r in rows
    ]
    return Section("Text, teacher-forced", said, [*header, "pages %", "held %"], body)


# --- Answers ----------------------------------------------------------------------------------------------------------


def answer_rows(args: argparse.Namespace, out: Output) -> list[dict[str, Any]]:
    """One row per task and format, and one for all tasks."""
    asked, _ = subject(args.model, "auto")
    config = Config(args.model, RETRIEVAL, (FULL,), (), (), (args.length,), args.n, seed=args.seed)
    right: dict[tuple[str, str], list[float]] = {}
    shares: dict[tuple[str, str], list[float]] = {}
    with out.progress("contexts", args.n * len(RETRIEVAL)) as advance:
        for task in RETRIEVAL:
            for index in range(args.n):
                tokens = asked.tokens(made_example(config, task, args.length, index))
                for form in (FULL, *args.formats):
                    record = measure(asked, tokens, Stored(form), "query-agnostic")  # type: ignore[arg-type]
                    right.setdefault((task, form), []).append(fmean(record["scores"]))
                    shares.setdefault((task, form), []).append(record["bytes"] / record["dense_bytes"])
                advance(task)
    for table in (right, shares):
        for form in (FULL, *args.formats):
            table["all", form] = [x for task in RETRIEVAL for x in table[task, form]]
    return [paired(right, shares, task, form) for form in (FULL, *args.formats) for task in (*RETRIEVAL, "all")]


def paired(right: dict[tuple[str, str], list[float]], shares: Any, task: str, form: str) -> dict[str, Any]:
    """Accuracy of a format on a task, and the points it lies above ``full`` on the same contexts."""
    mine, full = right[task, form], right[task, FULL]
    points = [a - b for a, b in zip(mine, full, strict=True)]
    return {
        "task": task,
        "format": form,
        "n": len(mine),
        "accuracy": fmean(mine),
        "accuracy_interval": interval(mine, f"{task} {form}"),
        "points": 100 * fmean(points),
        "points_interval": [100 * x for x in interval(points, f"{task} {form} points")],
        "differ": sum(p != 0 for p in points),
        "bytes_share": fmean(shares[task, form]),
    }


def answer_section(rows: list[dict[str, Any]], args: argparse.Namespace) -> Section:
    said = (
        f"Exact match in per cent, {args.n} contexts of {args.length} tokens per task, seed {args.seed}, "
        "query-agnostic; the whole context but sinks and window is quantized when the question comes. Points: to full, "
        "paired; contexts: those whose score differs from full's."
    )
    header = ["stored as", *RETRIEVAL, "mean", "points", "95 %", "contexts", "held %"]
    body = []
    for form in (FULL, *args.formats):
        mine = {r["task"]: r for r in rows if r["format"] == form}
        whole = mine["all"]
        line = [form, *(f"{100 * mine[t]['accuracy']:.1f}" for t in (*RETRIEVAL, "all"))]
        line += [f"{whole['points']:+.2f}", _range(whole["points_interval"], 1, 2)]
        body.append([*line, f"{whole['differ']} of {whole['n']}", f"{100 * whole['bytes_share']:.1f}"])
    return Section("Answers", said, header, body)


def _range(pair: Any, times: float, places: int) -> str:
    low, high = (f"{times * x:.{places}f}" for x in pair)
    return f"{low} to {high}"


# --- The command ------------------------------------------------------------------------------------------------------


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(n) for n in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", default="bench/quality/model")
    parser.add_argument("--formats", metavar="F,..", type=lambda s: tuple(s.split(",")), default="int8,int4,int2")
    parser.add_argument("--length", metavar="N", type=positive, default=2048, help="tokens; default: %(default)s")
    parser.add_argument("--first", metavar="N,..", type=_numbers, default="512,64", help="tokens of the first chunk")
    parser.add_argument("--contexts", metavar="N", type=positive, default=32, help="of text; default: %(default)s")
    parser.add_argument("--n", metavar="N", type=positive, default=100, help="contexts per task; default: %(default)s")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--dtypes", metavar="D,..", type=lambda s: tuple(s.split(",")), default="bfloat16,float32")
    parser.add_argument("--parts", metavar="P,..", default="text,answers")
    parser.add_argument("--out", metavar="STEM", type=Path, help="writes STEM.json and STEM.md")
    args = parser.parse_args()
    out, rows, sections = Output(json=False), {}, []
    for part, measured, told in (("text", text_rows, text_section), ("answers", answer_rows, answer_section)):
        if part in args.parts.split(","):
            rows[part] = measured(args, out)
            sections.append(told(rows[part], args))
    publish(out, "Quantized caches beside the full one", args, rows, sections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
