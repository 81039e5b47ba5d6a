"""Time attention of a prompt's chunk over what is already stored, beside torch SDPA, the group packed as query rows.

Every query sees every stored token. The same rows as `kvstrata bench attend`, with many queries.
"""

from __future__ import annotations

import argparse

from kvstrata.cli.bench import attend
from kvstrata.cli.output import Output

QUERIES = 512
REPS = 5  # a call takes seconds on the CPU


def arguments(parser: argparse.ArgumentParser) -> None:
    attend.arguments(parser, QUERIES, REPS)


def run(args: argparse.Namespace, out: Output) -> int:
    return attend.timed(args, out, "prefill")
