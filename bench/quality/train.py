"""Trains the small model that really retrieves. One file, seeded, resumable, CPU or CUDA.

    python bench/quality/train.py --minutes 60 --out bench/quality/model

The curriculum (stage: context, share of samples) follows what is known to work: facts asked back in their own words and
copies first, filler, paraphrased questions and longer contexts later. Logs one JSON line per 50 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tasks import TASKS, World, ask, digits, fact, keys
from text import Source, train_tokenizer
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOKENS_PER_STEP = 8192
PEAK_RATE = 2e-3
TEXT_WEIGHT = 0.3
"""Weight of the loss on real text beside the loss on answers."""


@dataclass(frozen=True)
class Stage:
    """steps at a context length; shares of copy samples, of verbatim facts, of plain text; the rest are tasks."""

    steps: int
    context: int
    copy: float
    verbatim: float
    text: float


CURRICULUM = (
    Stage(500, 128, 0.30, 0.70, 0.0),
    Stage(400, 256, 0.25, 0.45, 0.05),
    Stage(600, 256, 0.15, 0.10, 0.10),
    Stage(500, 512, 0.08, 0.02, 0.12),
    Stage(400, 1024, 0.05, 0.0, 0.15),
    Stage(400, 2048, 0.03, 0.0, 0.15),
)


def rex(t: float) -> float:
    """REX profile (arXiv 2107.04197): z / (1/2 + z/2), z = 1 - t."""
    z = 1.0 - t
    return z / (0.5 + 0.5 * z)


class Sampler:
    """Token sequences with a weight per token: 1 where an answer (or a copy) is predicted, TEXT_WEIGHT on text."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.world = World(tokenizer, Source.of(tokenizer, "train"))
        self.rng = random.Random(seed)
        self.bos = tokenizer.token_to_id("<s>")

    def batch(self, stage: Stage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids i64 [B, T], answer mask bool [B, T], text mask bool [B, T] (of the token that is predicted)."""
        n = TOKENS_PER_STEP // stage.context
        ids = torch.full((n, stage.context), self.bos)
        answer, text = torch.zeros(2, n, stage.context, dtype=torch.bool)
        for b in range(n):
            tokens, kinds = self.sample(stage)
            tokens, kinds = tokens[: stage.context - 1], kinds[: stage.context - 1]
            ids[b, 1 : 1 + len(tokens)] = torch.tensor(tokens)
            kind = torch.tensor(kinds)
            answer[b, 1 : 1 + len(tokens)] = kind == 2
            text[b, 1 : 1 + len(tokens)] = kind == 1
        return ids, answer, text

    def sample(self, stage: Stage) -> tuple[list[int], list[int]]:
        u = self.rng.random()
        if u < stage.copy:
            return self.copy(stage.context)
        if u < stage.copy + stage.verbatim:
            return self.verbatim(stage.context)
        if u < stage.copy + stage.verbatim + stage.text:
            return self.text(stage.context)
        return self.task(stage.context)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def copy(self, context: int) -> tuple[list[int], list[int]]:
        n = self.rng.randint(8, (context - 1) // 2)
        first = [self.rng.randrange(1, self.tokenizer.get_vocab_size()) for _ in range(n)]
        return first + first, [0] * n + [2] * n

    def verbatim(self, context: int) -> tuple[list[int], list[int]]:
        """Facts, then some of them again, word for word."""
        names = keys(self.rng, max(2, context // 48))
        facts = [(f"The code of the {k} is", f" {digits(self.rng)}") for k in names]
        ids, kinds = self.encode("".join(a + b + ".\n" for a, b in facts)), []
        kinds = [0] * len(ids)
        while True:
            stem, value = self.rng.choice(facts)
            a, b = self.encode(stem), self.encode(value + ".\n")
            if len(ids) + len(a) + len(b) > context - 1:
                return ids, kinds
            ids, kinds = ids + a + b, kinds + [0] * len(a) + [2] * len(b)

    def text(self, context: int) -> tuple[list[int], list[int]]:
        source = self.world.source
        start = self.rng.randrange(len(source.lines))
        ids = self.encode("".join(source.lines[start : start + context // 4]))[: context - 1]
        return ids, [1] * len(ids)

    def task(self, context: int) -> tuple[list[int], list[int]]:
        """A task; those with codes go on asking about other keys while there is room."""
        name = self.rng.choices(list(TASKS), weights=[1, 2, 1.5, 3, 2, 1, 2, 1])[0]
        seed = self.rng.randrange(1 << 39)
        tail = 40 if name not in ("multi_query", "tracking") else 0
        room = context - 1 - max(tail, min(context // 3, 220 if name == "multi_query" else 56))
        example = TASKS[name](room, seed, self.world)
        ids = self.encode(example.context)
        kinds = [1] * len(ids)
        for question, answer in zip(example.questions, example.answers, strict=True):
            q, a = self.encode(question), self.encode(f" {answer}\n")
            if len(ids) + len(q) + len(a) > context - 1:
                break
            ids, kinds = ids + q + a, kinds + [0] * len(q) + [2] * len(a)
        return ids, kinds


def build(vocab: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=50_000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, answer: torch.Tensor, text: torch.Tensor
) -> dict[str, torch.Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    each = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
    on_answer, on_text = answer[:, 1:], text[:, 1:]
    right = (logits.argmax(-1) == ids[:, 1:]) & on_answer
    return {
        "answer": (each * on_answer).sum() / on_answer.sum().clamp_min(1),
        "text": (each * on_text).sum() / on_text.sum().clamp_min(1),
        "accuracy": right.sum() / on_answer.sum().clamp_min(1),
    }


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    words = "".join(fact(k, "0") + ask(k) + "\n" for k in keys(random.Random(0), 900))
    tokenizer = train_tokenizer(
        words + "User correction. follow follows all codes of the two most frequent marks mark\n" * 50
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>").save_pretrained(out)
    model = build(tokenizer.get_vocab_size()).to(args.device)
    sampler = Sampler(tokenizer, args.seed)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
    )
    schedule = [stage for stage in CURRICULUM for _ in range(int(stage.steps * args.scale))]
    first, began = resume(out, model, optimizer), time.monotonic()
    logged: list[dict[str, float]] = []
    for step in range(first, len(schedule)):
        sampler.rng.seed(args.seed * 1_000_003 + step)
        spent = (time.monotonic() - began) / 60
        if spent > args.minutes:
            break
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / 100) * max(0.02, rex(step / len(schedule)))
        ids, answer, text = (x.to(args.device) for x in sampler.batch(schedule[step]))
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            parts = loss_of(model, ids, answer, text)
        loss = parts["answer"] + TEXT_WEIGHT * parts["text"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        logged.append({k: v.item() for k, v in parts.items()})
        if (step + 1) % 50 == 0:
            means = {k: round(math.fsum(x[k] for x in logged) / len(logged), 4) for k in logged[0]}
            line = {"step": step + 1, "context": schedule[step].context, "minutes": round(spent, 1), **means}
            print(json.dumps(line), flush=True)
            logged.clear()
        if (step + 1) % 200 == 0:
            save(out, model, optimizer, step + 1)
    save(out, model, optimizer, step + 1)


def save(out: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, out / "checkpoint.pt.tmp")
    (out / "checkpoint.pt.tmp").replace(out / "checkpoint.pt")
    copy = build(model.config.vocab_size)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)


def resume(out: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bench/quality/model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--scale", type=float, default=1.0, help="stretches every stage's steps")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
