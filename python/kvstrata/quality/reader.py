"""A model that reads a context through a cache and answers questions about it, greedily."""

from __future__ import annotations

import time
from typing import Any

import torch

END = "\n"
"""Where an answer ends."""


class Reader:
    """One text read through one cache, batch 1. What was generated stays in the cache, as in a dialogue.

    stops: token ids that end an answer. ms: of every decoded token; decoded: their
    number; prefill_ms: of the first read.
    """

    def __init__(self, model: Any, cache: Any, stops: frozenset[int]) -> None:
        self.model, self.cache, self.stops = model, cache, stops
        self.ms: list[float] = []
        self.prefill_ms: float | None = None
        self._unread: list[int] = []

    @property
    def decoded(self) -> int:
        return len(self.ms)

    def read(self, ids: list[int], logits: int = 1) -> torch.Tensor:
        """Feeds tokens, after those generated but not fed yet. Returns the last ``logits`` rows of logits, [n, V]."""
        fed = torch.tensor([self._unread + ids], device=self.model.device)
        self._unread = []
        began = time.perf_counter()
        with torch.inference_mode():
            out = self.model(fed, past_key_values=self.cache, use_cache=True, logits_to_keep=logits)
        if self.prefill_ms is None:
            self.prefill_ms = 1e3 * (time.perf_counter() - began)
        return out.logits[0]  # type: ignore[no-any-return]

    def spell(self, ids: list[int]) -> torch.Tensor:
        """As :meth:`read`, one token at a time, as a step of decoding feeds it."""
        ids, self._unread = self._unread + ids, []
        for token in ids:
            logits = self.read([token])
        return logits

    def compress(self) -> None:
        """The context ends here: a cache of ours plans now."""
        if hasattr(self.cache, "end_prefill"):
            self.cache.end_prefill()

    def answer(self, logits: torch.Tensor, most: int) -> list[int]:
        """At most ``most`` tokens up to one that ends the answer, which is fed with the next question. logits [1, V]."""
        out: list[int] = []
        while True:
            token = int(logits[-1].argmax())
            self._unread.append(token)
            if token in self.stops:
                return out
            out.append(token)
            if len(out) == most:
                return out
            began = time.perf_counter()
            logits = self.read([])
            self.ms.append(1e3 * (time.perf_counter() - began))


def stops_of(tokenizer: Any, vocabulary: int) -> frozenset[int]:
    """Tokens that hold the end of a line, and the tokenizer's end of text."""
    found = {i for i in range(vocabulary) if END in tokenizer.decode([i])}
    return frozenset(found | ({tokenizer.eos_token_id} - {None}))
