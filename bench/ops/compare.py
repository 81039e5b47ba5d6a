"""Benches of two builds in turn: what a change did to an op, as ratios of the same run.

    python bench/ops/compare.py OLD NEW score_window --format bf16 --queries 64 --tokens 6912

OLD and NEW are directories that hold a built package `kvstrata` with its `cli.bench`; everything after the bench's name
goes to it. The builds alternate, each in a process of its own; a row's time is the median of its medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def rows(package: Path, bench: str, arguments: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / f"{bench}.py"), *arguments, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return result


def case(row: dict[str, Any]) -> str:
    """What tells a bench's rows apart: its words and small numbers, never what was measured."""
    names = ("kind", "format", "spread", "stats", "score", "pooling", "order", "kernel", "queries", "tokens")
    return " ".join(str(row[name]) for name in names if name in row)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    p.add_argument("bench", help="a file of this folder, without .py")
    p.add_argument("--rounds", type=int, default=3)
    args, rest = p.parse_known_args()
    found: dict[str, dict[Path, list[float]]] = {}
    digests: dict[str, set[str]] = {}
    for _ in range(args.rounds):
        for package in (args.old, args.new):
            for row in rows(package.resolve(), args.bench, rest):
                found.setdefault(case(row), {}).setdefault(package, []).append(row["ms_p50"])
                digests.setdefault(case(row), set()).add(row["digest"])
    print(f"{'case':60}  old ms  new ms  old/new  bits")
    for name, times in found.items():
        old, new = (statistics.median(times[package]) for package in (args.old, args.new))
        same = "same" if len(digests[name]) == 1 else "differ"
        print(f"{name:60}  {old:6.2f}  {new:6.2f}  {old / new:7.2f}  {same}")


if __name__ == "__main__":
    main()
