"""The picture of a run of the routing evaluation: evidence and tokens loaded, rule by rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kvstrata.quality.routing import NO_QUERY
from kvstrata.quality.routing_metrics import ALL, Cell

STYLES = {"raw": ("#4477aa", "o"), "templated": ("#ee6677", "s"), NO_QUERY: ("#888888", "D")}
FILE = "recall.png"


def draw(folder: Path, found: Sequence[Cell]) -> str:
    """Draws into ``folder``; returns the file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [c for c in found if c["category"] == ALL and not c["rule"].startswith("oracle, ")]
    rules = list(dict.fromkeys(c["rule"] for c in shown))
    figure = Figure(figsize=(10, 0.3 * len(rules) + 1.5), layout="constrained")
    recall, tokens = figure.subplots(1, 2, sharey=True)
    for query in STYLES:
        mine = [c for c in shown if c["query"] == query]
        if mine:
            _row_by_row(recall, tokens, rules, mine)
    recall.set_yticks(range(len(rules)), rules)
    recall.invert_yaxis()
    recall.set_xlabel("evidence turns loaded, %, with 95 % interval")
    tokens.set_xlabel("tokens loaded, % of the conversation")
    for axes in (recall, tokens):
        axes.grid(alpha=0.3)
    figure.legend(*recall.get_legend_handles_labels(), loc="outside upper right", ncols=len(STYLES))
    figure.savefig(folder / FILE, dpi=120)
    return FILE


def _row_by_row(recall: Any, tokens: Any, rules: Sequence[str], mine: Sequence[Cell]) -> None:
    """One point per rule in each panel, of one kind of query."""
    query = mine[0]["query"]
    colour, marker = STYLES[query]
    y, x = [rules.index(c["rule"]) for c in mine], [100 * c["recall"] for c in mine]
    bars = [[100 * max(0, c["recall"] - c["low"]) for c in mine], [100 * max(0, c["high"] - c["recall"]) for c in mine]]
    name = "control without a query" if query == NO_QUERY else f"{query} query"
    recall.errorbar(x, y, xerr=bars, fmt=marker, capsize=2, markersize=5, color=colour, label=name)
    tokens.plot([100 * c["tokens_share"] for c in mine], y, marker, markersize=5, color=colour)
