"""Show on this machine what a policy saves: one long text, a dense cache and kvstrata's, side by side.

Reads some thousand bytes of Python's own standard library, asks for a continuation with transformers' DynamicCache, with
policy full and with policy streaming under a budget, and prints answers, memory and time. Takes less than a minute on
two cores and needs no network. Uses the model in bench/quality/model if there is one, else a small one with random
weights: its text means nothing, but its cache is stored and read like any other.
"""

from __future__ import annotations

import argparse
import importlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstrata.cli.output import Output, bytes_text

if TYPE_CHECKING:
    from kvstrata.cli.measure import Run

PROMPT_TOKENS = 4096
NEW_TOKENS = 32
CHUNK = 512
BUDGET = "512tok"
SEED = 0
TRAINED = Path("bench/quality/model")
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


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="also draw memory and time as bars (needs matplotlib)"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    import torch

    if args.plot is not None:
        importlib.import_module("matplotlib")  # fail before the work, not after it
    with out.busy("loading the model"):
        model, tokenizer, what = _model()
    ids, decode = _prompt(model, tokenizer)
    out.line(f"{what}", style="bold")
    out.line(
        f"Prompt: {len(ids)} tokens of Python's standard library; {NEW_TOKENS} new tokens, greedy; {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {model.dtype}."
    )
    runs, reports = _runs(model, ids, out)
    _print(runs, decode, out)
    full_agrees = runs[1].tokens == runs[0].tokens
    if args.plot is not None:
        _plot(runs, args.plot)
        out.line(f"Plot: {args.plot}")
    result = {"schema": 1, "model": what, "prompt_tokens": len(ids), "new_tokens": NEW_TOKENS, "chunk": CHUNK}
    result |= {"full_agrees": full_agrees, "runs": [r.to_dict() for r in runs], "reports": reports}
    out.result(result)
    if not full_agrees:
        at = runs[1].agreement(runs[0])
        return out.fail(f"policy full parted from the dense cache at token {at}: please report it with kvstrata doctor")
    return 0


def _model() -> tuple[Any, Any, str]:
    """(model, tokenizer or None, what it is)."""
    from kvstrata.hf import load as loading

    if TRAINED.is_dir():
        model, tokenizer = loading.load(str(TRAINED))
        return model, tokenizer, f"Model: {TRAINED}."
    size = f"{RANDOM['num_hidden_layers']} layers, {RANDOM['num_key_value_heads']} KV heads of {RANDOM['head_dim']}"
    return (
        loading.random_llama(SEED, **RANDOM),
        None,
        f"Model: a Llama of {size}, with RANDOM weights (seed {SEED}) until a trained one ships: its text means nothing.",
    )


def _prompt(model: Any, tokenizer: Any) -> tuple[list[int], Any]:
    from kvstrata.cli.generate import tokens_of
    from kvstrata.cli.text import long_text

    ids, decode = tokens_of(long_text(PROMPT_TOKENS), model, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", PROMPT_TOKENS + NEW_TOKENS)
    return ids[: min(PROMPT_TOKENS, limit - NEW_TOKENS)], decode


def _runs(model: Any, ids: list[int], out: Output) -> tuple[list[Run], dict[str, Any]]:
    """Dense first, on the model as it came; then patched, one run per policy."""
    from kvstrata.cli import measure
    from kvstrata.hf import load as loading
    from kvstrata.hf.cache import KVCache
    from kvstrata.hf.patch import patch

    measure.generate("warm-up", model, loading.dense_cache(model), ids[:64], 4)
    with out.busy("DynamicCache"):
        runs = [measure.generate("DynamicCache", model, loading.dense_cache(model), ids, NEW_TOKENS, CHUNK)]
    patch(model)
    reports = {}
    for policy, budget in (("full", None), ("streaming", BUDGET)):
        name = policy if budget is None else f"{policy}, {budget}"
        cache = KVCache.for_model(model, policy=policy, budget=budget)
        with out.busy(f"kvstrata: {name}"):
            runs.append(measure.generate(name, model, cache, ids, NEW_TOKENS, CHUNK))
        reports[name] = cache.report().to_dict()
    return runs, reports


def _print(runs: list[Run], decode: Any, out: Output) -> None:
    from kvstrata.cli.measure import ms_text
    from kvstrata.cli.text import readable

    rows = [
        (
            r.name,
            f"{r.agreement(runs[0])} of {len(runs[0].tokens)}",
            bytes_text(r.kv_bytes),
            f"{r.kv_bytes / runs[0].kv_bytes:.0%}",
            bytes_text(r.kv_peak_bytes),
            f"{r.prefill_ms:.0f}",
            ms_text(r.ms_p50),
            ms_text(r.ms_p99),
        )
        for r in runs
    ]
    out.table(
        "Side by side",
        ["cache", ">tokens as dense", ">KV bytes", ">of dense", ">KV peak", ">prefill ms", ">ms/token p50", ">p99"],
        rows,
    )
    if not TRAINED.is_dir():
        out.line(
            "Under a budget a model with random weights says something else at once: look at memory and time here."
        )
    out.table("Answers", ["cache", "continuation"], [(r.name, readable(decode(r.tokens))) for r in runs])


def _plot(runs: list[Run], file: Path) -> None:
    plt: Any = importlib.import_module("matplotlib.figure")
    figure = plt.Figure(figsize=(9, 3), layout="constrained")
    names = [r.name for r in runs]
    series = (
        ("KV bytes, MiB", [r.kv_bytes / 2**20 for r in runs]),
        ("KV peak, MiB", [r.kv_peak_bytes / 2**20 for r in runs]),
        ("ms per token", [r.ms_p50 or 0.0 for r in runs]),
    )
    for axes, (title, values) in zip(figure.subplots(1, len(series)), series, strict=True):
        axes.bar(names, values, color=["#888888", "#4477aa", "#228833"])
        axes.set_title(title)
        axes.tick_params(axis="x", labelrotation=15)
    figure.savefig(file, dpi=120)
