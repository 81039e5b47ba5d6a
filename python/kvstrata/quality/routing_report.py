"""The files of a run of the routing evaluation: metrics.json, predictions.csv, report.md, a plot. Ids and numbers only."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstrata.quality.manifest import MANIFEST, write
from kvstrata.quality.markdown import table
from kvstrata.quality.routing import MEASURES, NO_QUERY, SHIPPED
from kvstrata.quality.routing_metrics import ALL, MACRO, Cell, cells, prompts
from kvstrata.quality.routing_run import CHARACTERS, KIND, Key, Record, load_records

HEADER = (
    "rule", ">query", ">recall %", ">95 %", ">macro %", ">all %", ">any %", ">lift", ">AUROC", ">tokens", ">text %",
    ">PPA", ">EVAFF", ">top 30", ">vs shipped",
)  # fmt: skip
"""Columns of the main table; ">" sets one flush right."""
ABOUT = """
A question is sent to one or two episodes; its evidence, turns that the data names, is loaded or not. Recall: share of the
evidence turns that are loaded, mean over questions, with a bootstrap 95 % interval over conversations; macro: mean over
categories; all, any: questions with all or any of them loaded. Lift: (recall - random) / (oracle - random). AUROC: how
well the margin tells the questions whose episode is a best one. Tokens: of the episodes loaded, {tokens}; text %: of the
conversation's. PPA: mean percentile of the chosen prompt's windows among all, by cosine to the raw question; EVAFF: of
the evidence's windows, by cosine to the prompt's; 0 is best. Top 30: evidence windows in the best 30 % of EVAFF, in %.
vs shipped: recall less that of the rule of the paper's code (templated query, dot product with raw centroids), in points,
with an interval of the same draws.

`two`: always two episodes; `default`: one or two, as `Router` reads them. `shuffled`: the rule's choice, the windows dealt
to the episodes anew. `in time`: episodes are equal stretches of time. `random`, `size-proportional`: expectations, not
draws. `oracle`: the best single episode. `windows @k`: the k nearest windows, no episodes.
"""


def make(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Writes every file that follows from the records. Returns the names of what was written, and the metrics.

    OSError if the folder holds no run. The plot is left out where matplotlib is not installed.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    records = load_records(folder)
    numbers = {"schema": 1, "counts": manifest["config"]["counts"], "cells": cells(records)}
    write(folder / "metrics.json", json.dumps(numbers, indent=1) + "\n")
    write(folder / "predictions.csv", predictions(records))
    plots: list[str] = []
    if importlib.util.find_spec("matplotlib") and numbers["cells"]:
        from kvstrata.quality import routing_plot

        plots = [f"plots/{routing_plot.draw(folder / 'plots', numbers['cells'])}"]
    write(folder / "report.md", markdown(manifest, numbers, plots))
    return ["metrics.json", "predictions.csv", "report.md", *plots], numbers


def is_one(folder: Path) -> bool:
    """Whether a folder holds a run of this kind. OSError if it holds none at all."""
    return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["config"].get("kind") == KIND)


def predictions(records: Mapping[Key, Record]) -> str:
    """One row per seed, question, rule and query."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(("dialogue", "seed", "question", "category", "rule", "query", "episodes", *MEASURES))
    for (dialogue, seed), record in sorted(records.items()):
        for name, line in record["lines"].items():
            rule, query = name.split("|")
            for i, (question, category) in enumerate(zip(record["questions"], record["categories"], strict=True)):
                chosen = " ".join(map(str, line["episodes"][i]))
                values = (line[m][i] if m in line else None for m in MEASURES)
                rows.writerow((dialogue, seed, question, category, rule, query, chosen, *values))
    return out.getvalue()


def markdown(manifest: Mapping[str, Any], numbers: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The report as a person reads it."""
    config, counted, found = manifest["config"], numbers["counts"], numbers["cells"]
    by_category = ", ".join(f"{n} {name}" for name, n in counted["categories"].items())
    parts = [
        f"# Routing on {config['format']}: evidence loaded, without an LLM\n",
        f"Embedder {config['embedder']}; {len(config['seeds'])} seeds; windows of {config['cut']['window']} utterances, "
        f"at most {config['cut']['episodes']} episodes; kvstrata {manifest['versions']['kvstrata']}.\n",
        f"{counted['dialogues']} conversations, {counted['sessions']} sessions, {counted['turns']} turns; "
        f"{counted['questions']} questions ({by_category}), {counted['usable']} usable; {counted['dangling']} ids of "
        "evidence name no turn.\n",
        ABOUT.format(tokens=_counted_by(config)),
    ]
    parts += table([h.lstrip(">") for h in HEADER], rows(found))
    parts += _by_category(found)
    parts += ["## The oracle's episode, its prompt picked in other ways\n"]
    parts += table(
        ["prompt", "PPA", "EVAFF", "top 30"],
        [[c["rule"].removeprefix("oracle, "), *_values(c, "ppa", "evaff"), _percent(c, "top")] for c in prompts(found)],
    )
    parts += [f"![{Path(p).stem}]({p})\n" for p in plots]
    return "\n".join(parts)


def _counted_by(config: Mapping[str, Any]) -> str:
    return "by the tokenizer given" if config["tokenizer"] else f"estimated at {CHARACTERS} characters each"


def rows(found: Sequence[Cell]) -> list[list[str]]:
    """The main table: one row per rule and query, controls last; comparisons of prompts are left out."""
    macro = {(c["rule"], c["query"]): c for c in found if c["category"] == MACRO}
    whole = [c for c in found if c["category"] == ALL and not c["rule"].startswith("oracle, ")]
    return [
        [
            c["rule"],
            c["query"],
            _percent(c, "recall"),
            f"{100 * c['low']:.1f} to {100 * c['high']:.1f}",
            _percent(macro[c["rule"], c["query"]], "recall"),
            _percent(c, "whole"),
            _percent(c, "some"),
            *_values(c, "lift", "auroc"),
            f"{c['tokens']:.0f}",
            _percent(c, "tokens_share"),
            *_values(c, "ppa", "evaff"),
            _percent(c, "top"),
            gain(c),
        ]
        for c in sorted(whole, key=_order)
    ]


def _order(c: Cell) -> tuple[bool, bool]:
    """Rules by query, then what knows no query."""
    return c["query"] == NO_QUERY, c["query"] != "raw"


def gain(c: Cell) -> str:
    """Points of recall over the shipped rule, with the interval."""
    if (c["rule"], c["query"]) == SHIPPED:
        return "-"
    return f"{100 * c['gain']:+.1f} ({100 * c['gain_low']:.1f} to {100 * c['gain_high']:.1f})"


def _by_category(found: Sequence[Cell]) -> list[str]:
    names = [name for name in dict.fromkeys(c["category"] for c in found) if name not in (ALL, MACRO)]
    by_line: dict[tuple[str, str], dict[str, Cell]] = {}
    for c in sorted(found, key=_order):
        if not c["rule"].startswith("oracle, "):
            by_line.setdefault((c["rule"], c["query"]), {})[c["category"]] = c
    body = [[*line, *(_interval(of[name]) for name in names), _interval(of[MACRO])] for line, of in by_line.items()]
    sizes = {c["category"]: c["n"] for c in found}
    header = ["rule", "query", *(f"{name} ({sizes[name]})" for name in names), "macro"]
    return ["## Recall % by category\n", *table(header, body)]


def _interval(c: Cell) -> str:
    return f"{100 * c['recall']:.1f} ({100 * c['low']:.1f} to {100 * c['high']:.1f})"


def _percent(c: Cell, field: str) -> str:
    return f"{100 * c[field]:.1f}" if field in c else "-"


def _values(c: Cell, *fields: str) -> list[str]:
    return [f"{c[field]:.2f}" if field in c else "-" for field in fields]
