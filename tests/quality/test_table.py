"""The README's table, from the numbers of a run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvstrata.quality import metrics, report

FILE = Path(__file__).resolve().parents[2] / "bench" / "quality" / "table.py"
CONFIG = {"model": "m", "tasks": ["needle", "tracking"], "policies": ["streaming"], "peers": [], "budgets": ["25%"]}
CONFIG |= {"lengths": [512], "n": 1, "seed": 0, "mode": "query-agnostic"}
MACHINE = {"processor": "a processor", "cores": 2}
BASE = {"expected": ["a"], "answers": ["a"], "decoded": 4, "bytes": 25, "peak_bytes": 30, "dense_bytes": 100}


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(made: ModuleType, records: dict, folder: str, **config: object) -> object:  # type: ignore[type-arg]
    cells = metrics.cells(records)
    return made.Run(Path(folder), CONFIG | config, MACHINE, {"cells": cells, "summary": metrics.summary(cells)})


def rows_of(lines: list[str]) -> dict[str, list[str]]:
    return {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in lines if "|" in line}


def test_a_line_per_cache_and_the_command(made: ModuleType) -> None:
    records = {
        ("needle", 512, 0, "streaming", "25%"): BASE | {"scores": [1]},
        ("tracking", 512, 0, "streaming", "25%"): BASE | {"scores": [0]},
        ("needle", 512, 0, "random", "25%"): {"refused": "too small"},
        ("tracking", 512, 0, "random", "25%"): BASE | {"scores": [1]},
    }
    lines = made.lines([run(made, records, "results/r")])
    rows = rows_of(lines)
    assert rows["cache"] == ["n", "mean", "interval", "needle", "tracking", "KV bytes", "peak"]
    assert rows["streaming 25%"] == ["1", "50.0", "50.0 to 50.0", "100.0", "0.0", "25.0", "30.0"]
    assert rows["random 25%"] == ["1", "refused", "refused", "refused", "100.0", "refused", "refused"]
    words = "kvstrata eval --model m --tasks needle,tracking --policies streaming --peers none --budgets 25% "
    assert words + "--length 512 --n 1 --seed 0 --mode query-agnostic --out results/r" in lines


def test_runs_are_joined_best_first_by_budget(made: ModuleType) -> None:
    def records(name: str, budget: str, right: int, n: int, **more: int) -> dict:  # type: ignore[type-arg]
        tasks = ("needle", "tracking")
        return {(t, 512, i, name, budget): BASE | {"scores": [right]} | more for t in tasks for i in range(n)}

    first = records("a", "25%", 0, 2) | records("b", "25%", 1, 2) | records("a", "50%", 0, 2)
    second = records("a", "25%", 1, 1) | records("dense", "", 1, 1) | records("masks", "25%", 0, 1, kept_bytes=20)
    rows = rows_of(made.lines([run(made, first, "x"), run(made, second, "y", n=1)]))
    assert list(rows)[2:] == ["dense", "a 50%", "b 25%", "a 25%", "masks 25%"]
    assert rows["a 25%"][:2] == ["2", "0.0"]
    assert rows["masks 25%"][-2:] == ["25.0 (20.0)", "30.0"]
    with pytest.raises(ValueError, match="seed is 7, expected 0 as in x"):
        made.lines([run(made, first, "x"), run(made, second, "y", seed=7)])


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    begin, end = "<!-- here: begin -->", "<!-- here: end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    once = report.placed(text, "here", "new")
    assert once == f"before\n{begin}\n\nnew\n\n{end}\nafter\n" and report.placed(once, "here", "new") == once
    with pytest.raises(ValueError, match="expected the marks <!-- there: begin -->"):
        report.placed(text, "there", "new")
