"""One generation, timed token by token, dense or with a KVCache."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Run:
    """What one generation gave and took. prefill_ms: until the first token; ms_p50, ms_p99: of each further one."""

    name: str
    tokens: list[int]
    prefill_ms: float
    ms_p50: float | None
    ms_p99: float | None
    kv_bytes: int
    kv_peak_bytes: int

    def agreement(self, other: Run) -> int:
        """How many leading tokens are the same."""
        pairs = enumerate(zip(self.tokens, other.tokens, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.tokens), len(other.tokens)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Clock:
    """A streamer for generate() that keeps the time of every token. The prompt is put first, before it is run."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def generate(name: str, model: Any, cache: Any, ids: list[int], new_tokens: int, eos: Any = None) -> Run:
    """Greedy continuation of ids by at most new_tokens tokens."""
    clock = Clock()
    prompt = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=clock,
            eos_token_id=eos,
            pad_token_id=0,
        )
    gaps = sorted(1e3 * (b - a) for a, b in zip(clock.times[1:-1], clock.times[2:], strict=True))
    report = cache.report() if hasattr(cache, "report") else None
    return Run(
        name=name,
        tokens=out[0, len(ids) :].tolist(),
        prefill_ms=1e3 * (clock.times[1] - clock.times[0]),
        ms_p50=statistics.median(gaps) if gaps else None,
        ms_p99=gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))] if gaps else None,
        kv_bytes=cache.nbytes(),
        kv_peak_bytes=cache.peak_bytes if report is None else report.peak_bytes,
    )


def ms_text(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.2f}"
