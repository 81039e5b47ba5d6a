"""One example through one cache: answers, likelihoods, bytes. Plain data out, so that a run can be stored and resumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvstrata.quality import attention
from kvstrata.quality.contenders import Contender, shape_of
from kvstrata.quality.reader import Reader, stops_of
from kvstrata.quality.tasks import Example

SPARE = 4
"""An answer may be so many tokens longer than the expected one."""
Record = dict[str, Any]


@dataclass
class Subject:
    """A patched model, its tokenizer, and what the dense cache said of the last text (computed once per example)."""

    model: Any
    tokenizer: Any
    stops: frozenset[int] = field(init=False)
    _dense: tuple[Tokens, Scored, list[torch.Tensor]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.stops = stops_of(self.tokenizer, self.model.get_input_embeddings().num_embeddings)

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Token ids; ``first``: with the token that begins every text, if the tokenizer has one."""
        ids = [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]
        begin = self.tokenizer.bos_token_id
        return [begin, *ids] if first and begin is not None else ids

    def tokens(self, example: Example) -> Tokens:
        """An example in token ids."""
        pairs = zip(example.questions, example.answers, strict=True)
        context = self.encode(example.context, first=True)
        continuation = self.encode(example.continuation)
        asked = sum(len(self.encode(q)) + len(self.encode(f" {a}\n")) for q, a in pairs)
        return Tokens(
            example,
            context,
            [self.encode(q) for q in example.questions],
            [len(self.encode(f" {a}")) + SPARE for a in example.answers],
            continuation,
            len(context) + len(continuation) + asked,
        )

    def dense(self, tokens: Tokens) -> tuple[Scored, list[torch.Tensor]]:
        """The text under a dense cache, and per layer the continuation's attention mass on the context, f32 [H, N]."""
        if self._dense is None or self._dense[0] is not tokens:
            cache = attention.WatchedCache(self.model)
            self._dense = (tokens, scored(self, Reader(self.model, cache, self.stops), tokens), cache.mass)
        return self._dense[1:]


@dataclass(frozen=True, eq=False)
class Tokens:
    """An example in token ids, made once for all contenders.

    most: tokens that each answer may take; total: of the whole example, answers included.
    """

    example: Example
    context: list[int]
    questions: list[list[int]]
    most: list[int]
    continuation: list[int]
    total: int


@dataclass(frozen=True)
class Scored:
    """log_probs f32 [T, V] of a continuation's tokens after its first; attention: per layer f32 [T + 1, width].

    stored: per layer bool [H, N], which tokens of the context were held when it was compressed; None of a peer.
    """

    log_probs: torch.Tensor
    attention: list[torch.Tensor]
    stored: list[torch.Tensor] | None


def measure(subject: Subject, tokens: Tokens, contender: Contender, mode: str) -> Record:
    """What the contender makes of the example; ``{"refused": reason}`` where it cannot keep its budget.

    mode: "query-agnostic", the context is compressed before a question is seen; "query-aware", the first question is part of
    what is compressed; or "stepwise", query-agnostic and questions are fed token by token, as what is decoded is: policies that
    select pages do so for steps of one token.
    """
    try:
        reader = Reader(subject.model, contender.make(subject.model, tokens.total), subject.stops)
        found = _text(subject, reader, tokens) if tokens.continuation else _asked(subject, reader, tokens, mode)
    except ValueError as error:  # Unsupported and BudgetExceeded are
        return {"refused": f"{type(error).__name__}: {error}"}
    return found | _memory(reader.cache) | whole(subject, tokens)


def whole(subject: Subject, tokens: Tokens) -> Record:
    """What bytes are compared with: the dense cache of the whole example."""
    return {"dense_bytes": tokens.total * shape_of(subject.model).token_bytes(), "tokens": tokens.total}


def _asked(subject: Subject, reader: Reader, tokens: Tokens, mode: str) -> Record:
    questions = tokens.questions
    ask = reader.spell if mode == "stepwise" else reader.read
    if mode == "query-aware":
        logits = reader.read(tokens.context + questions[0])
        reader.compress()
    else:
        reader.read(tokens.context)
        reader.compress()
        logits = ask(questions[0])
    answers: list[list[int]] = []
    for i, most in enumerate(tokens.most):
        logits = ask(questions[i]) if i else logits
        answers.append(reader.answer(logits, most))
    return judged(subject, answers, tokens.example) | {
        "decoded": reader.decoded,
        "context": len(tokens.context),
        "ms": [round(x, 3) for x in reader.ms],
        "prefill_ms": reader.prefill_ms,
    }


def judged(subject: Subject, answers: list[list[int]], example: Example) -> Record:
    """Answers in token ids as text, beside what was expected: 1 where they are the same."""
    said = [str(subject.tokenizer.decode(answer)).strip() for answer in answers]
    scores = [int(a == e.strip()) for a, e in zip(said, example.answers, strict=True)]
    return {"answers": said, "expected": list(example.answers), "scores": scores}


def _text(subject: Subject, reader: Reader, tokens: Tokens) -> Record:
    dense, mass = subject.dense(tokens)
    found = scored(subject, reader, tokens)
    nll = -found.log_probs.gather(1, torch.tensor(tokens.continuation[1:])[:, None])
    kl = (dense.log_probs.exp() * (dense.log_probs - found.log_probs)).sum(1)
    same = found.log_probs.argmax(1) == dense.log_probs.argmax(1)
    return {
        "nll": nll.mean().item(),
        "kl": kl.mean().item(),
        "top1": same.float().mean().item(),
        "attention_error": [_relative(a, b) for a, b in zip(found.attention, dense.attention, strict=True)],
        "captured_mass": attention.captured(mass, found.stored),
        "context": len(tokens.context),
    }


def _relative(found: torch.Tensor, dense: torch.Tensor) -> float:
    """Mean over tokens of the difference's norm, as a share of the dense output's norm."""
    return float(((found - dense).norm(dim=1) / dense.norm(dim=1).clamp_min(1e-9)).mean())


def scored(subject: Subject, reader: Reader, tokens: Tokens) -> Scored:
    """Reads the context, compresses, then the continuation in one forward."""
    reader.read(tokens.context)
    reader.compress()
    stored = attention.stored(reader.cache, len(tokens.context))
    with attention.outputs(subject.model) as outputs:
        logits = reader.read(tokens.continuation, logits=len(tokens.continuation))
    return Scored(logits[:-1].float().log_softmax(-1), outputs, stored)


def _memory(cache: Any) -> Record:
    """Bytes held at the end and at the most; tokens by state where the cache knows states."""
    if not hasattr(cache, "report"):
        return {"bytes": cache.nbytes(), "peak_bytes": cache.peak_bytes}
    report = cache.report()
    return {"bytes": report.nbytes, "peak_bytes": report.peak_bytes, "states": dict(report.states)}
