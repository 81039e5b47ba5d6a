"""Pictures of a run: score against bytes, needle by depth, time against context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kvstrata.quality.contenders import label
from kvstrata.quality.metrics import Cell

COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#000000", "#994455", "#997700", "#888888")
MARKERS = "osD^vP*Xhd"


def draw(folder: Path, numbers: dict[str, Any], timings: list[Cell]) -> list[str]:
    """Draws what the numbers hold into ``folder``; returns the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    scored = [c for c in numbers["cells"] if "accuracy" in c]
    for length in sorted({c["length"] for c in scored}):
        name = f"score_{length}.png"
        _score([c for c in scored if c["length"] == length], folder / name)
        drawn.append(name)
    if numbers["depths"]:
        _needle(numbers["depths"], folder / "needle.png")
        drawn.append("needle.png")
    if timings:
        _time(timings, folder / "time.png")
        drawn.append("time.png")
    return drawn


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    return {n: {"color": COLOURS[i % 10], "marker": MARKERS[i % 10]} for i, n in enumerate(dict.fromkeys(names))}


def _score(cells: list[Cell], file: Path) -> None:
    """One panel per task: accuracy against KV bytes, one line per contender, bars for the interval."""
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    across = min(4, len(tasks))
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(3.4 * across + 1.6, 2.9 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    styles = _styles([c["contender"] for c in cells])
    for axes, task in zip(panels.flat, tasks, strict=False):
        for name, style in styles.items():
            mine = sorted((c for c in cells if (c["task"], c["contender"]) == (task, name)), key=_bytes)
            if not mine:
                continue
            y = [100 * c["accuracy"] for c in mine]
            bars = [[100 * (c["accuracy"] - c["low"]) for c in mine], [100 * (c["high"] - c["accuracy"]) for c in mine]]
            axes.errorbar([_bytes(c) for c in mine], y, yerr=bars, label=name, capsize=2, markersize=5, **style)
        axes.set_title(task)
        axes.set_xscale("log", base=2)
        axes.set_xticks([6.25, 12.5, 25, 50, 100], ["6.25", "12.5", "25", "50", "100"])
        axes.set_ylim(-4, 104)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("exact match, %")
    figure.supxlabel("KV bytes, % of the dense cache (metadata included)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(file, dpi=120)


def _bytes(c: Cell) -> float:
    return 100 * float(c["bytes_share"])


def _needle(depths: list[Cell], file: Path) -> None:
    """Accuracy by depth: one row per contender, budget and length."""
    rows = list(dict.fromkeys((d["contender"], d["budget"], d["length"]) for d in depths))
    columns = sorted({d["depth"] for d in depths})
    grid = [[float("nan")] * len(columns) for _ in rows]
    for d in depths:
        grid[rows.index((d["contender"], d["budget"], d["length"]))][columns.index(d["depth"])] = 100 * d["accuracy"]
    figure = Figure(figsize=(8, 0.34 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), [f"{100 * c:.0f}" for c in columns])
    axes.set_yticks(range(len(rows)), [f"{label(name, budget)} {length}" for name, budget, length in rows])
    axes.set_xlabel("depth of the fact, % of the context")
    axes.set_title("needle: exact match, %")
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            axes.text(j, i, "" if value != value else f"{value:.0f}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=120)


def _time(timings: list[Cell], file: Path) -> None:
    """ms per decoded token: lines over contexts, or bars where there is one context only."""
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    by_label = {(label(t["contender"], t["budget"]), t["length"]): t["ms_p50"] for t in timings}
    labels = list(dict.fromkeys(name for name, _ in by_label))
    lengths = sorted({length for _, length in by_label})
    if len(lengths) == 1:
        axes.barh(labels[::-1], [by_label[name, lengths[0]] for name in labels[::-1]], color=COLOURS[0])
        axes.set_xlabel(f"ms per decoded token, median, {lengths[0]} tokens")
    else:
        styles = _styles(labels)
        for name in labels:
            points = [(n, by_label[name, n]) for n in lengths if (name, n) in by_label]
            axes.plot(*zip(*points, strict=True), label=name, **styles[name])
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("ms per decoded token, median")
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=120)
