"""Which axis to quantize keys along: per token, rotated and centred, or per channel over tokens (KIVI).

    python bench/quality/keys.py --out bench/results/cpu/keys

Schemes at 4 and 2 bits, scales and offsets bf16, groups of g dimensions of a token or n tokens of a channel:
ours (Hadamard-rotated, centred, symmetric), ours asym (with an offset, int4a and int2a), token asym (as keys come), channel
asym (KIVI, arXiv 2402.02750: n = 32). Of 2,048 tokens the first 16 and the last 112 stay exact. K error: RMS, relative to K
less its channel means, which attention does not see. Output error: of the last 64 queries' causal attention with exact V,
relative. Bytes: of a slot, keys alone; the centre, 4 D per row, is left out. Plain torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from formats import passages
from published import Section, publish
from torch import Tensor

from kvstrata.cli.output import Output
from kvstrata.hf.decoder import facts_of
from kvstrata.hf.facts import Probe, ProbeCache
from kvstrata.quality.reader import Reader
from kvstrata.quality.run import subject
from kvstrata.reference import decode, encode, rotate, round_up_bf16

TOKENS, PART, QUERIES = 2048, slice(16, 1936), 64
FORMATS = {4: "int4", 2: "int2"}
SCHEMES = [
    *(("ours", b, g) for b, groups in ((4, (64, 32, 16)), (2, (32, 16))) for g in groups),
    *((name, b, g) for name in ("ours asym", "token asym") for b in (4, 2) for g in (64, 32)),
    *(("channel asym", b, n) for b in (4, 2) for n in (128, 64, 32)),
]
SOURCES = {
    "model": "Trained model on held-out text, its own queries",
    "means": "Gaussian, D 128, six channels of mean 6 to 14 sigma, random queries",
    "spike": "Gaussian, D 128, one channel of 20 sigma and random sign, random queries",
}
Row = tuple[Tensor, Tensor, Tensor]
"""q f32 [G, W, D], k, v f32 [N, D]."""


def asym(x: Tensor, bits: int, group: int) -> Tensor:
    """x f32 [.., D] decoded after int4a or int2a: o = largest bf16 <= min, s = up((max - o) / L)."""
    parts, most = x.reshape(-1, group), 2**bits - 1
    least = parts.amin(1, keepdim=True)
    truncated = (least.view(torch.int32) & -65536).view(torch.float32)
    low = torch.where(least < 0, round_up_bf16(least), truncated)
    scale = round_up_bf16((parts.amax(1, keepdim=True) - low) / most).clamp_min(2.0**-100)
    return (scale * ((parts - low) / scale).round().clamp(0, most) + low).view(x.shape)


def stored(k: Tensor, name: str, bits: int, group: int) -> Tensor:
    """k f32 [N, D] as it is read back."""
    if name == "channel asym":
        return asym(k.T.contiguous(), bits, group).T
    if name == "token asym":
        return asym(k, bits, group)
    mean = k.mean(0)
    centre = torch.where(mean.abs() >= 2 * k.std(0, unbiased=False), mean, 0.0)
    x = rotate(k - centre)
    if name == "ours asym":
        return rotate(asym(x, bits, group), inverse=True) + centre
    form = FORMATS[bits]
    return rotate(decode(*encode(x.reshape(-1, group), form), form).view(x.shape), inverse=True) + centre


def key_bytes(name: str, bits: int, group: int, dim: int) -> float:
    return dim * bits / 8 + (2 if name == "ours" else 4) * dim / group


class Caught(Probe):
    """Keeps the last queries, keys and values of each layer."""

    def __init__(self, modules: frozenset[int]) -> None:
        super().__init__("keys", modules)
        self.found: list[Row] = []

    def note(self, layer: int, new_k: Any, new_v: Any, k: Any, v: Any) -> None: ...

    def record(self, module: Any, q: Any, k: Any, v: Any, mask: Any, kwargs: dict[str, Any]) -> None:
        self.found.append((q[0, :, -QUERIES:].float(), k[0].float(), v[0].float()))


class CatchingCache(ProbeCache):
    """A dense cache of a patched model whose attention inputs are kept."""

    def __init__(self, model: Any) -> None:
        decoder, _ = facts_of(model)
        self.caught = Caught(frozenset(id(m) for m in decoder.modules()))
        super().__init__(model.config, self.caught)

    def record_mask(self, fallback: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return fallback(*args, **kwargs)


def captured(model: str, contexts: int) -> Iterator[Row]:
    """A row for each context, layer and KV head."""
    asked, _ = subject(model, "bfloat16")
    for ids in passages(asked, contexts, TOKENS):
        cache = CatchingCache(asked.model)
        Reader(asked.model, cache, asked.stops).read(ids[:-1])
        for q, k, v in cache.caught.found:
            yield from ((group, k[h], v[h]) for h, group in enumerate(q.chunk(len(k))))


def synthetic(kind: str, rows: int, dim: int = 128) -> Iterator[Row]:
    for seed in range(rows):
        draw = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(TOKENS, dim, generator=draw) for _ in range(2))
        at = torch.randperm(dim, generator=draw)[:6]
        if kind == "means":
            k[:, at] += torch.linspace(6, 14, 6)
        else:
            k[:, at[0]] = 40.0 * torch.randint(0, 2, (TOKENS,), generator=draw) - 20
        yield torch.randn(4, QUERIES, dim, generator=draw), k.bfloat16().float(), v.bfloat16().float()


def attention(row: Row, k: Tensor) -> Tensor:
    """f32 [G, W, D]: the last queries over k [N, D] and the row's values."""
    place = torch.arange(len(k))
    logits = (row[0] @ k.T) * k.shape[1] ** -0.5
    return logits.masked_fill(place > place[-QUERIES:, None], -torch.inf).softmax(-1) @ row[2]


def errors(rows: list[Row], scheme: tuple[str, int, int]) -> dict[str, float]:
    """Means over rows."""
    rms, output = [], []
    for row in rows:
        k, part = row[1].clone(), row[1][PART]
        k[PART] = stored(part, *scheme)
        rms.append(float((k[PART] - part).norm() / (part - part.mean(0)).norm()))
        exact = attention(row, row[1])
        output.append(float((attention(row, k) - exact).norm() / exact.norm()))
    return {"key_error": fmean(rms), "output_error": fmean(output)}


def conclusion(found: list[dict[str, Any]]) -> str:
    """KIVI's output error as a multiple of ours (symmetric), at equal bytes."""
    parts = []
    for source in SOURCES:
        for bits in FORMATS:
            mine = [r for r in found if r["source"] == source and r["bits"] == bits]
            by = {(r["scheme"], r["key_bytes"]): r["output_error"] for r in mine}
            met = [
                by["channel asym", n] / e for (name, n), e in by.items() if name == "ours" and ("channel asym", n) in by
            ]
            parts.append(f"{source} {min(met):.2f} to {max(met):.2f} at {bits} bits")
    return "Output error of per-channel keys (KIVI) as a multiple of ours at equal bytes: " + "; ".join(parts) + "."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", default="bench/quality/model")
    parser.add_argument("--contexts", metavar="N", type=int, default=8, help="of text; default: %(default)s")
    parser.add_argument("--rows", metavar="N", type=int, default=8, help="synthetic; default: %(default)s")
    parser.add_argument("--out", metavar="STEM", type=Path, help="writes STEM.json and STEM.md")
    args = parser.parse_args()
    found, sections = [], []
    for source, title in SOURCES.items():
        rows = list(captured(args.model, args.contexts) if source == "model" else synthetic(source, args.rows))
        dim, mine = rows[0][1].shape[1], []
        for name, bits, group in SCHEMES:
            facts = {"source": source, "scheme": name, "bits": bits, "group": group, "rows": len(rows)}
            size = key_bytes(name, bits, group, dim)
            mine.append(facts | {"key_bytes": size} | errors(rows, (name, bits, group)))
        mine.sort(key=lambda r: (-r["bits"], r["key_bytes"], r["output_error"]))
        body = [
            [r["scheme"], *(f"{r[n]:g}" for n in ("bits", "group", "key_bytes"))]
            + [f"{100 * r[n]:.2f}" for n in ("key_error", "output_error")]
            for r in mine
        ]
        header = ["keys", "bits", "g or n", "bytes per slot, K", "K error %", "output error %"]
        sections.append(Section(title, f"{len(rows)} rows of D {dim}.", header, body))
        found += mine
    publish(Output(json=False), "Axes of K quantization", args, found, sections, conclusion(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
