"""The table of a finished run, for the README: answers against bytes, one line per cache and budget.

    kvstrata eval --tasks needle,multi_key --policies full,streaming --budgets 25% --out results/readme
    python bench/quality/table.py results/readme --into README.md

Without --into it is printed. In the file it takes the place of what stands between the two marks below.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from kvstrata.quality.contenders import label
from kvstrata.quality.report import table
from kvstrata.quality.run import MANIFEST, write

BEGIN, END = "<!-- answers against bytes: begin -->", "<!-- answers against bytes: end -->"
OPTIONS = ("tasks", "policies", "peers", "budgets", "lengths", "n", "seed", "mode")


def command(config: dict[str, Any], folder: Path) -> str:
    """The command that made the run."""
    words = ["kvstrata", "eval", "--model", config["model"]]
    for option in OPTIONS:
        value = config[option]
        said = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{option.removesuffix('s') if option == 'lengths' else option}", said or "none"]
    return shlex.join([*words, "--out", str(folder)])


def lines(manifest: dict[str, Any], numbers: dict[str, Any], folder: Path) -> list[str]:
    """The table of each length, with what it is and how it was made."""
    config, machine, found = manifest["config"], manifest["machine"], []
    for length in sorted({s["length"] for s in numbers["summary"]}):
        rows = [s for s in numbers["summary"] if s["length"] == length]
        cells = {(c["task"], c["contender"], c["budget"]): c for c in numbers["cells"] if c["length"] == length}
        tasks = rows[0]["tasks"]
        body = [_row(s, [cells[task, s["contender"], s["budget"]] for task in tasks]) for s in rows]
        found += [
            f"Exact match in per cent, {config['n']} contexts of {length} tokens per cell, {config['mode']}; KV bytes "
            "and their peak in per cent of the dense cache's:\n",
            *table(["cache", "mean", *tasks, "KV bytes", "peak"], body),
        ]
    words = command(config, folder)
    return [*found, f"On {machine['processor']}, {machine['cores']} cores, by\n", "```bash", words, "```"]


def _row(s: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    values = [s.get("accuracy"), *(c.get("accuracy") for c in cells), s.get("bytes_share"), s.get("peak_bytes_share")]
    return [label(s["contender"], s["budget"]), *("refused" if v is None else f"{100 * v:.1f}" for v in values)]


def placed(text: str, new: str) -> str:
    """``text`` with ``new`` between its marks. ValueError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the marks {BEGIN} and {END}")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--into", metavar="FILE", type=Path)
    args = parser.parse_args()
    manifest, numbers = (json.loads((args.run / name).read_text("utf-8")) for name in (MANIFEST, "metrics.json"))
    new = "\n".join(lines(manifest, numbers, args.run))
    if args.into is None:
        print(new)
    else:
        write(args.into, placed(args.into.read_text("utf-8"), new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
