"""Continue a prompt with a model whose cache kvstrata keeps.

MODEL is a folder, else a hub id. Greedy. A model without a tokenizer is fed the prompt's bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvstrata.cli.output import Output, bytes_text


def policy_name(text: str) -> str:
    from kvstrata.policy import resolve

    try:
        resolve(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def budget_text(text: str) -> str:
    from kvstrata.budget import Budget

    try:
        Budget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="T", help="the text to continue")
    source.add_argument("--file", metavar="F", type=Path, help="a file that holds it")
    parser.add_argument("--policy", metavar="P", type=policy_name, default="full", help="default: full")
    parser.add_argument("--budget", metavar="B", type=budget_text, help='"1.5GiB", "25%%", "256tok"; default: no limit')
    parser.add_argument("--max-new-tokens", metavar="N", type=positive, default=64, help="default: 64")
    parser.add_argument("--compare", action="store_true", help="also generate with transformers' dense cache")


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstrata.cli import measure
    from kvstrata.hf import load as loading
    from kvstrata.hf.cache import KVCache
    from kvstrata.hf.patch import patch

    text = args.prompt if args.file is None else args.file.read_text(encoding="utf-8")
    with out.busy(f"loading {args.model}"):
        model, tokenizer = loading.load(args.model)
    ids, decode = tokens_of(text, model, tokenizer)
    eos = model.generation_config.eos_token_id
    dense = None
    if args.compare:
        with out.busy("generating with the dense cache"):
            dense = measure.generate("dense", model, loading.dense_cache(model), ids, args.max_new_tokens, eos=eos)
    patch(model)
    cache = KVCache.for_model(model, policy=args.policy, budget=args.budget)
    with out.busy(f"generating with policy {args.policy}"):
        ours = measure.generate(args.policy, model, cache, ids, args.max_new_tokens, eos=eos)
    report = cache.report()
    out.line(decode(ours.tokens))
    out.line()
    out.show(report)
    runs = [ours] if dense is None else [dense, ours]
    rows = [
        (r.name, r.agreement(runs[0]), bytes_text(r.kv_bytes), bytes_text(r.kv_peak_bytes), measure.ms_text(r.ms_p50))
        for r in runs
    ]
    out.table("Side by side", ["cache", f">tokens as {runs[0].name}", ">KV bytes", ">KV peak", ">ms/token"], rows)
    result: dict[str, Any] = {"schema": 1, "model": args.model, "policy": args.policy, "budget": args.budget}
    result |= {"prompt_tokens": len(ids), "text": decode(ours.tokens), "run": ours.to_dict()}
    result |= {"dense": None if dense is None else dense.to_dict(), "report": report.to_dict()}
    out.result(result)
    return 0


def tokens_of(text: str, model: Any, tokenizer: Any) -> tuple[list[int], Any]:
    """(token ids, the function back to text). ValueError for an empty prompt, or bytes outside the vocabulary."""
    from kvstrata.cli.text import ByteTokenizer

    tokenizer = tokenizer or ByteTokenizer()
    ids = [int(i) for i in tokenizer.encode(text)]
    vocabulary = model.get_input_embeddings().num_embeddings
    if not ids:
        raise ValueError("prompt: empty, expected at least one token")
    if max(ids) >= vocabulary:
        raise ValueError(f"prompt: token {max(ids)}, but the model knows {vocabulary}; it needs its own tokenizer")
    return ids, lambda out: str(tokenizer.decode(out, skip_special_tokens=True))
