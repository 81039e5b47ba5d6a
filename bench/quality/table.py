"""The table of finished runs, for the README: answers against bytes, one line per cache and budget.

    kvstrata eval --tasks needle,multi_key --policies full,streaming --budgets 25% --out results/readme
    python bench/quality/table.py results/readme --into README.md

Several runs of the same tasks, lengths, seed and mode make one table, each with its own n; a line is taken from the first
run that has it. Without --into it is printed. In the file it takes the place of what stands between the two marks below.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstrata.budget import Budget
from kvstrata.quality.contenders import label
from kvstrata.quality.manifest import MANIFEST, write
from kvstrata.quality.markdown import table
from kvstrata.quality.report import placed, spread

MARK = "answers against bytes"
OPTIONS = ("tasks", "policies", "peers", "budgets", "lengths", "n", "seed", "mode")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what was asked, where it ran, metrics.json."""

    folder: Path
    config: dict[str, Any]
    machine: dict[str, Any]
    numbers: dict[str, Any]


def read(folder: Path) -> Run:
    """OSError if the folder holds no finished run."""
    manifest, numbers = (json.loads((folder / name).read_text("utf-8")) for name in (MANIFEST, "metrics.json"))
    return Run(folder, manifest["config"], manifest["machine"], numbers)


def command(config: dict[str, Any], folder: Path) -> str:
    """The command that made the run."""
    words = ["kvstrata", "eval", "--model", config["model"]]
    for option in OPTIONS:
        value = config[option]
        said = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{option.removesuffix('s') if option == 'lengths' else option}", said or "none"]
    return shlex.join([*words, "--out", str(folder)])


def lines(runs: list[Run]) -> list[str]:
    """The table of each length, with what it is and how it was made. ValueError for runs that do not belong together."""
    config = runs[0].config
    for run in runs[1:]:
        for field in ("model", "tasks", "lengths", "seed", "mode"):
            if run.config[field] != config[field]:
                raise ValueError(
                    f"{run.folder}: {field} is {run.config[field]}, expected {config[field]} as in {runs[0].folder}"
                )
    found = []
    for length in config["lengths"]:
        body = _rows(runs, length)
        found += [
            f"Exact match in per cent, mean with its 95 % interval and by task, over n contexts of {length} tokens each, "
            f"{config['mode']}; KV bytes and their peak in per cent of the dense cache's:\n",
            *table(["cache", "n", "mean", "interval", *sorted(config["tasks"]), "KV bytes", "peak"], body),
        ]
        if any("(" in row[-2] for row in body):
            found.append("In brackets: without the slots that a cache masks but does not free.\n")
    machines = dict.fromkeys(f"{r.machine['processor']}, {r.machine['cores']} cores" for r in runs)
    words = [command(r.config, r.folder) for r in runs]
    return [*found, f"On {' and '.join(machines)}, by\n", "```bash", *words, "```"]


def _rows(runs: list[Run], length: int) -> list[list[str]]:
    """One row per cache and budget, in order of the budgets, the best first."""
    rows: dict[tuple[str, str | None], tuple[float, list[str]]] = {}
    for run in runs:
        cells = {(c["task"], c["contender"], c["budget"]): c for c in run.numbers["cells"] if c["length"] == length}
        for s in run.numbers["summary"]:
            who = s["contender"], s["budget"]
            if s["length"] == length and who not in rows:
                mine = [cells[task, *who] for task in s["tasks"]]
                rows[who] = s.get("accuracy", -1.0), _row(s, mine)
    share = {b: Budget.parse(b) for _, b in rows}
    order = sorted(rows, key=lambda who: (-(share[who[1]].value if share[who[1]] else 1e99), -rows[who][0], who[0]))
    return [rows[who][1] for who in order]


def _row(s: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    held, kept = s.get("bytes_share"), s.get("kept_bytes_share")
    masked = f" ({100 * kept:.1f})" if kept is not None and held is not None and kept < 0.999 * held else ""
    tasks = [_said(c.get("accuracy")) for c in cells]
    n = str(max(c["n"] for c in cells))
    line = [
        label(s["contender"], s["budget"]),
        n,
        _said(s.get("accuracy")),
        spread(s) if "accuracy" in s else "refused",
    ]
    return [*line, *tasks, _said(held) + masked, _said(s.get("peak_bytes_share"))]


def _said(value: float | None) -> str:
    return "refused" if value is None else f"{100 * value:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    parser.add_argument("--into", metavar="FILE", type=Path)
    args = parser.parse_args()
    new = "\n".join(lines([read(folder) for folder in args.runs]))
    if args.into is None:
        print(new)
    else:
        write(args.into, placed(args.into.read_text("utf-8"), MARK, new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
