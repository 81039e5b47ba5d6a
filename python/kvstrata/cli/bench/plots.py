"""Plots of what caches cost by tokens, and the numbers behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvstrata.quality.run import write


def save(
    stem: Path, facts: dict[str, Any], rows: list[dict[str, Any]], x: str, fields: dict[str, tuple[str, float]]
) -> None:
    """Writes STEM.json and a plot STEM-FIELD.png of each field over x, a line per cache; fields: (label, factor) of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stem.parent.mkdir(parents=True, exist_ok=True)
    write(stem.with_suffix(".json"), json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    for field, (label, factor) in fields.items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for name in dict.fromkeys((r["cache"], r["budget"]) for r in rows):
            mine = [r for r in rows if (r["cache"], r["budget"]) == name]
            said = name[0] if name[1] is None else f"{name[0]} {name[1]}"
            axes.plot([r[x] for r in mine], [r[field] * factor for r in mine], marker="o", label=said)
        axes.set(xlabel="tokens", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(f"{stem}-{field}.png", dpi=120)
        pyplot.close(figure)
