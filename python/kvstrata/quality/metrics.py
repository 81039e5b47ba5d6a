"""From records to numbers: accuracy with intervals, bytes, likelihoods. Pure functions; order and timing play no part."""

from __future__ import annotations

import statistics
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kvstrata.quality.measure import Record
from kvstrata.quality.run import Key
from kvstrata.quality.tasks import RETRIEVAL

RESAMPLES = 2000
REFERENCE = ("DynamicCache", "full")
"""What shares of accuracy are taken of: the first of these that ran."""
Cell = dict[str, Any]
Group = tuple[str, int, str, str]
"""(task, length, contender, budget)."""


def interval(scores: list[float], name: str) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean over contexts; the same for the same name."""
    if len(scores) < 2:
        return (scores[0], scores[0]) if scores else (float("nan"), float("nan"))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = np.asarray(scores)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def cells(records: Mapping[Key, Record]) -> list[Cell]:
    """One cell per task, length, contender and budget, in order of the keys."""
    groups: dict[Group, list[Record]] = defaultdict(list)
    for (task, length, _, name, budget), record in sorted(records.items()):
        groups[task, length, name, budget].append(record)
    found = [cell(group, members) for group, members in groups.items()]
    reference = {(c["task"], c["length"]): c["accuracy"] for c in reversed(_referees(found)) if "accuracy" in c}
    for c in found:
        whole = reference.get((c["task"], c["length"]))
        if "accuracy" in c and whole:
            c["relative"] = c["accuracy"] / whole
    return found


def _referees(found: list[Cell]) -> list[Cell]:
    return sorted((c for c in found if c["contender"] in REFERENCE), key=lambda c: REFERENCE.index(c["contender"]))


def cell(group: Group, members: list[Record]) -> Cell:
    """The numbers of one cell; ``refused`` with the first reason where any example was."""
    task, length, name, budget = group
    found: Cell = {"task": task, "length": length, "contender": name, "budget": budget or None, "n": len(members)}
    refused = [m["refused"] for m in members if "refused" in m]
    if refused:
        return found | {"refused": refused[0], "n_refused": len(refused)}
    for field in ("bytes", "peak_bytes", "kept_bytes"):
        if all(field in m for m in members):
            found[f"{field}_share"] = _mean(m[field] / m["dense_bytes"] for m in members)
    found["mib"] = _mean(m["bytes"] for m in members) / 2**20
    states: dict[str, float] = defaultdict(float)
    for m in members:
        for state, n in m.get("states", {}).items():
            states[state] += n
    if states:
        found["states"] = {s: n / sum(states.values()) for s, n in sorted(states.items())}
    return found | (_likelihood(members) if "nll" in members[0] else _accuracy(members, "/".join(map(str, group))))


def _accuracy(members: list[Record], name: str) -> Cell:
    scores = [_mean(m["scores"]) for m in members]
    low, high = interval(scores, name)
    accuracy, decoded = _mean(scores), _mean(m["decoded"] / len(m["scores"]) for m in members)
    mib = _mean(m["bytes"] for m in members) / 2**20
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "error": statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0,
        "e3": accuracy**2 / max(decoded, 1.0),
        "kv_e3": accuracy**2 / mib,
    }


def _likelihood(members: list[Record]) -> Cell:
    nll = _mean(m["nll"] for m in members)
    return {
        "perplexity": float(np.exp(nll)),
        "kl": _mean(m["kl"] for m in members),
        "top1": _mean(m["top1"] for m in members),
        "attention_error": _by_layer(members, "attention_error"),
        "captured_mass": _by_layer(members, "captured_mass"),
    }


def _by_layer(members: list[Record], field: str) -> list[float] | None:
    """Means over contexts; None where the contender cannot say."""
    rows = [m.get(field) for m in members]
    return None if None in rows else [_mean(layer) for layer in zip(*rows, strict=True)]


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def summary(found: list[Cell], asked: Sequence[str] = RETRIEVAL) -> list[Cell]:
    """Per length, contender and budget: means over its tasks of those asked; of accuracy with a 95 % interval.

    The interval is normal, of a mean of independent means: contexts vary, tasks are fixed.
    """
    groups: dict[tuple[int, str, str], dict[str, Cell]] = defaultdict(dict)
    for c in found:
        if c["task"] in asked and ("accuracy" in c or "refused" in c):
            groups[c["length"], c["contender"], c["budget"] or ""][c["task"]] = c
    rows = []
    for (length, name, budget), tasks in groups.items():
        row: Cell = {"length": length, "contender": name, "budget": budget or None, "tasks": sorted(tasks)}
        refused = [c for c in tasks.values() if "refused" in c]
        if refused:
            rows.append(row | {"refused": refused[0]["refused"]})
            continue
        for field in ("accuracy", "relative", "bytes_share", "peak_bytes_share", "kept_bytes_share"):
            values = [c[field] for c in tasks.values() if field in c]
            if len(values) == len(tasks):
                row[field] = _mean(values)
        if "accuracy" in row:
            half = 1.96 * sum(c["error"] ** 2 for c in tasks.values()) ** 0.5 / len(tasks)
            row |= {"low": max(0.0, row["accuracy"] - half), "high": min(1.0, row["accuracy"] + half)}
        rows.append(row)
    return rows


def depths(records: Mapping[Key, Record]) -> list[Cell]:
    """Accuracy by depth, where the task controls it."""
    groups: dict[tuple[str, int, str, str, float], list[float]] = defaultdict(list)
    for (task, length, _, name, budget), record in sorted(records.items()):
        if "depth" in record and "scores" in record:
            groups[task, length, name, budget, record["depth"]].append(record["scores"][0])
    names = ("task", "length", "contender", "budget", "depth")
    return [dict(zip(names, group, strict=True)) | {"accuracy": _mean(s)} for group, s in groups.items()]


def timings(records: Mapping[Key, Record]) -> list[Cell]:
    """ms per decoded token by contender and context; the only numbers that differ between two runs."""
    groups: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for (_, length, _, name, budget), record in sorted(records.items()):
        if record.get("ms"):
            groups[name, budget, length].append(statistics.median(record["ms"]))
    return [
        {"contender": name, "budget": budget or None, "length": length, "ms_p50": statistics.median(ms), "n": len(ms)}
        for (name, budget, length), ms in groups.items()
    ]
