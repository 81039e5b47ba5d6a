"""Time the ops and whole decoding on this machine, each beside its baseline in the same run.

A bench measures and never asserts. Inputs are random, ours and the baseline alternate, and shares are of the bandwidth
measured in the same run.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from kvstrata.cli.output import Output

BENCHES = {
    "attend": "attention of a decode step over stored pages, beside torch SDPA",
    "prefill": "attention of a chunk of queries over stored pages, beside torch SDPA",
    "select": "pages for a query by their summaries, beside a scan by torch and attention to all pages",
    "append": "tokens into pages, beside torch's copy",
    "quantize": "pages into quantized formats and back, beside torch's copy",
    "decode": "ms per token and bytes by context, beside transformers' own caches",
    "memory": "KV bytes and their peak while a prompt is put in, beside transformers' own caches",
}
"""Modules of this package by name. Each has `arguments(parser)` and `run(args, out) -> int`."""


def arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True, parser_class=_Late)
    for name, text in BENCHES.items():
        benches.add_parser(name, help=text).bench = name


def run(args: argparse.Namespace, out: Output) -> int:
    return int(_module(args.bench).run(args, out))


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


class _Late(argparse.ArgumentParser):
    """Asks a bench for its arguments when it is called: benches import torch, and `kvstrata --help` does not."""

    bench = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        module = _module(self.bench)
        self.description, self.formatter_class = module.__doc__, argparse.RawDescriptionHelpFormatter
        # Left out where it is not given: --json may stand before the bench's name too.
        self.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object")
        module.arguments(self)
        return super().parse_known_args(args, namespace)
