"""Show on this machine what a policy saves and what it costs: one long document, several questions, caches side by side.

The document is source text of Python's own standard library with facts spread over it. The model reads it once through
each cache, then answers the questions: transformers' DynamicCache, policy full, and policies under a budget. Answers,
memory and time are printed side by side. Needs no network; takes about a minute on two cores. Uses the
trained model of a checkout, bench/quality/model, where it is run from the root of one; else a small model with random
weights: its answers mean nothing, but its cache is stored and read like any other.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
from pathlib import Path
from typing import Any

from kvstrata.cli.output import Output, bytes_text

MODEL = Path("bench/quality/model")
LENGTH = 2048
SEED = 3
CACHES = (("DynamicCache", None), ("full", None), ("streaming", "25%"), ("arkv", "25%"))
# Grouped-query attention in the proportions of larger models; weights drawn wide, so that attention is not uniform.
RANDOM = {
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
COLOURS = ("#888888", "#4477aa", "#228833", "#ee6677", "#aa3377", "#ccbb44")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", default=str(MODEL), help="default: %(default)s")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="also draw answers, memory and time as bars (needs matplotlib)"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    if args.plot is not None:
        importlib.import_module("matplotlib")  # fail before the work, not after it
    name, asked, world = _model(args.model, out)
    example = _document(world)
    found = _measured(asked, example, out)
    first = found["DynamicCache"]
    _print(name, asked, example, found, out)
    agrees = found["full"]["answers"] == first["answers"]
    if args.plot is not None:
        _plot(found, args.plot)
        out.line(f"Plot: {args.plot}")
    runs = [
        {"name": name} | {k: v for k, v in r.items() if k != "ms"} | {"ms_p50": _median(r)} for name, r in found.items()
    ]
    pairs = [{"question": q, "answer": a} for q, a in zip(example.questions, example.answers, strict=True)]
    out.result({"schema": 2, "model": name, "questions": pairs, "full_agrees": agrees, "runs": runs})
    if not agrees:
        return out.fail("policy full answers otherwise than the dense cache: please report it with kvstrata doctor")
    return 0


def _model(wanted: str, out: Output) -> tuple[str, Any, Any]:
    """(what it is, the model with its tokenizer, the world of its tasks)."""
    from kvstrata.quality.run import prepared, subject

    if wanted != str(MODEL) or (MODEL / "model.safetensors").is_file():
        with out.busy(f"loading {wanted}"):
            return wanted, *subject(wanted, "auto")
    from kvstrata.cli.text import ByteTokenizer
    from kvstrata.hf.load import random_llama

    return "a Llama with RANDOM weights", *prepared(random_llama(SEED, **RANDOM), ByteTokenizer())


def _document(world: Any) -> Any:
    """Facts in real text that the model was not trained on, and questions about some of them."""
    from kvstrata.quality.tasks import EVAL_SEEDS, TASKS

    return TASKS["multi_query"](LENGTH, EVAL_SEEDS + 25 * SEED, world)


def _measured(asked: Any, example: Any, out: Output) -> dict[str, Any]:
    """Label -> record. Each cache answers once unmeasured first, so that no timing holds a first call."""
    from kvstrata.quality.contenders import Contender
    from kvstrata.quality.measure import measure

    found, tokens = {}, asked.tokens(example)
    for name, budget in CACHES:
        contender = Contender(name, budget)
        with out.busy(contender.label):
            measure(asked, tokens, contender, "query-agnostic")
            record = measure(asked, tokens, contender, "query-agnostic")
        if "refused" in record:
            raise ValueError(f"{contender.label}: {record['refused']}")
        found[contender.label] = record
    return found


def _median(record: Any) -> float | None:
    return statistics.median(record["ms"]) if record["ms"] else None


def _print(model: str, asked: Any, example: Any, found: dict[str, Any], out: Output) -> None:
    import torch

    from kvstrata.cli.measure import ms_text
    from kvstrata.cli.text import readable

    first = found["DynamicCache"]
    out.line(f"Model: {model}, {asked.model.dtype}; {platform.machine()}, {torch.get_num_threads()} threads.", "bold")
    out.line(
        f"Document: {first['context']} tokens of Python's standard library with facts in it. Begins: "
        f"{readable(example.context[:80])} ..."
    )
    rows = [
        (
            name,
            f"{sum(r['scores'])} of {len(r['scores'])}",
            str(sum(a == b for a, b in zip(r["answers"], first["answers"], strict=True))),
            bytes_text(r["bytes"]),
            f"{r['bytes'] / r['dense_bytes']:.0%}",
            bytes_text(r["peak_bytes"]),
            f"{r['prefill_ms']:.0f}",
            ms_text(_median(r)),
        )
        for name, r in found.items()
    ]
    columns = ["cache", ">right", ">as dense", ">KV bytes", ">of dense", ">KV peak", ">read, ms", ">ms/token p50"]
    out.table("Side by side", columns, rows)
    if "RANDOM" in model:
        out.line(
            "With random weights no answer is right: look at memory, time, and who answers as the dense cache does."
        )
        return
    answers = [
        (
            question.removeprefix("Q: ").removesuffix(":"),
            expected,
            *(readable(r["answers"][i]) for r in found.values()),
        )
        for i, (question, expected) in enumerate(zip(example.questions, example.answers, strict=True))
    ]
    out.table("Answers", ["question", "expected", *found], answers)


def _plot(found: dict[str, Any], file: Path) -> None:
    plt: Any = importlib.import_module("matplotlib.figure")
    figure = plt.Figure(figsize=(10, 3.2), layout="constrained")
    names = list(found)
    series = (
        ("right answers, %", [100 * statistics.fmean(r["scores"]) for r in found.values()]),
        ("KV bytes, % of dense", [100 * r["bytes"] / r["dense_bytes"] for r in found.values()]),
        ("ms per token, median", [_median(r) or 0.0 for r in found.values()]),
    )
    for axes, (title, values) in zip(figure.subplots(1, len(series)), series, strict=True):
        bars = axes.bar(names, values, color=COLOURS[: len(names)])
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
        axes.set_title(title)
        axes.margins(y=0.12)
        axes.tick_params(axis="x", labelrotation=20)
    figure.savefig(file, dpi=120)
