"""How far scores say what later queries attend to: the knapsack's prior, by least squares.

    python bench/quality/priors.py --n 3 --out bench/results/cpu/priors

Each task's context with its first question, then all its questions and answers under a cache that keeps all. Of every row, what
the last 32 queries before the first answer paid to each unprotected token (mean + std, pooled over five: ``MeanSpread``), as a
share, beside the share that all later queries paid. The prior e is that of least squares in later = (1 - e) * score + e / n.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from published import Section, publish
from torch import Tensor

from kvstrata.budget import EntropyShare
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output
from kvstrata.hf.cache import KVCache
from kvstrata.policy import AccumulatedMass, KeepTop, MeanSpread, Policy
from kvstrata.policy.base import Seen
from kvstrata.quality.measure import Subject, Tokens
from kvstrata.quality.reader import Reader
from kvstrata.quality.run import Config, made_example, subject
from kvstrata.quality.tasks import RETRIEVAL

WATCHING = Policy("watching", KeepTop(), AccumulatedMass(), EntropyShare(queries=32), sinks=16, window=64)
"""Keeps all under its limit, remembers 32 queries, and adds up the attention that each token receives."""
BINS = 16
Row = tuple[Tensor, Tensor]
"""Shares of one row's unprotected tokens by score and by later attention, f32 [N] each, of all that it holds."""


def seen(cache: KVCache) -> list[Seen]:
    """Each layer as it stands."""
    plans, live = cache.cache._plans, list(cache.cache._live)
    found = [plans._see(layer, live, [cache.cache._store.length(i) for i in live]) for layer in plans.layers]
    return [s for s in found if s is not None]


def watched(asked: Subject, tokens: Tokens) -> list[Row]:
    """Every row of one example."""
    cache = KVCache.for_model(asked.model, policy=WATCHING, budget="64MiB")
    reader = Reader(asked.model, cache, asked.stops)
    logits = reader.read(tokens.context + tokens.questions[0])
    before = [(s, MeanSpread().score(s), mass_of(s).clone()) for s in seen(cache)]
    for i, most in enumerate(tokens.most):
        logits = reader.read(tokens.questions[i]) if i else logits
        reader.answer(logits, most)
    rows = []
    for (then, score, mass), now in zip(before, seen(cache), strict=True):
        later = mass_of(now)[:, : mass.shape[1]] - mass
        for r, free in enumerate(then.stored & ~then.protected):
            rows.append((score[r][free] / score[r][then.stored[r]].sum(), later[r][free] / later[r].sum()))
    return rows


def mass_of(layer: Seen) -> Tensor:
    assert layer.read is not None
    return layer.read.mass()


def prior(rows: list[Row]) -> float:
    """e of least squares over all tokens of all rows."""
    above = below = 0.0
    for score, later in rows:
        even = 1 / len(score) - score
        above += float(((later - score) * even).sum())
        below += float(even.square().sum())
    return above / below


def bins(rows: list[Row], e: float) -> list[list[float]]:
    """For each part of a row's tokens by falling score: mean shares by score, with the prior, and later."""
    found = torch.zeros(BINS, 3)
    for score, later in rows:
        order = score.argsort(descending=True)
        mixed = (1 - e) * score + e / len(score)
        for b, part in enumerate(order.tensor_split(BINS)):
            found[b] += torch.stack([x[part].sum() for x in (score, mixed, later)])
    return (found / len(rows)).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bench/quality/model")
    parser.add_argument("--length", type=positive, default=2048)
    parser.add_argument("--n", type=positive, default=3, help="contexts per task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="STEM")
    args, out = parser.parse_args(), Output(json=False)
    config = Config(args.model, RETRIEVAL, (), (), (), (args.length,), args.n, args.seed, "query-aware")
    asked, _ = subject(config.model, config.dtype)
    rows: list[Row] = []
    with out.progress("contexts", args.n * len(RETRIEVAL)) as advance:
        for task in RETRIEVAL:
            for i in range(args.n):
                rows += watched(asked, asked.tokens(made_example(config, task, args.length, i)))
                advance(task)
    e = prior(rows)
    body = [[f"{b + 1}", *(f"{100 * x:.2f}" for x in found)] for b, found in enumerate(bins(rows, e))]
    said = (
        f"Per cent of a row's attention, mean over {len(rows)} rows of {args.n} contexts of each of {', '.join(RETRIEVAL)}; "
        "tokens of a row by falling score, a sixteenth each."
    )
    made = Section("Scores and later attention", said, ["part", "by score", "with the prior", "later"], body)
    summary: dict[str, Any] = {"prior": e, "bins": bins(rows, e)}
    publish(out, "What scores say of later attention", args, summary, [made], f"Prior by least squares: {e:.3f}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
