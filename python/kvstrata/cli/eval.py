"""Measure answers against bytes: tasks, policies and peers on the same prompts, in one run that can be resumed.

    kvstrata eval --model bench/quality/model --tasks all --policies all --budgets 25%,12.5% --out results/run1
    kvstrata eval report results/run1
    kvstrata eval episodes --data locomo10.json --format locomo

A run is a folder: manifest.json, records.jsonl, metrics.json, timings.json, predictions.csv, report.md, plots. The same
command again goes on where it was stopped. A task is a name, or a JSONL file with one object per line:
{"context": "...", "questions": ["..."], "answers": ["..."]}.

eval episodes needs no model: it measures how much of the evidence of questions about long conversations is loaded when
each is sent to an episode, on a user's LoCoMo or RealTalk files or on the generated set that comes with kvstrata.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvstrata.cli import routing
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output
from kvstrata.quality import MODES

MODEL = "bench/quality/model"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="report RUN | episodes",
        help="write the report of a run again; or send questions to episodes",
    )
    parser.add_argument("--model", metavar="M", default=MODEL, help=f"a folder or a hub id; default: {MODEL}")
    parser.add_argument("--tasks", metavar="T,..", default="all", help="names, JSONL files, or all (default)")
    parser.add_argument("--policies", metavar="P,..", default="all", help="names, all (default), or none")
    parser.add_argument("--peers", metavar="P,..", default="DynamicCache", help="names, all, or none")
    parser.add_argument("--budgets", metavar="B,..", default="50%,25%,12.5%,6.25%", help="default: %(default)s")
    parser.add_argument(
        "--length", metavar="N,..", type=_lengths, default="2048", help="tokens of an example; default: %(default)s"
    )
    parser.add_argument("--n", metavar="N", type=positive, default=200, help="examples per cell; default: %(default)s")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--jobs", metavar="N", type=positive, default=1, help="processes; threads are shared out")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: results/eval, or results/episodes")
    routing.arguments(parser.add_argument_group("eval episodes"))


def run(args: argparse.Namespace, out: Output) -> int:
    if args.words == ["episodes"]:
        return routing.run(args, out)
    if args.words:
        if len(args.words) != 2 or args.words[0] != "report":
            return out.fail(f"eval: {' '.join(args.words)!r} is not understood, expected: report RUN, or episodes")
        return _report(Path(args.words[1]), out)
    from kvstrata.quality import report
    from kvstrata.quality.run import Run

    folder = args.out or Path("results/eval")
    run = Run(folder, _config(args))
    left, whole = len(run.units()), len(run.examples())
    out.line(f"{folder}: {whole - left} of {whole} examples measured, {left} to go")
    with out.progress("examples", left) as advance:
        run.work(lambda unit: advance(f"{unit.task} {unit.length or ''}"))
    for contender in run.outside():
        with out.busy(contender.label):
            run.work_outside(contender)
    for complaint in run.complaints:
        out.line(f"left out: {complaint}", style="yellow")
    return _finish(folder, *report.make(folder, run.complaints), out)


def _report(folder: Path, out: Output) -> int:
    from kvstrata.quality import routing_report

    if routing_report.is_one(folder):
        return routing.finish(folder, out)
    from kvstrata.quality import report

    return _finish(folder, *report.make(folder), out)


def _config(args: argparse.Namespace) -> Any:
    from kvstrata.quality.contenders import PEERS, POLICIES
    from kvstrata.quality.run import Config
    from kvstrata.quality.tasks import TASKS

    return Config(
        model=args.model,
        tasks=_names(args.tasks, list(TASKS)),
        policies=_names(args.policies, list(POLICIES)),
        peers=_names(args.peers, list(PEERS)),
        budgets=_names(args.budgets, []),
        lengths=args.length,
        n=args.n,
        seed=args.seed,
        mode=args.mode,
        dtype=args.dtype,
        jobs=args.jobs,
    )


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(positive(n) for n in _names(text, []))


def _names(text: str, known: list[str]) -> tuple[str, ...]:
    if text == "all":
        return tuple(known)
    return () if text == "none" else tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _finish(folder: Path, written: list[str], numbers: dict[str, Any], out: Output) -> int:
    rows = [
        (s["contender"], s["budget"] or "-", s["length"], *(_percent(s, f) for f in FIELDS)) for s in numbers["summary"]
    ]
    columns = ["cache", "budget", ">tokens", ">accuracy %", ">relative %", ">KV bytes %", ">peak %"]
    out.table("Mean over the retrieval tasks of the run", columns, rows)
    out.line(f"\n{folder}: {', '.join(written)}")
    if not any(name.startswith("plots/") for name in written):
        out.line("No plots: matplotlib is not installed (pip install matplotlib).")
    out.result({"folder": str(folder), "files": written} | numbers)
    return 0


FIELDS = ("accuracy", "relative", "bytes_share", "peak_bytes_share")


def _percent(row: dict[str, Any], field: str) -> str:
    return "refused" if "refused" in row else f"{100 * row[field]:.1f}" if field in row else "-"
