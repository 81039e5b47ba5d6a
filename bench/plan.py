"""What planning costs beside decoding: see, score, allocate, plan and apply, spread over the steps of an interval.

    python bench/plan.py --out bench/results/cpu/plan

A decode loop without a model: random keys, values and queries, batch 1, a prompt of N tokens in chunks (its attention is
left out, its plans are not), then one token at a time. Each policy has the smallest of ``--shares`` of the dense cache's
bytes under which it keeps its interval; if none does, the largest, and the interval it gets. ``h2o`` also runs with a tail
of a 16th of its budget, for with its own of one half no budget leaves it its interval. Random queries vote for
other tokens at each plan, so evictions are scattered over all pages, which is dear.

Planning: ms of one plan of all layers, median of several, by stage: see (tables to tensors), score, measure (ARKV's
statistics), allocate, plan (states of tokens, their check), apply (moves of pages), rest. Decoding: ``Step.attend`` of all
layers, median over steps; and with the matrix products of a layer around it (bfloat16, batch 1), one timed by itself and
multiplied. Both shares are planning per step over decoding per step without it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent / "quality"))
from published import Section, publish

from kvstrata import Cache, LayerSpec, Sequence, Shape
from kvstrata.budget import Budget
from kvstrata.budget.room import fit
from kvstrata.cli.output import Output
from kvstrata.policy import NAMED, Policy, h2o
from kvstrata.step import Step

STAGES = {
    "_see": "see",
    "_scored": "score",
    "shares._measured": "measure",
    "shares.allocated": "allocate",
    "_apply": "plan",
    "apply": "apply",
    "run": "rest",
}
"""Methods of a cache's ``Plans`` and of its ``Shares``, by the stage that their own time is counted for."""

SHORT_TAIL = "h2o, tail 1/16"
POLICIES: dict[str, Callable[[], Policy]] = {**NAMED, SHORT_TAIL: lambda: h2o(window_share=1 / 16)}
CHUNK = 2048
WIDE = (4096, 14336)
"""Hidden and MLP width of the decoder whose matrix products stand beside attention."""


class Clock:
    """Milliseconds that wrapped methods take by stage, each without what it calls of the others."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def wrap(self, owner: Any, method: str, stage: str) -> None:
        call = getattr(owner, method)

        def timed(*args: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                took = 1e3 * (time.perf_counter() - start)
                self.ms[stage] += took - self._inner.pop()
                self._inner[-1] += took

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """What was counted since the last call."""
        found, self.ms = self.ms, defaultdict(float)
        return dict(found)


class Tokens:
    """Random q [1, T, Hq, D], k, v [1, T, H, D] of a chunk; calls rotate through them."""

    def __init__(self, shape: Shape) -> None:
        spec = shape.layers[0]
        heads = (spec.q_heads, spec.kv_heads, spec.kv_heads)
        self._all = [torch.randn(1, 2 * CHUNK, h, spec.head_dim).to(shape.dtype) for h in heads]
        self._at = 0

    def take(self, n: int) -> list[torch.Tensor]:
        self._at = (self._at + 977) % CHUNK
        return [x[:, self._at : self._at + n] for x in self._all]


def silent(step: Step) -> None:
    """The step's prompt chunk is stored and planned, but attends to nothing."""

    def nothing(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(q.shape), torch.full(q.shape[:-1], -torch.inf)

    own: Any = lambda spec, q, *rest: nothing(q)  # noqa: E731
    past: Any = lambda layer, q, *rest: nothing(q)  # noqa: E731
    step._attend_own, step._attend_past = own, past  # type: ignore[method-assign]


def filled(cache: Cache, tokens: Tokens, n: int) -> list[Sequence]:
    """One sequence of n tokens, in chunks, planned."""
    seqs = cache.new(1)
    for first in range(0, n, CHUNK):
        count = min(CHUNK, n - first)
        with cache.step(seqs, columns=count) as step:
            silent(step)
            for layer in range(len(cache.shape.layers)):
                step.attend(layer, *tokens.take(count))
    cache.end_prefill(seqs)
    return seqs


def decode(cache: Cache, seqs: list[Sequence], tokens: Tokens, plans: int) -> dict[str, Any]:
    """Median ms of a step's attention over all layers, and of a plan by stage; without a planner, of 64 steps."""
    clock, attends, found = Clock(), [], []
    for method, stage in STAGES.items():
        *owner, name = method.split(".")
        clock.wrap(getattr(cache._plans, owner[0]) if owner else cache._plans, name, stage)
    steps = 64 if cache.policy.planner is None else cache.policy.interval * (plans + 1)
    for _ in range(steps):
        inputs = [tokens.take(1) for _ in cache.shape.layers]
        with cache.step(seqs, columns=1) as step:
            start = time.perf_counter()
            for layer, (q, k, v) in enumerate(inputs):
                step.attend(layer, q, k, v)
            attends.append(1e3 * (time.perf_counter() - start))
        if stages := clock.take():
            found.append(stages)
    found = found[1:]  # the first warms up
    names = dict.fromkeys(STAGES.values())
    by_stage = {name: statistics.median(p.get(name, 0.0) for p in found) if found else 0.0 for name in names}
    whole = statistics.median(sum(p.values()) for p in found) if found else 0.0
    spread = [min(map(_total, found)), max(map(_total, found))] if found else [0.0, 0.0]
    return {"attend_ms": statistics.median(attends[8:]), "plan_ms": whole, "plan_ms_range": spread, "stages": by_stage}


def _total(stages: dict[str, float]) -> float:
    return sum(stages.values())


def budget_for(policy: Policy, shape: Shape, n: int, shares: list[float]) -> tuple[float, Budget]:
    """The smallest share of n dense tokens under which the policy's interval stays, else the largest."""
    for share in shares:
        budget = Budget.bytes(int(share * n * shape.token_bytes()))
        if fit(policy, shape, budget, [n]).interval == policy.interval:
            break
    return share, budget


def layer_ms(hidden: int, mlp: int, spec: LayerSpec, reps: int) -> float:
    """Median ms of one token through a layer's matrix products: q k v, output, gate and up, down."""
    wide, narrow = spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    sizes = [(hidden, wide + 2 * narrow), (wide, hidden), (hidden, 2 * mlp), (mlp, hidden)]
    weights = [torch.randn(n, m, dtype=torch.bfloat16) for m, n in sizes]
    inputs = [torch.randn(1, m, dtype=torch.bfloat16) for m, _ in sizes]
    taken = []
    with torch.inference_mode():
        for rep in range(reps + 2):
            start = time.perf_counter()
            for x, w in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(x, w)
            if rep >= 2:
                taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def measure(args: argparse.Namespace, out: Output) -> list[dict[str, Any]]:
    """One row per length and policy."""
    spec = LayerSpec(args.kv_heads, args.kv_heads * args.group, args.dim)
    shape, rows = Shape([spec] * args.layers, torch.bfloat16), []
    matmul = args.layers * layer_ms(args.hidden, args.mlp, spec, args.reps)
    tokens = Tokens(shape)
    cases = [(n, name) for n in args.tokens for name in args.policies]
    with out.progress("cases", len(cases)) as advance:
        for n, name in cases:
            policy = POLICIES[name]()
            share, budget = (1.0, None) if policy.planner is None else budget_for(policy, shape, n, args.shares)
            cache = Cache(shape, budget=budget, policy=policy)
            seqs = filled(cache, tokens, n)
            found = decode(cache, seqs, tokens, args.plans)
            each = found["plan_ms"] / cache.policy.interval
            rows.append(
                {
                    "tokens": n,
                    "policy": name,
                    "budget_share": share,
                    "interval": cache.policy.interval,
                    "window": cache.policy.window,
                    "stored_per_row": cache.report().stored_tokens / shape.rows,
                    **found,
                    "plan_ms_per_step": each,
                    "share_of_attention": each / found["attend_ms"],
                    "matmul_ms": matmul,
                    "share_of_decoding": each / (found["attend_ms"] + matmul),
                }
            )
            advance(f"{name} at {n}")
    return rows


def sections(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[Section]:
    """Shares, and where a plan's time goes."""
    where = (
        f"{args.layers} layers of {args.kv_heads} KV heads x {args.group} query heads x {args.dim}, bfloat16, batch 1"
    )
    said = (
        f"{where}; {args.plans} plans. Matrix products: hidden {args.hidden}, mlp {args.mlp}, "
        f"{rows[0]['matmul_ms']:.1f} ms per step for all layers. Budget: of a dense cache's bytes; attention is over what the "
        "policy holds. Shares: planning per step, of attention alone and of attention with matrix products."
    )
    head = [
        "tokens",
        "policy",
        "budget %",
        "interval",
        "held per row",
        "attention ms",
        "plan ms",
        "range",
        "plan ms/step",
    ]
    body, detail = [], []
    for r in rows:
        at = [str(r["tokens"]), r["policy"]]
        low, high = r["plan_ms_range"]
        line = [*at, f"{100 * r['budget_share']:g}", str(r["interval"]), f"{r['stored_per_row']:.0f}"]
        line += [
            f"{r['attend_ms']:.2f}",
            f"{r['plan_ms']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{r['plan_ms_per_step']:.3f}",
        ]
        body.append([*line, f"{100 * r['share_of_attention']:.1f}", f"{100 * r['share_of_decoding']:.2f}"])
        detail.append([*at, *(f"{ms:.2f}" for ms in r["stages"].values())])
    shares = Section("Planning beside decoding", said, [*head, "of attention %", "of decoding %"], body)
    names = ["tokens", "policy", *dict.fromkeys(STAGES.values())]
    return [shares, Section("Where a plan's time goes, ms", "Medians of each stage, all layers.", names, detail)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "full,h2o," + SHORT_TAIL.replace(", ", "+") + ",snapkv,pyramidkv,adakv,kivi,keynorm,keydiff,arkv"
    parser.add_argument("--tokens", type=lambda s: [int(n) for n in s.split(",")], default="8192,32768")
    parser.add_argument(
        "--policies", type=lambda s: [n.replace("+", ", ") for n in s.split(",")], default=names, help="%(default)s"
    )
    parser.add_argument("--shares", type=lambda s: [float(x) for x in s.split(",")], default="0.25,0.375,0.5")
    hidden, mlp = WIDE
    for name, value in (("layers", 4), ("kv-heads", 8), ("group", 4), ("dim", 128), ("hidden", hidden), ("mlp", mlp)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--plans", type=int, default=7, help="measured, after one of warming up")
    parser.add_argument("--reps", type=int, default=15, help="of the matrix products")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="STEM", type=Path, help="writes STEM.json and STEM.md")
    args, out = parser.parse_args(), Output(json=False)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rows = measure(args, out)
    publish(out, "Planning beside decoding", args, rows, sections(rows, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
