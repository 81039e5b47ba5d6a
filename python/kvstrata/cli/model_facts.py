"""What doctor says of a model: why it is refused, or its layers, its bytes per token, and how near the dense cache it is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from kvstrata.cli.output import Output

TOKENS = 64
PREFILL = 48
"""Of the TOKENS, this many come as one prompt and the others one by one."""
TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 5e-2, "torch.float16": 5e-2}
"""Largest absolute difference of a logit: f32 rounds differently in another order of sums; 16-bit types round outputs."""


def examine(name: str, out: Output) -> dict[str, Any]:
    """Everything about one model as plain data. "reasons" is empty if kvstrata serves it."""
    from kvstrata.config import Unsupported
    from kvstrata.hf.capability import reasons
    from kvstrata.hf.decoder import facts_of
    from kvstrata.hf.load import load
    from kvstrata.hf.patch import patch

    with out.busy(f"loading {name}"):
        model, tokenizer = load(name)
    found: dict[str, Any] = {"name": name, "class": type(model).__name__, "tokenizer": tokenizer is not None}
    found["reasons"] = reasons(model)
    if found["reasons"]:
        return found
    try:
        patch(model)
    except Unsupported as error:
        found["reasons"] = [str(error)]
        return found
    _, facts = facts_of(model)
    found["layers"] = [layer(fact) for fact in facts.layers]
    found["bytes_per_token"] = bytes_per_token(found["layers"])
    with out.busy(f"comparing logits over {TOKENS} tokens"):
        found["logits"] = compare(model)
    if found["logits"]["largest_difference"] > found["logits"]["tolerance"]:
        found["reasons"] = [
            "the logits differ from the dense cache's by {largest_difference:.3g}, more than {tolerance:g} "
            "({dtype})".format(**found["logits"])
        ]
    return found


def layer(fact: Any) -> dict[str, Any]:
    names = ("layer", "kv_heads", "q_heads", "head_dim", "window")
    return {name: getattr(fact, name) for name in names} | {"dtype": str(fact.dtype), "device": str(fact.device)}


def bytes_per_token(layers: list[dict[str, Any]]) -> dict[str, int]:
    """Over all layers: a dense cache's, and by page format, head dims padded to 16, positions included."""
    width = {"f32": 4, "bf16": 2, "f16": 2}
    size = {"torch.float32": 4}
    found = {"dense cache": sum(2 * la["kv_heads"] * la["head_dim"] * size.get(la["dtype"], 2) for la in layers)}
    for name, n in width.items():
        found[name] = sum(la["kv_heads"] * (2 * n * (-(-la["head_dim"] // 16) * 16) + 4) for la in layers)
    return found


def compare(model: Any) -> dict[str, Any]:
    """Largest absolute difference of logits between policy full and the dense cache: a prompt, then token by token."""
    from kvstrata.hf.cache import KVCache
    from kvstrata.hf.load import dense_cache

    dense = logits(model, dense_cache(model))
    ours = logits(model, KVCache.for_model(model))
    dtype = str(dense.dtype)
    return {
        "tokens": TOKENS,
        "dtype": dtype,
        "largest_difference": float((dense.float() - ours.float()).abs().max()),
        "tolerance": TOLERANCE.get(dtype, TOLERANCE["torch.bfloat16"]),
    }


def logits(model: Any, cache: Any) -> Any:
    """[TOKENS, V]: of fixed pseudo-random tokens."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    parts = []
    bounds = [0, *range(PREFILL, TOKENS + 1)]
    with torch.no_grad():
        for begin, end in pairwise(bounds):
            parts.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(parts)


def show(found: dict[str, Any], out: Output) -> None:
    out.line(f"\nModel {found['name']}: {found['class']}", style="bold")
    for reason in found["reasons"]:
        out.line(f"Refused: {reason}", style="red")
    if "layers" not in found:
        return
    columns = ["layers", ">KV heads", ">query heads", ">head dim", ">window", "dtype", "device"]
    out.table("Layers", columns, _grouped(found["layers"]))
    out.table("Bytes per token", ["format", ">bytes"], [(k, f"{n:,}") for k, n in found["bytes_per_token"].items()])
    seen = found["logits"]
    out.line(
        f"\nLargest logit difference to the dense cache over {seen['tokens']} tokens: "
        f"{seen['largest_difference']:.3g} (at most {seen['tolerance']:g} for {seen['dtype']})"
    )


def _grouped(layers: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """Equal neighbours in one row: "0-31"."""
    rows: list[tuple[int, int, tuple[object, ...]]] = []
    for la in layers:
        window = la["window"] or "-"
        facts = (
            la["kv_heads"],
            la["q_heads"],
            la["head_dim"],
            window,
            la["dtype"].removeprefix("torch."),
            la["device"],
        )
        if rows and rows[-1][2] == facts:
            rows[-1] = (rows[-1][0], la["layer"], facts)
        else:
            rows.append((la["layer"], la["layer"], facts))
    return [(str(a) if a == b else f"{a}-{b}", *facts) for a, b, facts in rows]
