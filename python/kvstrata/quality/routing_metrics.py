"""From records of the routing evaluation to cells: means by category with intervals over dialogues. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.episodes.vectors import F64
from kvstrata.quality.routing import NO_QUERY, SHIPPED
from kvstrata.quality.routing_run import Key, Record

RESAMPLES = 2000
ALL, MACRO = "all", "macro"
"""The mean over questions, and the mean over categories."""
RANDOM, ORACLE = ("random", NO_QUERY), ("oracle", NO_QUERY)
Cell = dict[str, Any]
Rows = dict[str, NDArray[Any]]


def cells(records: Mapping[Key, Record]) -> list[Cell]:
    """One cell per rule, query and category, and of all questions and the macro mean.

    recall, its bootstrap 95 % interval over dialogues (all seeds of one together); gain: recall less that of the shipped
    rule, with an interval of the same draws; whole, some; lift: (recall less random) / (oracle less random); auroc: how
    well a rule's margin tells the questions whose episode is a best one; tokens, also as a share of the dialogue's;
    ppa, evaff, top.
    """
    if not records:
        return []
    ordered = dict(sorted(records.items()))
    names = list(next(iter(ordered.values()))["lines"])
    table = {tuple(name.split("|")): _rows(ordered, name) for name in names}
    shared = _shared(ordered)
    groups = [ALL, *dict.fromkeys(shared["category"].tolist()), MACRO]
    draws = _draws(len(set(shared["dialogue"].tolist())))
    means = {line: _recalls(rows, shared, draws) for line, rows in table.items()}
    found = []
    for (rule, query), rows in table.items():
        mine = {group: _cell(rows, _within(shared, group), shared, table[ORACLE]) for group in groups if group != MACRO}
        mine[MACRO] = _macro([cell for group, cell in mine.items() if group != ALL])
        for group in groups:
            cell = mine[group] | _spread(means, (rule, query), group)
            found.append({"rule": rule, "query": query, "category": group} | cell)
    return found


def _rows(records: Mapping[Key, Record], name: str) -> Rows:
    """Each measure of a line over all questions of all records, f64 [N]; NaN where it has none."""
    columns = [record["lines"][name] for record in records.values()]
    fields = [field for field in columns[0] if field != "episodes"]
    rows = {field: np.array([v for c in columns for v in c[field]], dtype=np.float64) for field in fields}
    return rows | {"episodes": np.array([len(e) for c in columns for e in c["episodes"]])}


def _shared(records: Mapping[Key, Record]) -> Rows:
    """What is the same for each line, [N]: category, number of the dialogue, its tokens."""
    dialogues = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in records))}
    sizes = [(name, record, len(record["questions"])) for (name, _), record in records.items()]
    return {
        "category": np.array([c for _, record, _ in sizes for c in record["categories"]]),
        "dialogue": np.array([dialogues[name] for name, _, n in sizes for _ in range(n)]),
        "tokens": np.array([record["tokens"] for _, record, n in sizes for _ in range(n)]),
    }


def _within(shared: Rows, group: str) -> NDArray[np.bool_]:
    return np.ones(len(shared["category"]), bool) if group == ALL else np.asarray(shared["category"] == group)


def _cell(rows: Rows, within: NDArray[np.bool_], shared: Rows, oracle: Rows) -> Cell:
    cell: Cell = {"n": int(within.sum())}
    cell |= {name: float(rows[name][within].mean()) for name in ("recall", "whole", "some", "tokens")}
    cell["tokens_share"] = float((rows["tokens"] / shared["tokens"])[within].mean())
    cell |= {name: float(rows[name][within].mean()) for name in ("ppa", "evaff", "top") if name in rows}
    if "margin" in rows and (rows["episodes"] == 1).all():
        right = rows["recall"] >= oracle["recall"] - 1e-9
        known = within & np.isfinite(rows["margin"])
        if (area := auroc(rows["margin"][known], right[known])) is not None:
            cell["auroc"] = area
    return cell


def _macro(parts: list[Cell]) -> Cell:
    """Means over categories of what each of them has."""
    names = [name for name in parts[0] if name != "n" and all(name in part for part in parts)]
    return {"n": sum(p["n"] for p in parts)} | {name: float(np.mean([p[name] for p in parts])) for name in names}


def auroc(margins: F64, right: NDArray[np.bool_]) -> float | None:
    """The chance that a right one's margin is larger than a wrong one's, ties half; None where all are of one sort."""
    good, bad = np.sort(margins[right]), margins[~right]
    if not len(good) or not len(bad):
        return None
    above = len(good) - np.searchsorted(good, bad, side="right")
    equal = np.searchsorted(good, bad, side="right") - np.searchsorted(good, bad, side="left")
    return float((above + equal / 2).mean() / len(good))


# --- Intervals --------------------------------------------------------------------------------------------------------


def _draws(dialogues: int) -> F64:
    """How often each dialogue is drawn, [RESAMPLES, dialogues]; the first row: each once. One table for all lines, so
    that differences are of the same draws."""
    drawn = np.random.default_rng(0).multinomial(dialogues, np.full(dialogues, 1 / dialogues), RESAMPLES)
    return np.vstack([np.ones(dialogues), drawn])


def _recalls(rows: Rows, shared: Rows, draws: F64) -> dict[str, F64]:
    """Mean recall per group and draw [1 + RESAMPLES]; NaN where a draw has no question of the group."""
    found = {}
    count = draws.shape[1]
    for group in (ALL, *dict.fromkeys(shared["category"].tolist())):
        within = _within(shared, group)
        of = shared["dialogue"][within]
        total = draws @ np.bincount(of, rows["recall"][within], count)
        asked = draws @ np.bincount(of, minlength=count)
        found[group] = np.divide(total, asked, out=np.full(len(total), np.nan), where=asked > 0)
    parts = np.stack([means for group, means in found.items() if group != ALL])
    known = np.isfinite(parts)
    found[MACRO] = np.where(known, parts, 0).sum(axis=0) / np.maximum(1, known.sum(axis=0))
    return found


def _spread(means: Mapping[tuple[str, ...], Mapping[str, F64]], line: tuple[str, str], group: str) -> Cell:
    mine, random, oracle = (means[name][group] for name in (line, RANDOM, ORACLE))
    gain = mine - means[SHIPPED][group]
    low, high = np.nanquantile(mine[1:], (0.025, 0.975))
    worse, better = np.nanquantile(gain[1:], (0.025, 0.975))
    cell = {"low": float(low), "high": float(high)}
    cell |= {"gain": float(gain[0]), "gain_low": float(worse), "gain_high": float(better)}
    if oracle[0] > random[0]:
        cell["lift"] = float((mine[0] - random[0]) / (oracle[0] - random[0]))
    return cell


def prompts(found: list[Cell]) -> list[Cell]:
    """The cells of all questions that compare prompts: the oracle's episode under each way to pick windows."""
    return [c for c in found if c["category"] == ALL and c["rule"].startswith("oracle, ")]
