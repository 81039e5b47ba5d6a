"""The README's table, from the numbers of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from kvstrata.quality import metrics

FILE = Path(__file__).resolve().parents[2] / "bench" / "quality" / "table.py"
CONFIG = {"model": "m", "tasks": ["needle", "tracking"], "policies": ["streaming"], "peers": [], "budgets": ["25%"]}
CONFIG |= {"lengths": [512], "n": 1, "seed": 0, "mode": "query-agnostic"}
MANIFEST = {"config": CONFIG, "machine": {"processor": "a processor", "cores": 2}}


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_line_per_cache_and_the_command(made: ModuleType) -> None:
    base = {"expected": ["a"], "answers": ["a"], "decoded": 4, "bytes": 25, "peak_bytes": 30, "dense_bytes": 100}
    records = {
        ("needle", 512, 0, "streaming", "25%"): base | {"scores": [1]},
        ("tracking", 512, 0, "streaming", "25%"): base | {"scores": [0]},
        ("needle", 512, 0, "random", "25%"): {"refused": "too small"},
        ("tracking", 512, 0, "random", "25%"): base | {"scores": [1]},
    }
    cells = metrics.cells(records)
    lines = made.lines(MANIFEST, {"cells": cells, "summary": metrics.summary(cells)}, Path("results/r"))
    rows = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in lines if "|" in line}
    assert rows["cache"] == ["mean", "needle", "tracking", "KV bytes", "peak"]
    assert rows["streaming 25%"] == ["50.0", "100.0", "0.0", "25.0", "30.0"]
    assert rows["random 25%"] == ["refused", "refused", "100.0", "refused", "refused"]
    words = "kvstrata eval --model m --tasks needle,tracking --policies streaming --peers none --budgets 25% "
    assert words + "--length 512 --n 1 --seed 0 --mode query-agnostic --out results/r" in lines


def test_only_what_stands_between_the_marks_is_replaced(made: ModuleType) -> None:
    text = f"before\n{made.BEGIN}\nold\n{made.END}\nafter\n"
    once = made.placed(text, "new")
    assert once == f"before\n{made.BEGIN}\n\nnew\n\n{made.END}\nafter\n" and made.placed(once, "new") == once
    with pytest.raises(ValueError, match="expected the marks"):
        made.placed("nothing", "new")
