"""One example through one cache: answers, likelihoods, bytes. Plain data out, so that a run can be stored and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kvstrata.quality.contenders import Contender, dense_bytes
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
    _dense: tuple[Example, Scored] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.stops = stops_of(self.tokenizer, self.model.get_input_embeddings().num_embeddings)

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Token ids; ``first``: with the token that begins every text, if the tokenizer has one."""
        ids = [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]
        begin = self.tokenizer.bos_token_id
        return [begin, *ids] if first and begin is not None else ids

    def dense(self, example: Example) -> Scored:
        """The text under a dense cache."""
        if self._dense is None or self._dense[0] is not example:
            reader = Reader(self.model, Contender("DynamicCache", None).make(self.model, 0), self.stops)
            self._dense = (example, scored(self, reader, example))
        return self._dense[1]


@dataclass(frozen=True)
class Scored:
    """log_probs f32 [T, V] of a continuation's tokens after its first; attention: per layer [T + 1, width]."""

    log_probs: torch.Tensor
    attention: list[torch.Tensor]


def measure(subject: Subject, example: Example, contender: Contender, mode: str) -> Record:
    """What the contender makes of the example; ``{"refused": reason}`` where it cannot keep its budget.

    mode: "query-agnostic", the context is compressed before a question is seen, or "query-aware", the first question
    is part of what is compressed.
    """
    total = size(subject, example)
    try:
        reader = Reader(subject.model, contender.make(subject.model, total), subject.stops)
        found = _text(subject, reader, example) if example.continuation else _asked(subject, reader, example, mode)
    except ValueError as error:  # Unsupported and BudgetExceeded are
        return {"refused": f"{type(error).__name__}: {error}"}
    return found | _memory(reader.cache) | {"dense_bytes": dense_bytes(subject.model, total), "tokens": total}


def size(subject: Subject, example: Example) -> int:
    """Tokens of the whole example: context, questions and answers, or context and continuation."""
    n = len(subject.encode(example.context, first=True)) + len(subject.encode(example.continuation))
    pairs = zip(example.questions, example.answers, strict=True)
    return n + sum(len(subject.encode(q)) + len(subject.encode(f" {a}\n")) for q, a in pairs)


def _asked(subject: Subject, reader: Reader, example: Example, mode: str) -> Record:
    context = subject.encode(example.context, first=True)
    questions = [subject.encode(q) for q in example.questions]
    if mode == "query-aware":
        logits = reader.read(context + questions[0])
        reader.compress()
    else:
        reader.read(context)
        reader.compress()
        logits = reader.read(questions[0])
    answers: list[list[int]] = []
    for i, expected in enumerate(example.answers):
        logits = reader.read(questions[i]) if i else logits
        answers.append(reader.answer(logits, allowance(subject, expected)))
    return judged(subject, answers, example) | {
        "decoded": reader.decoded,
        "context": len(context),
        "ms": [round(x, 3) for x in reader.ms],
        "prefill_ms": reader.prefill_ms,
    }


def allowance(subject: Subject, expected: str) -> int:
    """Tokens that an answer may take."""
    return len(subject.encode(f" {expected}")) + SPARE


def judged(subject: Subject, answers: list[list[int]], example: Example) -> Record:
    """Answers in token ids as text, beside what was expected: 1 where they are the same."""
    said = [str(subject.tokenizer.decode(answer)).strip() for answer in answers]
    scores = [int(a == e.strip()) for a, e in zip(said, example.answers, strict=True)]
    return {"answers": said, "expected": list(example.answers), "scores": scores}


def _text(subject: Subject, reader: Reader, example: Example) -> Record:
    dense = subject.dense(example)
    found = scored(subject, reader, example)
    targets = torch.tensor(subject.encode(example.continuation)[1:])[:, None]
    nll = -found.log_probs.gather(1, targets)
    kl = (dense.log_probs.exp() * (dense.log_probs - found.log_probs)).sum(1)
    same = found.log_probs.argmax(1) == dense.log_probs.argmax(1)
    return {
        "nll": nll.mean().item(),
        "kl": kl.mean().item(),
        "top1": same.float().mean().item(),
        "attention_error": [_relative(a, b) for a, b in zip(found.attention, dense.attention, strict=True)],
        "context": len(subject.encode(example.context, first=True)),
    }


def _relative(found: torch.Tensor, dense: torch.Tensor) -> float:
    """Mean over tokens of the difference's norm, as a share of the dense output's norm."""
    return float(((found - dense).norm(dim=1) / dense.norm(dim=1).clamp_min(1e-9)).mean())


def scored(subject: Subject, reader: Reader, example: Example) -> Scored:
    """Reads the context, compresses, then the continuation in one forward."""
    reader.read(subject.encode(example.context, first=True))
    reader.compress()
    ids = subject.encode(example.continuation)
    with _attention_outputs(subject.model) as outputs:
        logits = reader.read(ids, logits=len(ids))
    return Scored(logits[:-1].float().log_softmax(-1), outputs)


@contextmanager
def _attention_outputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """f32 [T, width] of every attention module, in order of the layers, while inside."""
    outputs: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0].float())

    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
    hooks = [m.register_forward_hook(keep) for m in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _memory(cache: Any) -> Record:
    """Bytes held at the end and at the most; tokens by state where the cache knows states."""
    if not hasattr(cache, "report"):
        return {"bytes": cache.nbytes(), "peak_bytes": cache.peak_bytes}
    report = cache.report()
    return {"bytes": report.nbytes, "peak_bytes": report.peak_bytes, "states": dict(report.states)}
