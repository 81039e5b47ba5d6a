"""Numbers from records: means, intervals, shares, refusals."""

from __future__ import annotations

import pytest

from kvstrata.quality import metrics
from kvstrata.quality.report import table


def record(scores: list[int], n_bytes: int = 50, **more: object) -> dict:
    base = {"answers": ["a"] * len(scores), "expected": ["a"] * len(scores), "scores": scores, "decoded": 4}
    return base | {"bytes": n_bytes, "peak_bytes": 2 * n_bytes, "dense_bytes": 100, "ms": [1.0, 3.0, 2.0]} | more


RECORDS = {
    ("needle", 512, 0, "DynamicCache", ""): record([1], 100, depth=0.0),
    ("needle", 512, 1, "DynamicCache", ""): record([1], 100, depth=0.1),
    ("needle", 512, 0, "streaming", "50%"): record([1], states={"full": 30, "evicted": 70}, depth=0.0),
    ("needle", 512, 1, "streaming", "50%"): record([0], states={"full": 10, "evicted": 90}, depth=0.1),
    ("multi_query", 512, 0, "DynamicCache", ""): record([1, 1, 1, 0], 100),
    ("multi_query", 512, 0, "streaming", "50%"): record([1, 0, 0, 0]),
    ("recent", 512, 0, "streaming", "50%"): {"refused": "too small"},
}


def cell(task: str, contender: str) -> dict:
    return next(c for c in metrics.cells(RECORDS) if (c["task"], c["contender"]) == (task, contender))


def test_a_cell_is_the_mean_over_contexts() -> None:
    c = cell("needle", "streaming")
    assert (c["accuracy"], c["relative"], c["n"]) == (0.5, 0.5, 2)
    assert (c["bytes_share"], c["peak_bytes_share"]) == (0.5, 1.0)
    assert c["states"] == {"full": 0.2, "evicted": 0.8}
    assert c["e3"] == pytest.approx(0.25 / 4)
    assert cell("multi_query", "streaming")["relative"] == pytest.approx(1 / 3)


def test_a_refusal_is_a_cell_of_its_own() -> None:
    assert cell("recent", "streaming")["refused"] == "too small"


def test_summary_takes_retrieval_tasks_only() -> None:
    rows = {(r["contender"], r["budget"]): r for r in metrics.summary(metrics.cells(RECORDS))}
    assert rows["streaming", "50%"]["accuracy"] == pytest.approx((0.5 + 0.25) / 2)
    assert rows["streaming", "50%"]["tasks"] == ["multi_query", "needle"]


def test_interval_covers_the_mean_and_narrows() -> None:
    few = metrics.interval([0.0, 1.0] * 10, "a")
    many = metrics.interval([0.0, 1.0] * 1000, "a")
    assert few[0] < 0.5 < few[1] and many[1] - many[0] < 0.25 * (few[1] - few[0])
    assert metrics.interval([1.0] * 5, "a") == (1.0, 1.0)
    assert few == metrics.interval([0.0, 1.0] * 10, "a")
    width = many[1] - many[0]  # of a mean of 2,000 fair coins: 2 * 1.96 * 0.5 / sqrt(2000)
    assert width == pytest.approx(0.0438, rel=0.1)


def test_depths_and_timings() -> None:
    found = {(d["contender"], d["depth"]): d["accuracy"] for d in metrics.depths(RECORDS)}
    assert found["streaming", 0.0] == 1.0 and found["streaming", 0.1] == 0.0
    assert all(t["ms_p50"] == 2.0 for t in metrics.timings(RECORDS))


def test_table_is_markdown() -> None:
    assert table(["cache", "n"], [["full", "3"]]) == ["| cache |   n |", "| ----- | --: |", "| full  |   3 |", ""]


def test_the_interval_of_a_mean_over_tasks() -> None:
    """Independent tasks: variances of their means add up, over the square of their number."""
    base = {"expected": ["a"], "answers": ["a"], "decoded": 4, "bytes": 25, "peak_bytes": 30, "dense_bytes": 100}
    scores = {"needle": [1, 0, 1, 0], "tracking": [1, 1, 1, 0], "multi_key": [0, 0, 0, 0]}
    records = {
        (t, 512, i, "a", "25%"): base | {"scores": [s]} for t, line in scores.items() for i, s in enumerate(line)
    }
    (row,) = metrics.summary(metrics.cells(records))
    half = 1.96 / 3 * ((1 / 3) / 4 + (1 / 4) / 4) ** 0.5
    mean = (0.5 + 0.75) / 3
    assert (row["low"], row["high"]) == (pytest.approx(mean - half), pytest.approx(mean + half))


def test_a_summary_is_over_the_tasks_that_are_asked() -> None:
    found = [
        {"task": task, "length": 512, "contender": "a", "budget": None, "accuracy": a, "error": 0.0}
        for task, a in (("needle", 1.0), ("frequent", 0.5))
    ]
    assert [row["accuracy"] for row in metrics.summary(found)] == [1.0]
    assert [row["accuracy"] for row in metrics.summary(found, ("frequent",))] == [0.5]
    assert metrics.summary([{"task": "text", "length": 512, "contender": "a", "budget": None}], ("text",)) == []
