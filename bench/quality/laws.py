"""What allocators are fitted by: how much attention each row of a model loses with its tokens, how its keys change.

On contexts of a seed that is never asked about, with the questions and answers behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from priors import seen
from torch import Tensor

from kvstrata.budget import EntropyShare, PowerLaw, SensitivityProfile
from kvstrata.budget.powerlaw import PROBES, fit
from kvstrata.episodes import sensitivity
from kvstrata.hf.cache import KVCache
from kvstrata.hf.chat_model import chat_model
from kvstrata.policy import KeepTop, KeyDiversity, Policy
from kvstrata.policy.arkv import KERNEL
from kvstrata.policy.base import Seen
from kvstrata.quality.measure import Subject, Tokens
from kvstrata.quality.reader import Reader
from kvstrata.quality.run import Config, made_example, subject
from kvstrata.quality.tasks import RETRIEVAL

QUERIES = 32
SEED, CONTEXTS, LENGTH = 7, 2, 2048
"""Of the calibration: CONTEXTS of each task. Seeds from 0 on are asked about."""
BUDGET, CHUNK = 304, 256
"""Tokens that a row of the small cache keeps while keys are compared, sinks too, and tokens read at a time."""
WATCHING = Policy(
    "watching", KeepTop(), KeyDiversity(KERNEL), EntropyShare(queries=QUERIES), sinks=16, window=64
)  # fmt: skip
"""Keeps all under its limit, ranks as what is fitted, and remembers the last queries."""


@dataclass(frozen=True, eq=False)
class Laws:
    """Of every (layer, KV head): tokens f64 [P] and error f64 [L, H, P] at the probes, far f64 [L, H], the share of attention
    on unprotected tokens; c, alpha f64 [L, H] of error = c * tokens^(-alpha)."""

    tokens: Tensor
    error: Tensor
    far: Tensor
    c: Tensor
    alpha: Tensor

    @property
    def allocator(self) -> PowerLaw:
        return PowerLaw(self.c, self.alpha)


def examples(model: str) -> tuple[Subject, list[Tokens]]:
    """The model and the contexts of the calibration."""
    asked, _ = subject(model, "auto")
    config = Config(model, RETRIEVAL, (), (), (), (LENGTH,), CONTEXTS, SEED)
    made = [made_example(config, task, LENGTH, i) for task in RETRIEVAL for i in range(CONTEXTS)]
    return asked, [asked.tokens(example) for example in made]


@cache
def laws(model: str) -> Laws:
    """Fitted to what the last QUERIES queries of questions and answers lose, a context's tokens ranked before them."""
    asked, found = examples(model)
    rows = torch.stack([lost(asked, tokens) for tokens in found]).mean(0)
    tokens, error = rows[..., :-1, 0], rows[..., :-1, 1]
    c, alpha = (torch.from_numpy(x) for x in fit(tokens.numpy(), error.numpy()))
    return Laws(tokens[0, 0], error, rows[..., -1, 1], c, alpha)


def lost(asked: Subject, tokens: Tokens) -> Tensor:
    """Tokens kept and attention lost of each row at the probes and with no unprotected token, f64 [L, H, P + 1, 2]."""
    cache = KVCache.for_model(asked.model, policy=WATCHING, budget="64MiB")
    reader = Reader(asked.model, cache, asked.stops)
    reader.read(tokens.context)
    before = [(s.stored & ~s.protected, KeyDiversity(KERNEL).score(s)) for s in seen(cache)]
    behind = [
        token
        for question, answer in zip(tokens.questions, tokens.example.answers, strict=True)
        for token in question + asked.encode(f" {answer}\n")
    ]
    reader.read(behind)
    queries = min(QUERIES, len(behind))
    return torch.stack([of_rows(*then, now, queries) for then, now in zip(before, seen(cache), strict=True)])


def of_rows(free: Tensor, score: Tensor, now: Seen, queries: int) -> Tensor:
    """[H, P + 1, 2] of one layer. free: bool [H, N], the unprotected tokens of the context; score: f32 [H, N], their ranks."""
    assert now.read is not None
    mass = now.read.attention(queries, "mean", 0.0).mean(1)[:, : free.shape[1]]
    out = []
    for f, s, m in zip(free, score, mass, strict=True):
        ranked = (m * f)[torch.where(f, s, -torch.inf).argsort(descending=True, stable=True)].double()
        kept = [int(p * int(f.sum())) for p in PROBES]
        out.append([[float(n), float(ranked[n:].sum())] for n in (*kept, 0)])
    return torch.tensor(out, dtype=torch.float64)


@cache
def profile(model: str) -> SensitivityProfile:
    """How a model's keys change where a row keeps BUDGET tokens, on the contexts of the calibration."""
    asked, found = examples(model)
    texts = [torch.tensor(tokens.context) for tokens in found[::CONTEXTS]]
    return sensitivity(chat_model(asked.model, asked.tokenizer, style="transcript"), texts, BUDGET, CHUNK)


def name_of(model: Any) -> str:
    """The folder that a loaded model came from."""
    return str(model.config.name_or_path)
