"""The gate and the model card: answers of the full cache, on contexts and seeds that training never saw.

    python bench/quality/card.py --jobs 2

Writes README.md beside the weights. Exit code 1 where the gate does not hold at the longest length: exact match of at
least 0.99 on a single needle and 0.95 on each other retrieval task. Stopped and started again it goes on; the same
weights give the same card on the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output
from kvstrata.quality import report
from kvstrata.quality.contenders import shape_of
from kvstrata.quality.manifest import write
from kvstrata.quality.markdown import table
from kvstrata.quality.metrics import Cell
from kvstrata.quality.run import Config, Run, subject
from kvstrata.quality.tasks import CONTINUATION, RETRIEVAL

OTHERS = ("frequent", "recent")
"""Tasks that are asked too, and are no part of the gate."""
GATE = {task: 0.99 if task == "needle" else 0.95 for task in RETRIEVAL}
ABOUT = """
A Llama small enough to be trained on two CPU cores and to ship with the code, made for one purpose: it answers
questions about facts anywhere in its context, so that what a cache drops shows in its answers. It writes nothing worth
reading.
"""
DATA = """
Mixed in every batch, made as training goes: the tasks of `python/kvstrata/quality/tasks.py` with filler of real text
(the source of Python's standard library; of its files a tenth, by a hash of the name, is held out), several questions
per context; facts asked back in their own words; random segments of the tasks' words, repeated. The loss is on answers
and repetitions, with a small share on the text. Positions skip (PoSE), so that short contexts teach long distances.
"""
ASKED = """
Exact match of greedy answers with transformers' DynamicCache, in per cent, with a bootstrap 95 % interval over
{n} contexts per cell. Seeds are never trained on, filler is of the held-out files. `frequent` (what is mentioned most?)
and `recent` (a fact in the last line) are not retrieval and not part of the gate.
"""


def measured(model: str, lengths: tuple[int, ...], n: int, jobs: int, folder: Path) -> dict[tuple[str, int], Cell]:
    """The cells of the dense cache by task and length."""
    tasks = (*RETRIEVAL, *OTHERS, "text")
    run = Run(folder, Config(model, tasks, (), ("DynamicCache",), (), lengths, n, jobs=jobs))
    out = Output(json=False)
    with out.progress("examples", len(run.units())) as advance:
        run.work(lambda unit: advance(f"{unit.task} {unit.length}"))
    _, numbers = report.make(folder, run.complaints)
    return {(c["task"], c["length"]): c for c in numbers["cells"]}


def failures(cells: dict[tuple[str, int], Cell], length: int) -> list[str]:
    """The tasks below the gate, in words; none if it holds."""
    found = [(task, cells[task, length]["accuracy"], least) for task, least in GATE.items()]
    return [f"{task} has {100 * got:.1f} %, needs {100 * least:.0f} %" for task, got, least in found if got < least]


def card(model: str, cells: dict[tuple[str, int], Cell], lengths: tuple[int, ...], n: int) -> str:
    """The model card in markdown."""
    failed = failures(cells, lengths[-1])
    bars = f"at {lengths[-1]} tokens: needle 99 %, each other retrieval task 95 %"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    parts = ["# A small model that retrieves", ABOUT, *facts(model), "## Data", DATA, *training(Path(model))]
    parts += ["## Answers with the full cache", ASKED.format(n=n), *answers(cells, lengths)]
    parts += [
        f"**The gate {'does not hold' if failed else 'holds'}** ({bars}).\n",
        *(f"- {reason}" for reason in failed),
        *([""] if failed else []),
        f"Made by `python bench/quality/card.py` with {versions}; the filler is of that Python's library.",
    ]
    return "\n".join(parts) + "\n"


def facts(model: str) -> list[str]:
    """What the folder holds."""
    asked, _ = subject(model, "auto")
    c, weights = asked.model.config, Path(model) / "model.safetensors"
    heads = f"{c.num_attention_heads} query and {c.num_key_value_heads} KV heads of {c.head_dim}"
    rope = f"RoPE base {c.rope_parameters['rope_theta']:.0f}"
    dtype = str(asked.model.dtype).removeprefix("torch.")
    rows = [
        ("architecture", f"{type(asked.model).__name__}: {c.num_hidden_layers} layers, width {c.hidden_size}, {heads}"),
        ("", f"MLP {c.intermediate_size}, {rope}, tied embeddings, at most {c.max_position_embeddings} positions"),
        ("parameters", f"{sum(p.numel() for p in asked.model.parameters()) / 1e6:.2f} million"),
        ("weights", f"{dtype}, {weights.stat().st_size / 1e6:.1f} MB, sha256 `{digest(weights)[:16]}`"),
        ("tokenizer", f"byte-level BPE, {c.vocab_size} tokens, each digit one of its own"),
        ("KV cache", f"{shape_of(asked.model).token_bytes()} bytes per token"),
    ]
    return ["| | |\n|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]


def training(folder: Path) -> list[str]:
    """What training.json says."""
    told: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    said = [f"{told['steps']} steps"]
    said += [] if told["tokens"] is None else [f"{told['tokens'] / 1e6:.1f} million tokens"]
    said += [f"{told['minutes']:.0f} minutes"] if told["minutes"] else []
    said += [f"{told['device']} (torch threads: {told['threads']})", told["arithmetic"], f"torch {told['torch']}"]
    parts = ["## Training\n", f"`python bench/quality/train.py --seed {told['seed']}`: {', '.join(said)}.\n"]
    if told["stages"] is None:
        return parts
    header = ["context", "tokens a step", "steps", "copies %", "own words %", "tasks %", "positions skip %"]
    rows = [
        [str(s["context"]), str(s["tokens"]), str(s["done"])]
        + [f"{100 * x:.0f}" for x in (s["copy"], s["verbatim"], 1 - s["copy"] - s["verbatim"], s["skip"])]
        for s in told["stages"]
        if s["done"]
    ]
    return [*parts, *table(header, rows)]


def answers(cells: dict[tuple[str, int], Cell], lengths: tuple[int, ...]) -> list[str]:
    """Accuracy by task and length, and perplexity."""
    rows = [[task, *(_shown(cells[task, n]) for n in lengths)] for task in (*RETRIEVAL, *OTHERS)]
    text = ", ".join(f"{cells['text', n]['perplexity']:.2f} at {n} tokens" for n in lengths)
    return [
        *table(["task", *(f"{n} tokens" for n in lengths)], rows),
        f"Perplexity per token on held-out text, over the last {CONTINUATION} tokens or half of a context: {text}.\n",
    ]


def _shown(c: Cell) -> str:
    return f"{100 * c['accuracy']:.1f} ({100 * c['low']:.1f} to {100 * c['high']:.1f})"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", default="bench/quality/model")
    parser.add_argument("--lengths", metavar="N,..", default="512,1024,2048", help="default: %(default)s")
    parser.add_argument("--n", metavar="N", type=positive, default=200, help="contexts per cell; default: %(default)s")
    parser.add_argument("--jobs", metavar="N", type=positive, default=1, help="processes; threads are shared out")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("results/card"), help="default: %(default)s")
    args = parser.parse_args()
    lengths = tuple(sorted(positive(n) for n in args.lengths.split(",")))
    for name in ("model.safetensors", "training.json"):
        if not (Path(args.model) / name).is_file():
            parser.error(f"{args.model} holds no {name}: python bench/quality/train.py --out {args.model}")
    weights = digest(Path(args.model) / "model.safetensors")  # other weights, another run
    cells = measured(args.model, lengths, args.n, args.jobs, args.out / f"{weights[:12]}-{args.n}")
    text = card(args.model, cells, lengths, args.n)
    write(Path(args.model) / "README.md", text)
    print(text)
    return 1 if failures(cells, lengths[-1]) else 0


if __name__ == "__main__":
    sys.exit(main())
