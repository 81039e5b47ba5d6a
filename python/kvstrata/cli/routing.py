"""kvstrata eval episodes: how much evidence is loaded when questions are sent to episodes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output

FORMATS = ("locomo", "realtalk", "generated")
EMBEDDERS = ("minilm", "hashed", "tfidf", "input")
"""The last one: the input embeddings of ``--model``."""
CLAIMED = ("nearest_window", "nearest_window, default")
"""Rules that are held against the shipped one in a line of their own, by the raw query."""


def arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--data", metavar="PATH", default="", help="the user's file, or folder of files (realtalk)")
    parser.add_argument(
        "--format", choices=FORMATS, default="generated", help="default: %(default)s, which needs no data"
    )
    parser.add_argument(
        "--embedder", choices=EMBEDDERS, help="input: of --model; default: minilm; hashed for the generated set"
    )
    parser.add_argument("--seeds", metavar="N", type=positive, default=5, help="clusterings; default: %(default)s")
    parser.add_argument("--episodes", metavar="N", type=positive, default=4, help="default: %(default)s")
    parser.add_argument("--window", metavar="N", type=positive, default=4, help="utterances; default: %(default)s")
    parser.add_argument("--bounded", action="store_true", help="no window crosses the border of two sessions")
    parser.add_argument("--captions", action="store_true", help="embed captions of images too")
    parser.add_argument(
        "--representatives", metavar="N", type=positive, default=4, help="windows of a prompt; default: %(default)s"
    )
    parser.add_argument("--pick", choices=("coverage", "closest"), default="coverage", help="default: %(default)s")
    parser.add_argument(
        "--tokenizer", metavar="FILE", default="", help="a tokenizer.json; default: 4 characters a token"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Measures what is left of a run, and writes and shows its report."""
    from kvstrata.quality.routing_run import Run

    folder = args.out or Path("results/episodes")
    run = Run(folder, _config(args))
    left, whole = len(run.units()), run.count()
    out.line(f"{folder}: {whole - left} of {whole} clusterings measured, {left} to go")
    if left:
        with out.busy(f"embedder {run.config.embedder}"):
            run.embedder  # noqa: B018 (loads it)
        with out.progress("clusterings", left) as advance:
            run.work(advance)
    return finish(folder, out)


def _config(args: argparse.Namespace) -> Any:
    from kvstrata.quality.routing import Cut
    from kvstrata.quality.routing_run import Config

    return Config(
        format=args.format,
        data=args.data,
        embedder=args.embedder or ("hashed" if args.format == "generated" else "minilm"),
        seeds=tuple(range(args.seed, args.seed + args.seeds)),
        cut=Cut(args.window, args.bounded, args.captions, args.episodes, args.representatives, args.pick),
        tokenizer=args.tokenizer,
        model=args.model if args.embedder == "input" else "",
    )


def finish(folder: Path, out: Output) -> int:
    """Writes the files of a run's report and shows its table."""
    from kvstrata.quality import routing_report
    from kvstrata.quality.routing_metrics import ALL

    with out.busy("report"):
        written, numbers = routing_report.make(folder)
    counted = numbers["counts"]
    title = f"{counted['usable']} questions with evidence on {counted['dialogues']} conversations"
    out.table(title, list(routing_report.HEADER), routing_report.rows(numbers["cells"]))
    out.line()
    for c in numbers["cells"]:
        if c["rule"] in CLAIMED and (c["query"], c["category"]) == ("raw", ALL):
            out.line(f"{c['rule']}: {routing_report.gain(c)} points of recall over the shipped rule")
    out.line(f"{folder}: {', '.join(written)}")
    if not any(name.startswith("plots/") for name in written):
        out.line("No plot: matplotlib is not installed (pip install matplotlib).")
    out.result({"folder": str(folder), "files": written} | numbers)
    return 0
