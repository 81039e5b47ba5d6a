"""Budgets of layers on a model whose layers differ: allocators fitted to it beside the same for all, at equal bytes.

    python bench/quality/depth.py compare --budgets 50%,15% --n 17 --seeds 3 --out results/depth
    python bench/quality/depth.py tune --out results/depth-model

The first takes the options of ablations.py; what allocators are fitted by (laws.py) is measured on contexts of another seed.
The second trains the bundled model a few steps more, in most of which all layers but one see a window; the same command with
--model takes that one instead. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ablations
import laws
import torch
from network import SINKS, Model
from published import Section
from safetensors.torch import load_file
from tokenizers import Tokenizer
from train import Sampler, Stage, State, loss_of, optimizers_of, rex, save_weights

from kvstrata.budget import Budget, Schedule, Sensitivity
from kvstrata.hf.cache import KVCache
from kvstrata.policy import Policy
from kvstrata.quality.contenders import POLICIES, in_bytes
from kvstrata.quality.run import Key, Record
from kvstrata.quality.tasks import TASKS, Example, World, codes, count, example, keys

WINDOW = 64
LOOKS = 1
"""The layer that sees all while the model is tuned; the others see WINDOW tokens and the sinks."""
WHOLE = 4
"""Every so many steps all layers see all."""
RATE = 0.05
"""Of the peak rates of training."""
STAGES = (Stage(80, 8192, 1024, 0.0, 0.0, 0.4, even=True, long=True), Stage(40, 8192, 2048, 0.0, 0.0, 0.3, even=True))
PROBE = Stage(1, 16384, 2048, 0.0, 0.0, 0.0, even=True, long=True)
PROBED = (16, 64, 256)
ASKED, DECODED = 24, 336
"""Questions of a context of the task "many", and tokens that it decodes for them."""
MEAN = "Limits that fall have the budget as their mean over what is decoded; the bytes in the table are the last."
BARS = {"50%": -0.5, "15%": 2.0}
"""Points that the fitted law must reach beside the same for all."""
LAW, SENSITIVE = "evict law", "evict sensitive"
EVICT = ablations.VARIANTS["evict"][1]
FITTED: dict[str, tuple[str, Callable[[str], Policy]]] = {
    LAW: (
        "so, rows share by the laws of the attention that they lose",
        lambda model: replace(EVICT, allocator=laws.laws(model).allocator),
    ),
    SENSITIVE: (
        "so, layers share by how their keys change",
        lambda model: replace(EVICT, allocator=Sensitivity(laws.profile(model))),
    ),
}
"""Name -> what it is, and the policy for a folder of a model."""


PAIRS = ((LAW, "evict"), (SENSITIVE, "evict"), ("knapsack energy", "knapsack"))
FALLING = {f"evict {name}": name for name in ("linear", "rex", "exp")}
"""Name -> the profile by which the limit falls while tokens are decoded."""


def make(name: str, model: Any, budget: Budget | None, tokens: int) -> KVCache:
    """An empty cache of a fitted variant."""
    policy = FITTED[name][1](laws.name_of(model))
    return KVCache.for_model(model, policy=policy, budget=in_bytes(budget, model, tokens))


def make_falling(name: str, model: Any, budget: Budget | None, tokens: int) -> KVCache:
    """An empty cache whose limit falls to half of the budget, which is its mean over DECODED tokens."""
    limit = in_bytes(budget, model, tokens)
    if limit is None:
        raise ValueError(f"budget: {name!r} needs one, got None")
    mean = int(limit.value)
    schedule = Schedule(FALLING[name], interval=64, horizon=DECODED, end=mean // 2, equal_area=True)
    return KVCache.for_model(model, policy=EVICT, budget=Budget.bytes(mean, schedule=schedule))


def many(length: int, seed: int, world: World) -> Example:
    """As multi_query; ASKED questions, so that as many tokens are decoded for each context."""
    rng = random.Random(f"many {seed}")
    part = codes(rng, keys(rng, max(ASKED, count(length))))
    return example(rng, length, part, rng.sample(range(len(part.asks)), ASKED), world)


# At import: workers of a run import this file, too.
TASKS["many"] = many
POLICIES |= {name: partial(make, name) for name in FITTED}
POLICIES |= {name: partial(make_falling, name) for name in FALLING}
ablations.VARIANTS |= {name: (what, EVICT) for name, (what, _) in FITTED.items()}
ablations.VARIANTS |= {
    name: (f"so, the limit falls to half: {profile}, of equal area", EVICT) for name, profile in FALLING.items()
}


# --- The comparison -----------------------------------------------------------------------------------------------------


def compare(words: list[str]) -> int:
    parser = ablations.options(__doc__)
    parser.set_defaults(variants=f"full,evict,{LAW}", budgets="50%,15%", base="evict")
    args = parser.parse_args(words)
    return ablations.compare(args, "Budgets of layers that differ", partial(told, args))


def told(
    args: argparse.Namespace, summary: list[dict[str, Any]], records: dict[Key, Record]
) -> tuple[list[Section], str]:
    """Differences in pairs, what the layers are worth, the laws; and whether the bars are held, where they were tried."""
    tasks, found, body = tuple(t.strip() for t in args.tasks.split(",")), [], []
    for budget in (b.strip() for b in args.budgets.split(",")):
        for name, base in PAIRS:
            difference, half = (100 * x for x in ablations.paired(records, tasks, name, budget, base))
            if difference != difference:
                continue
            said = f"{difference:+.1f} \u00b1 {half:.1f}"
            body.append([name, base, budget, said])
            if name == LAW and budget in BARS:
                held = "held" if difference >= BARS[budget] else "missed"
                found.append(f"at {budget} {said} points (bar {BARS[budget]:+.1f}: {held})")
    if not body:
        falls = set(FALLING) & {name for _, _, _, name, _ in records}
        return [], MEAN if falls else ""
    pairs = Section(
        "Pairs",
        "Points, on the same contexts, with a 95 % interval.",
        ["variant", "beside", "budget", "difference"],
        body,
    )
    conclusion = f"Rows that share by fitted laws, beside equal ones: {', '.join(found)}." if found else ""
    return [pairs, probed(Path(args.model)), fitted(args.model)], conclusion


def probed(folder: Path) -> Section:
    """Answers where one layer sees a window only, or all of the others do."""
    model, sampler = weights(folder), Sampler(Tokenizer.from_file(str(folder / "tokenizer.json")), seed=99)
    batch, layers = sampler.batch(PROBE), len(model.layers)

    def right(*windows: int | None) -> float:
        with torch.no_grad():
            return 100 * loss_of(model, *batch, windows)[1]["accuracy"]

    whole = [None] * layers
    alone = [[right(*whole[:i], w, *whole[i + 1 :]) for w in PROBED] for i in range(layers)]
    others = [right(*(None if i == LOOKS else w for i in range(layers))) for w in PROBED]
    rows = {"none": [right(*whole)] * len(PROBED), **{f"{i}": row for i, row in enumerate(alone)}}
    rows[f"all but {LOOKS}"] = others
    worst = min(range(layers), key=lambda i: sum(alone[i]))
    least = rows["none"][0] - min(min(row) for i, row in enumerate(alone) if i != worst)
    said = (
        f"Per cent of the tokens of answers that are the most likely ones, {PROBE.tokens // PROBE.context} contexts of "
        f"{PROBE.context} tokens as in training, where some layers see the last {', '.join(map(str, PROBED))} tokens and "
        f"{SINKS} sinks only. What is far is read by layer {worst}: a window there loses up to "
        f"{rows['none'][0] - min(alone[worst]):.1f} points, elsewhere up to {least:.1f}."
    )
    body = [[name, *(f"{x:.1f}" for x in row)] for name, row in rows.items()]
    return Section("What the layers are worth", said, ["layers with a window", *map(str, PROBED)], body)


def fitted(folder: str) -> Section:
    """The laws of the rows, and the change of the layers' keys."""
    found, changes = laws.laws(folder), laws.profile(folder).sensitivity
    body = [
        [
            f"{layer}, {head}",
            f"{100 * float(found.far[layer, head]):.1f}",
            *(f"{100 * float(e):.1f}" for e in found.error[layer, head]),
            f"{float(found.c[layer, head]):.3g}",
            f"{float(found.alpha[layer, head]):.2f}",
            f"{1000 * changes[layer]:.2f}",
        ]
        for layer in range(len(found.c))
        for head in range(found.c.shape[1])
    ]
    said = (
        f"Per cent of the attention of the last {laws.QUERIES} queries of questions and answers that is on unprotected tokens, "
        f"and that is lost with 10, 25 and 50 % of them kept; c and alpha of c * tokens^-alpha; 1000 * (1 - cosine) of a "
        "layer's keys beside those of a whole cache. "
        f"{laws.CONTEXTS} contexts of each task, of a seed that is never asked about."
    )
    return Section("Laws", said, ["layer, head", "far", "10 %", "25 %", "50 %", "c", "alpha", "keys"], body)


# --- The model ----------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> Model:
    """The model of a folder as :func:`train.save_weights` left it, f32."""
    model = Model()
    held = load_file(folder / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in held.items() if k.startswith("model.")})
    return model


def tune(words: list[str]) -> int:
    """A few steps more, in most of which all layers but one see a window: they learn to do without what is far."""
    parser = argparse.ArgumentParser(description=tune.__doc__)
    parser.add_argument("--model", type=Path, default=Path("bench/quality/model"))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.model / name, args.out / name)
    model = weights(args.model)
    sampler = Sampler(Tokenizer.from_file(str(args.model / "tokenizer.json")), args.seed + 1)
    state, total = State(model, optimizers_of(model)), sum(stage.steps for stage in STAGES)
    windows = [None if i == LOOKS else WINDOW for i in range(len(model.layers))]
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    began, logged = time.monotonic(), list[dict[str, float]]()
    for stage in (each for each in STAGES for _ in range(each.steps)):
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss, parts = loss_of(model, *sampler.batch(stage), windows if state.step % WHOLE else None)
        state.update(loss, RATE * min(1.0, (state.step + 1) / 10) * rex(state.step / total))
        logged.append(parts)
        if state.step % 10 == 0:
            means = {k: round(math.fsum(x[k] for x in logged) / len(logged), 4) for k in parts}
            minutes = round((time.monotonic() - began) / 60, 1)
            print(json.dumps({"step": state.step, "context": stage.context, "minutes": minutes, **means}), flush=True)
            logged.clear()
    save_weights(model, args.out)
    return 0


VERBS = {"compare": compare, "tune": tune}


def main() -> int:
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb not in VERBS:
        print(__doc__)
        return 2
    return VERBS[verb](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
