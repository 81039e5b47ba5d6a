"""Plots of what caches cost by tokens, and the numbers behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvstrata.quality.contenders import label
from kvstrata.quality.manifest import write


def save(stem: Path, made: dict[str, Any], x: str, fields: dict[str, tuple[str, float]]) -> None:
    """Writes what a bench made as STEM.json, and a plot STEM-FIELD.png of each field over x, a line per cache; fields: (label,
    factor) of each. Where x is not the context, caches of several contexts have a line each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stem.parent.mkdir(parents=True, exist_ok=True)
    write(stem.with_suffix(".json"), json.dumps(made, indent=1) + "\n")
    rows = made["rows"]
    several = x != "context" and len({r["context"] for r in rows}) > 1
    for field, (axis, factor) in fields.items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for name in dict.fromkeys(_line(r, several) for r in rows):
            mine = [r for r in rows if _line(r, several) == name]
            axes.plot([r[x] for r in mine], [r[field] * factor for r in mine], marker="o", label=name)
        axes.set(xlabel="tokens", ylabel=axis, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(f"{stem}-{field}.png", dpi=120)
        pyplot.close(figure)


def _line(r: dict[str, Any], several: bool) -> str:
    said = label(r["cache"], r["budget"])
    return f"{said}, {r['context']}" if several else said
