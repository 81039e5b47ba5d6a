"""What each part of a policy is worth in answers, at equal bytes: variants beside one another on the same contexts.

    python bench/quality/ablations.py --variants arkv,evict,int4,int2 --budgets 12.5% --n 100 --jobs 2 --out results/twins

A run like those of ``kvstrata eval`` for each seed: a folder, resumable, with a report; its policies are the variants named
below. Writes a table over all seeds as STEM.md and STEM.json where --publish names a stem.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf, nan
from pathlib import Path
from statistics import fmean, variance
from typing import Any, Literal

from published import Section, publish

from kvstrata.budget import Budget, EntropyShare, Knapsack, Uniform
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output
from kvstrata.hf.cache import KVCache
from kvstrata.policy import (
    KeepTop,
    KeyDiversity,
    MeanSpread,
    Policy,
    ThreeStates,
    arkv,
    full,
    h2o,
    icecache,
    keydiff,
    kivi,
    quest,
    strata,
    streaming,
)
from kvstrata.policy.arkv import FULL_SHARE, KERNEL
from kvstrata.policy.base import Selector
from kvstrata.quality import metrics, report
from kvstrata.quality.contenders import POLICIES, in_bytes
from kvstrata.quality.run import MODES, Config, Key, Record, Run
from kvstrata.quality.tasks import RETRIEVAL, TASKS
from kvstrata.recall import Archive, Bounds, Greedy, MassThreshold, PageMeans, Position, SplitMeans, TopPages, TopTokens
from kvstrata.recall.archive import Packer

OQ = {"E": 0, "V": 1, "K": 2}


def without(statistic: str) -> Policy:
    """arkv whose OQ leaves one statistic out: its exponent is 0."""
    tau = list(EntropyShare().tau)
    tau[OQ[statistic]] = inf
    return arkv(allocator=EntropyShare(full_share=FULL_SHARE, tau=(tau[0], tau[1], tau[2])))


def mass(formats: tuple[str, ...], metric: Literal["mass", "energy"] = "mass") -> Policy:
    """The knapsack over the given formats; what the last queries attend to, at most over plans, is worth most."""
    policy = arkv(scorer=MeanSpread(), allocator=EntropyShare(), combine="max")
    planner = ThreeStates("int4") if len(formats) > 1 else KeepTop()
    return replace(
        policy, name="knapsack", planner=planner, allocator=Knapsack(formats, metric=metric), formats=formats[1:]
    )


def packed(packer: Packer, spread_weight: float = 1.0) -> Policy:
    """icecache with other pages."""
    policy = icecache(spread_weight=spread_weight)
    return replace(policy, planner=Archive(packer))


def selected(selector: Selector) -> Policy:
    """icecache that reads other pages."""
    return replace(icecache(), selector=selector)


VARIANTS: dict[str, tuple[str, Policy]] = {
    "arkv": ("as it is", arkv()),
    "evict": ("Full or Evicted only, the same ranks", replace(keydiff(), scorer=KeyDiversity(KERNEL))),
    "int8": ("every token int8, the newest that fit", kivi("int8", window=64, sinks=16)),
    "int4": ("every token int4, the newest that fit", kivi("int4", window=64, sinks=16)),
    "int2": ("every token int2, the newest that fit", kivi("int2", window=64, sinks=16)),
    "no Full": (
        "int4 or Evicted where not all fit",
        replace(arkv(), planner=ThreeStates("int4", True, 0.0), allocator=Uniform()),
    ),
    "int8 middle": ("int8 in the middle", arkv("int8")),
    "int4 middle": ("int4 in the middle, however few it holds", arkv("int4")),
    "int2 middle": ("int2 in the middle", arkv("int2")),
    "more Full": ("a twentieth of the pages Full", arkv(allocator=EntropyShare(full_share=0.05))),
    "r constant": ("as many Full pages in each layer", arkv(allocator=EntropyShare(full_share=FULL_SHARE, queries=0))),
    "paper's r": ("r = OQ / max OQ", arkv(allocator=EntropyShare())),
    "without E": ("OQ without entropy", without("E")),
    "without V": ("OQ without variance", without("V")),
    "without K": ("OQ without kurtosis", without("K")),
    "no cover": ("Full pages are bought before all is covered", arkv(cover=False)),
    "no centre": ("quantized keys are not relative to a row's mean", arkv(centre=False)),
    "no pooling": ("key diversity of each token alone", arkv(scorer=KeyDiversity())),
    "window vote": ("ranks by what the last queries attend to", arkv(scorer=MeanSpread())),
    "window vote max": ("so, at most over plans: max(.95 old, new)", arkv(scorer=MeanSpread(), combine="max")),
    "window vote max uniform": (
        "so, and as many Full pages in each layer",
        arkv(scorer=MeanSpread(), combine="max", allocator=EntropyShare(full_share=FULL_SHARE, queries=0)),
    ),
    "window vote max int4": (
        "so, and int4 or Evicted only",
        replace(arkv(scorer=MeanSpread(), combine="max"), planner=ThreeStates("int4", True, 0.0), allocator=Uniform()),
    ),
    "knapsack": ("bf16, int4, int2 by window mass per byte", mass(("bf16", "int4", "int2"))),
    "knapsack energy": ("so, by (window mass * length of the value)^2", mass(("bf16", "int4", "int2"), "energy")),
    "knapsack bf16": ("bf16 or Evicted by window mass per byte", mass(("bf16",))),
    "knapsack bf16 energy": ("so, by (window mass * length of the value)^2", mass(("bf16",), "energy")),
    "h2o": ("Full or Evicted by accumulated mass", h2o()),
    "icecache": ("all archived, pages by meaning, so many tokens read in a step", icecache()),
    "icecache position": ("so, pages in the order of position", packed(Position())),
    "icecache w 0": ("so, pages ranked by the means of their parts alone", icecache(spread_weight=0.0)),
    "icecache position w 0": ("both", packed(Position(), spread_weight=0.0)),
    "icecache near K": ("so, with as few Near pages as are read", icecache(near_pages=12)),
    "icecache greedy": ("so, pages about the keys farthest from the mean", packed(Greedy())),
    "icecache quarters": ("so, pages ranked by the means of four parts each", selected(SplitMeans(parts=4))),
    "icecache means": ("so, pages ranked by one mean each", selected(PageMeans())),
    "icecache bounds": ("so, pages ranked by the bounds of their keys", selected(Bounds())),
    "icecache estimate": ("so, what is not read stands in by the means of its pages", selected(PageMeans(estimate=1.0))),
    "top pages": ("so, the pages of highest true mass (an oracle)", selected(TopPages())),
    "top tokens": ("so, the tokens of highest true mass (an oracle)", selected(TopTokens())),
    "icecache reuse 3": (
        "pages ranked by one mean each, of three layers the first selects for all",
        selected(PageMeans(reuse=3)),
    ),
    "icecache two levels": (
        "so, groups of 32 pages ranked first, a quarter of them looked into",
        selected(PageMeans(flat_pages=0)),
    ),
    "icecache shared": ("so, heads of a layer share what they read, by votes", selected(MassThreshold())),
    "quest": ("pages in the order of position, ranked by bounds, all layers", quest(256, dense_layers=())),
    "icecache max": ("so, the largest vote of a group's heads", icecache(aggregate="max")),
    "icecache int8": ("so, archived as int8", icecache(state="int8")),
    "icecache int4": ("so, archived as int4", icecache(state="int4")),
    "strata": ("nothing lost: Full, or quantized and archived; so many tokens read in a step", strata()),
    "strata 384": ("so, 384 tokens read", strata(384)),
    "strata int4": ("so, archived as int4", strata(state="int4")),
    "full": ("everything read", full()),
    "streaming": ("sinks and window", streaming()),
}  # fmt: skip
"""Name -> what it is, and the policy."""


def make(name: str, model: Any, budget: Budget | None, tokens: int) -> Any:
    """An empty cache of a variant."""
    policy = VARIANTS[name][1]
    far = None if isinstance(policy.selector, TopPages | TopTokens) else "auto"  # oracles read all to choose
    return KVCache.for_model(model, policy=policy, budget=in_bytes(budget, model, tokens), far=far)


POLICIES |= {name: partial(make, name) for name in VARIANTS}  # at import: workers of a run import this file, too


def options(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bench/quality/model")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="V,..")
    parser.add_argument("--budgets", default="25%,12.5%", metavar="B,..")
    parser.add_argument("--length", type=positive, default=2048)
    parser.add_argument("--n", type=positive, default=100, help="contexts per task")
    parser.add_argument("--seeds", type=positive, default=1, help="contexts of so many seeds, from 0 on")
    parser.add_argument(
        "--mode", choices=MODES, default="query-agnostic", help="where the question is seen (kvstrata eval)"
    )
    parser.add_argument("--tasks", default=",".join(RETRIEVAL), metavar="T,..", help="default: those of retrieval")
    parser.add_argument("--base", default="arkv", metavar="V", help="the variant that differences are taken to")
    parser.add_argument("--jobs", type=positive, default=1)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the run")
    parser.add_argument("--publish", type=Path, metavar="STEM", help="writes STEM.md and STEM.json")
    return parser


def joined(runs: list[Run]) -> dict[Key, Record]:
    """The records of the runs of several seeds as those of one run."""
    found: dict[Key, Record] = {}
    for run in runs:
        for (task, length, index, name, budget), record in run.records.items():
            found[task, length, index + run.config.n * run.config.seed, name, budget] = record
    return found


def paired(
    records: dict[Key, Record], tasks: tuple[str, ...], name: str, budget: str, base_name: str
) -> tuple[float, float]:
    """Mean difference to another variant over tasks, on the same contexts, and half of its 95 % interval."""
    means, variances = [], []
    for task in tasks:
        found = []
        for (t, length, index, contender, b), record in records.items():
            base = records.get((t, length, index, base_name, b))
            if (t, contender, b) == (task, name, budget) and base and "scores" in base and "scores" in record:
                found.append(fmean(record["scores"]) - fmean(base["scores"]))
        if len(found) < 2:
            return nan, nan
        means.append(fmean(found))
        variances.append(variance(found) / len(found))
    return fmean(means), 1.96 * sum(variances) ** 0.5 / len(means)


def section(
    records: dict[Key, Record], summary: list[dict[str, Any]], config: Config, seeds: int, base: str
) -> Section:
    """One line per variant and budget, in order of the variants."""
    body = []
    order = {name: i for i, name in enumerate(VARIANTS)}

    def place(s: dict[str, Any]) -> tuple[float, int]:
        budget = Budget.parse(s["budget"] or None)
        return -inf if budget is None else -budget.value, order[s["contender"]]

    for s in sorted(summary, key=place):
        name, budget = s["contender"], s["budget"] or ""
        if "refused" in s:
            body.append([name, VARIANTS[name][0], budget, "refused", "-", "-", "-"])
            continue
        difference, half = paired(records, config.tasks, name, budget, base)
        said = "-" if name == base or difference != difference else f"{100 * difference:+.1f} \u00b1 {100 * half:.1f}"
        held = f"{100 * s['bytes_share']:.1f}"
        body.append([name, VARIANTS[name][0], budget, f"{100 * s['accuracy']:.1f}", report.spread(s), said, held])
    said = (
        f"Exact match in per cent, mean over {', '.join(config.tasks)}, {seeds} x {config.n} contexts of each (seeds x n), "
        f"{config.lengths[0]} tokens, {config.mode}; difference to `{base}` on the same contexts; KV bytes in per cent of "
        "the dense cache's."
    )
    header = ["variant", "what", "budget", "mean", "interval", "difference", "KV bytes"]
    return Section("Variants at equal bytes", said, header, body)


Told = Callable[[list[dict[str, Any]], dict[Key, Record]], tuple[list[Section], str]]
"""Of a summary and its records, sections beside the variants' and a conclusion."""


def compare(args: argparse.Namespace, title: str, told: Told = lambda summary, records: ([], "")) -> int:
    """Measures what is left of the runs of all seeds, and publishes. The exit code."""
    out = Output(json=False)
    names = [name.strip() for name in args.variants.split(",")]
    if unknown := [name for name in names if name not in VARIANTS]:
        return out.fail(f"variants: {unknown[0]!r} is unknown, expected some of {', '.join(VARIANTS)}")
    budgets = tuple(b.strip() for b in args.budgets.split(","))
    tasks = tuple(t.strip() for t in args.tasks.split(","))
    if unknown := [t for t in tasks if t not in TASKS]:
        return out.fail(f"tasks: {unknown[0]!r} is unknown, expected some of {', '.join(TASKS)}")
    runs = []
    for seed in range(args.seeds):
        one = Config(
            args.model, tasks, tuple(names), (), budgets, (args.length,), args.n, seed, args.mode, jobs=args.jobs
        )
        run = Run(args.out / f"seed-{seed}", one)
        with out.progress(f"seed {seed}", len(run.units())) as advance:
            run.work(lambda unit: advance(unit.task))
        report.make(run.folder, run.complaints)
        runs.append(run)
    records = joined(runs)
    summary = metrics.summary(metrics.cells(records), tasks)
    made = section(records, summary, runs[0].config, args.seeds, args.base)
    more, conclusion = told(summary, records)
    args.out = args.publish
    publish(out, title, args, summary, [made, *more], conclusion)
    return 0


def main() -> int:
    return compare(options(__doc__).parse_args(), "What each part of a policy is worth")


if __name__ == "__main__":
    sys.exit(main())
