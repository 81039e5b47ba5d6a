"""The files of a finished or half-finished run: metrics.json, timings.json, predictions.csv, report.md, plots."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstrata.quality import metrics
from kvstrata.quality.contenders import label
from kvstrata.quality.manifest import MANIFEST, write
from kvstrata.quality.markdown import table
from kvstrata.quality.measure import Record
from kvstrata.quality.metrics import Cell
from kvstrata.quality.run import Key, load_records

COLUMNS = ("task", "length", "index", "contender", "budget", "question", "expected", "answer", "right")


def make(folder: Path, complaints: Sequence[str] = ()) -> tuple[list[str], dict[str, Any]]:
    """Writes every file that follows from the records. Returns the names of what was written, and the metrics.

    OSError if the folder holds no run. Plots are left out where matplotlib is not installed.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    records = load_records(folder)
    cells = metrics.cells(records)
    numbers = {"schema": 1, "cells": cells, "summary": metrics.summary(cells), "depths": metrics.depths(records)}
    timings = metrics.timings(records)
    write(folder / "metrics.json", json.dumps(numbers, indent=1) + "\n")
    write(folder / "timings.json", json.dumps({"schema": 1, "decode": timings}, indent=1) + "\n")
    write(folder / "predictions.csv", predictions(records))
    plots: list[str] = []
    if importlib.util.find_spec("matplotlib"):
        from kvstrata.quality import plots as drawing

        plots = drawing.draw(folder / "plots", numbers, timings)
    write(folder / "report.md", markdown(manifest, numbers, plots, complaints))
    return ["metrics.json", "timings.json", "predictions.csv", "report.md", *(f"plots/{p}" for p in plots)], numbers


def predictions(records: dict[Key, Record]) -> str:
    """One row per question."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(COLUMNS)
    for (task, length, index, name, budget), r in sorted(records.items()):
        if "scores" not in r:
            continue
        for i, (expected, answer, right) in enumerate(zip(r["expected"], r["answers"], r["scores"], strict=True)):
            rows.writerow((task, length, index, name, budget, i, expected, answer, right))
    return out.getvalue()


def markdown(manifest: dict[str, Any], numbers: dict[str, Any], plots: list[str], complaints: Sequence[str]) -> str:
    """The report as a person reads it."""
    config, machine = manifest["config"], manifest["machine"]
    parts = [
        f"# {config['model']}: answers against bytes\n",
        f"{config['mode']}; {config['n']} contexts per cell, seed {config['seed']}; model dtype {config['dtype']}; "
        f"kvstrata {manifest['versions']['kvstrata']}, torch {manifest['versions']['torch']}, transformers "
        f"{manifest['versions']['transformers']}; {machine['processor']}, {machine['cores']} cores.\n",
        "KV bytes and peak: what the allocator holds at the end and at the most, metadata included, as a share of the "
        "dense cache's keys and values of the same tokens. Accuracy: exact match, mean over contexts, with a bootstrap "
        "95 % interval. Relative: to the dense cache. Attention mass held: of what the "
        "continuation's queries give to the context in a dense cache, the share on tokens that are still held.\n",
    ]
    for length in sorted({c["length"] for c in numbers["cells"]}):
        parts.append(f"## {length or 'Own'} tokens\n")
        parts += _summary([s for s in numbers["summary"] if s["length"] == length])
        parts += _tasks([c for c in numbers["cells"] if c["length"] == length])
    if plots:
        parts += ["## Plots\n", *(f"![{Path(p).stem}](plots/{p})\n" for p in plots)]
    if complaints:
        parts += ["## Left out\n", *(f"- {c}" for c in complaints), ""]
    return "\n".join(parts)


def _label(c: Cell) -> str:
    return label(c["contender"], c["budget"])


def _percent(c: Cell, field: str) -> str:
    return f"{100 * c[field]:.1f}" if field in c else "-"


def spread(c: Cell) -> str:
    """An interval of accuracy in per cent."""
    return f"{100 * c['low']:.1f} to {100 * c['high']:.1f}" if "low" in c else "-"


def placed(text: str, mark: str, new: str) -> str:
    """``text`` with ``new`` between its marks <!-- MARK: begin --> and end. ValueError where it has none."""
    first, last = (f"<!-- {mark}: {word} -->" for word in ("begin", "end"))
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"expected the marks {first} and {last}")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def _summary(rows: list[Cell]) -> list[str]:
    if not rows:
        return []
    body = [
        [_label(r), "refused", "-", "-", "-", "-"]
        if "refused" in r
        else [_label(r), _percent(r, "accuracy"), spread(r)]
        + [_percent(r, f) for f in ("relative", "bytes_share", "peak_bytes_share")]
        for r in rows
    ]
    title = f"### Mean over retrieval: {', '.join(rows[0]['tasks'])}\n"
    return [title, *table(["cache", "accuracy %", "95 % interval", "relative %", "KV bytes %", "peak %"], body)]


def _tasks(cells: list[Cell]) -> list[str]:
    parts: list[str] = []
    for task in dict.fromkeys(c["task"] for c in cells):
        mine = [c for c in cells if c["task"] == task]
        parts += [f"### {task}\n", *(_text(mine) if any("kl" in c for c in mine) else _answers(mine))]
        parts += [f"{_label(c)}: refused, {c['refused']}\n" for c in mine if "refused" in c]
    return parts


def _answers(cells: list[Cell]) -> list[str]:
    header = ["cache", "accuracy %", "95 % interval", "relative %", "KV bytes %", "peak %", "full %", "KV-E3", "n"]
    rows = [
        [
            _label(c),
            _percent(c, "accuracy"),
            spread(c),
            *(_percent(c, f) for f in ("relative", "bytes_share", "peak_bytes_share")),
            _percent(c.get("states", {}), "full"),
            f"{c['kv_e3']:.3f}",
            str(c["n"]),
        ]
        for c in cells
        if "refused" not in c
    ]
    return table(header, rows)


LAYERS = {"attention error by layer %": "attention_error", "attention mass held by layer %": "captured_mass"}


def _text(cells: list[Cell]) -> list[str]:
    header = ["cache", "perplexity", "KL, nats", "top-1 as dense %", *LAYERS, "KV bytes %", "n"]
    rows = [
        [
            _label(c),
            f"{c['perplexity']:.3f}",
            f"{c['kl']:.4f}",
            _percent(c, "top1"),
            *(" ".join(f"{100 * x:.1f}" for x in c[field]) if c[field] else "-" for field in LAYERS.values()),
            _percent(c, "bytes_share"),
            str(c["n"]),
        ]
        for c in cells
        if "refused" not in c
    ]
    return table(header, rows)
