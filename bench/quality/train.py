"""Trains the small model that really retrieves (network.py). Plain PyTorch, seeded, resumable, CPU or CUDA.

    python bench/quality/train.py --minutes 100 --out bench/quality/model

The folder it writes loads in transformers as it is; checkpoint.pt in it is what the same command resumes from, and
training.json says what the weights have seen.

The curriculum follows what is known to work: facts asked back in their own words and copies first; filler, shorter
questions and longer contexts later. Every context is asked as much as fits, so that most tokens carry a signal, and
positions skip (PoSE, arXiv 2309.10400), so that short contexts teach long distances. One JSON line per 50 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from muon import Muon
from network import CONFIG, Model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from kvstrata.backend import processor
from kvstrata.quality.tasks import (
    ADJECTIVES,
    MARKS,
    NOUNS,
    ORDINALS,
    TOPICS,
    Part,
    World,
    chains,
    codes,
    count,
    digits,
    keys,
    marks,
    talk,
    values,
    weave,
    words,
)
from kvstrata.quality.text import lines

PEAK_RATE = 2e-3
MUON_RATE = 4e-3
WARMUP = 100
TEXT_WEIGHT = 0.1
"""Weight of the loss on real text beside the loss on answers."""
SKIPS = 6144
"""Positions of a context may reach so far beyond its length."""


FORMS = (("{n}", 8), ("{n} is", 9), ("The {n} is", 10), ("{k}", 9), ("{k} is", 10), ("The code of the {k} is", 14))
"""Verbatim facts, and their tokens."""


@dataclass(frozen=True)
class Stage:
    """At most so many steps of ``tokens`` tokens at a context length; shares of copies and verbatim facts, the rest are
    tasks; share of contexts whose positions skip. ``until``: the stage ends early once answers are so accurate.
    ``even``: chains and several values are asked nearly as often as codes, which are five questions of six otherwise.
    ``long``: twice as many chains in a context, because their one hard token, whether a chain goes on, is seldom asked."""

    steps: int
    tokens: int
    context: int
    copy: float
    verbatim: float
    skip: float
    until: float = 1.0
    even: bool = False
    long: bool = False


CURRICULUM = (
    Stage(400, 4096, 64, 0.30, 0.70, 0.0, until=0.95),
    Stage(400, 4096, 128, 0.15, 0.85, 0.0, until=0.97),
    Stage(300, 4096, 256, 0.08, 0.30, 0.2, until=0.96),
    Stage(1000, 4096, 256, 0.05, 0.05, 0.5, until=0.98),
    Stage(600, 8192, 512, 0.03, 0.02, 0.5, until=0.99),
    Stage(400, 8192, 1024, 0.02, 0.0, 0.4, until=0.993),
    Stage(400, 8192, 2048, 0.02, 0.0, 0.3),
    Stage(350, 8192, 1024, 0.0, 0.0, 0.4, even=True),
    Stage(150, 8192, 2048, 0.0, 0.0, 0.3, even=True),
    Stage(250, 8192, 1024, 0.0, 0.0, 0.4, even=True, long=True),
    Stage(150, 8192, 2048, 0.0, 0.0, 0.3, even=True, long=True),
)


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE, digits single, on real text and the words of the tasks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n| ?[A-Za-z]+| +|[^\sA-Za-z\d]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*lines("train"), *(words().splitlines(keepends=True) * 20)], trainer)
    return tokenizer


def rex(t: float) -> float:
    """REX profile (arXiv 2107.04197): z / (1/2 + z/2), z = 1 - t."""
    z = 1.0 - t
    return z / (0.5 + 0.5 * z)


class Sampler:
    """Token sequences with a kind per token: 2 where an answer or a copy is predicted, 1 on text, 0 elsewhere."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.world = World(lines("train"), lambda text: len(tokenizer.encode(text).ids))
        self.rng = random.Random(seed)
        self.nouns = NOUNS + [noun for topic in TOPICS.values() for noun in topic]
        said = [f" {w}" for w in (*ADJECTIVES, *self.nouns, *MARKS, *ORDINALS)] + list("0123456789")
        self.copied = [self.encode(w)[0] for w in said]

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """ids i64 [B, T], kinds i64 [B, T], positions i64 [B, T]."""
        n, context = stage.tokens // stage.context, stage.context
        ids, kinds = torch.zeros(2, n, context, dtype=torch.int64)
        positions = torch.arange(context).repeat(n, 1)
        for b in range(n):
            tokens, kind = self.sample(stage)
            used = min(len(tokens), context - 1)
            ids[b, 1 : 1 + used] = torch.tensor(tokens[:used])
            kinds[b, 1 : 1 + used] = torch.tensor(kind[:used])
            if self.rng.random() < stage.skip:
                for _ in range(self.rng.randint(1, 3)):
                    positions[b, self.rng.randrange(context) :] += self.rng.randrange(SKIPS // 3)
        return ids, kinds, positions

    def sample(self, stage: Stage) -> tuple[list[int], list[int]]:
        u = self.rng.random()
        if u < stage.copy:
            return self.copy(stage.context)
        if u < stage.copy + stage.verbatim:
            return self.verbatim(stage.context)
        return self.task(stage)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def copy(self, context: int) -> tuple[list[int], list[int]]:
        """A random segment of the tasks' own words and digits, then the same again and again.

        Often of few different tokens, so that the token before does not tell the next one, only several do: without
        that, the lookup stops at one token, and never tells the facts' keys apart.
        """
        n = self.rng.randint(6, min(128, (context - 1) // 2))
        alphabet = self.rng.sample(self.copied, round(math.exp(self.rng.uniform(math.log(3), math.log(64)))))
        first = [self.rng.choice(alphabet) for _ in range(n)]
        times = -(-(context - 1) // n)
        return first * times, [0] * n + [2] * n * (times - 1)

    def verbatim(self, context: int) -> tuple[list[int], list[int]]:
        """Facts, then some of them again, word for word; the shorter the form, the nearer the key to its value."""
        form, size = self.rng.choice(FORMS)
        nouns = self.rng.sample(self.nouns, max(2, min(len(self.nouns), context // (2 * size + 4))))
        names = keys(self.rng, len(nouns), self.nouns) if "{k}" in form else nouns
        facts = [(form.format(k=k, n=k), f" {digits(self.rng)}.\n") for k in names]
        ids = self.encode("".join(a + b for a, b in facts))
        kinds = [0] * len(ids)
        while len(ids) < context - 1:
            self.rng.shuffle(facts)
            for stem, value in facts:
                a, b = self.encode(stem), self.encode(value)
                ids, kinds = ids + a + b, kinds + [0] * len(a) + [2] * len(b)
        return ids, kinds

    def task(self, stage: Stage) -> tuple[list[int], list[int]]:
        """Contexts, each with its questions, until ``context`` tokens are full; mostly one."""
        ids, kinds = self.asked(stage.context, stage)
        while stage.context - len(ids) > 96:
            more, more_kinds = self.asked(stage.context - len(ids), stage)
            ids, kinds = ids + more, kinds + more_kinds
        return ids, kinds

    def asked(self, context: int, stage: Stage) -> tuple[list[int], list[int]]:
        """A talk, or facts of several tasks in filler; then each question once, while there is room."""
        room = int(context * self.rng.choice((0.5, 0.65, 0.8)))
        if self.rng.random() < (0.1 if stage.even else 0.25):
            part = talk(self.rng, room, self.world)
            text = "".join(part.facts)
        else:
            part = self.mixed(room, stage)
            text = weave(self.rng, room, part.facts, self.world)
        ids = self.encode(text)
        kinds = [1] * len(ids)
        self.rng.shuffle(part.asks)
        for question, answer in part.asks:
            q, a = self.encode(question), self.encode(f" {answer}\n")
            ids, kinds = ids + q + a, kinds + [0] * len(q) + [2] * len(a)
            if len(ids) >= context - 1:
                break
        return ids, kinds

    def mixed(self, room: int, stage: Stage) -> Part:
        """Facts of one to three tasks under different names; never more than two thirds of ``room``."""
        facts: list[str] = []
        asks: list[tuple[str, str]] = []
        n = max(2, min(2 * count(room), int(count(room) * self.rng.uniform(0.5, 3.0))))
        names = keys(self.rng, 4 * n + 8)
        chained = 4 * max(1, n // (2 if stage.long else 4))
        makers = [
            lambda: codes(self.rng, names[:n]),
            lambda: codes(self.rng, names[:n]),
            lambda: values(self.rng, names[n : n + max(1, n // 3)]),
            lambda: chains(self.rng, names[-chained:]),
            lambda: marks(self.rng, min(96, 4 * n)),
        ]
        makers = [*makers[1:], *makers[2:4], makers[3]] if stage.even else makers
        for make in self.rng.sample(makers, self.rng.randint(1, 2)):
            part = make()
            if sum(map(self.world.tokens, facts + part.facts)) <= 2 * room // 3 or not facts:
                facts, asks = facts + part.facts, asks + part.asks
        self.rng.shuffle(facts)
        return Part(facts, asks)


def optimizers_of(model: Model) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    return [
        Muon(hidden, MUON_RATE),
        torch.optim.AdamW(rest, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def loss_of(
    model: Model, ids: Tensor, kinds: Tensor, positions: Tensor, windows: Sequence[int | None] | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The weighted loss, and what is logged: losses on answers and text, accuracy of answer tokens. windows: of layers."""
    target, kind = ids[:, 1:], kinds[:, 1:]
    where = F.pad(kind > 0, (0, 1))
    logits = model(ids, positions, where, windows)
    target, kind = target[kind > 0], kind[kind > 0]
    each = F.cross_entropy(logits, target, reduction="none")
    answer, text = kind == 2, kind == 1
    on_answer, on_text = (each[m].sum() / m.sum().clamp_min(1) for m in (answer, text))
    right = (logits[answer].argmax(-1) == target[answer]).float().mean()
    return on_answer + TEXT_WEIGHT * on_text, {
        "answer": on_answer.item(),
        "text": on_text.item(),
        "accuracy": right.item(),
    }


def train(args: argparse.Namespace) -> None:
    logging.disable_progress_bar()  # saving would draw one among the lines of the log
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(kept)) if kept.exists() else train_tokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>").save_pretrained(out)
    model = Model().to(args.device)
    sampler = Sampler(tokenizer, args.seed)
    state = State(model, optimizers_of(model))
    state.resume(out)
    before, began, logged = state.minutes, time.monotonic(), list[dict[str, float]]()
    total = sum(stage.steps for stage in CURRICULUM)
    fast = args.device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    while state.stage < len(CURRICULUM) and (spent := (time.monotonic() - began) / 60) < args.minutes:
        state.minutes = before + spent
        stage = CURRICULUM[state.stage]
        sampler.rng.seed(args.seed * 1_000_003 + state.step)
        done = sum(s.steps for s in CURRICULUM[: state.stage]) + state.in_stage
        rate = min(1.0, (state.step + 1) / WARMUP) * max(0.02, rex(done / total))
        batch = [x.to(args.device) for x in sampler.batch(stage)]
        with torch.autocast(args.device, torch.bfloat16, enabled=fast):
            loss, parts = loss_of(model, *batch)
        state.update(loss, rate)
        logged.append(parts)
        if state.step % 50 == 0:
            means = {k: round(math.fsum(x[k] for x in logged) / len(logged), 4) for k in parts}
            line = {"step": state.step, "context": stage.context, "minutes": round(state.minutes, 1), **means}
            print(json.dumps(line), flush=True)
            logged.clear()
            state.advance(means["accuracy"])
            state.save(out)
            tell(state, args, fast, out)
    state.save(out)
    tell(state, args, fast, out)


def tell(state: State, args: argparse.Namespace, fast: bool, out: Path) -> None:
    """training.json: what the weights beside it have seen, and on what machine."""
    spent = [{**asdict(stage), "done": done} for stage, done in zip(CURRICULUM, state.done, strict=True)]
    told = {
        "steps": state.step,
        "tokens": sum(stage.tokens * done for stage, done in zip(CURRICULUM, state.done, strict=True)),
        "minutes": round(state.minutes, 1),
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "arithmetic": "bf16 autocast" if fast else "f32",
        "torch": torch.__version__,
        "stages": spent,
    }
    if sum(state.done) != state.step:  # resumed from a checkpoint that did not count its stages
        told |= {"tokens": None, "stages": None}
    (out / "training.json").write_text(json.dumps(told, indent=1) + "\n")


def save_weights(model: Model, out: Path) -> None:
    """The model as transformers loads it (bf16)."""
    copy = LlamaForCausalLM(CONFIG)
    copy.model.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)


@dataclass
class State:
    """What a run resumes from: weights, optimizers, step, stage, steps done in it; steps of each stage, minutes."""

    model: Model
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    stage: int = 0
    in_stage: int = 0
    done: list[int] = field(default_factory=lambda: [0] * len(CURRICULUM))
    minutes: float = 0.0

    def update(self, loss: Tensor, rate: float) -> None:
        """One step at a share of the peak rates."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, (MUON_RATE, PEAK_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
        self.step += 1
        self.in_stage += 1
        self.done[self.stage] += 1

    def advance(self, accuracy: float) -> None:
        """To the next stage, where this one has done its steps or reached its accuracy."""
        stage = CURRICULUM[self.stage]
        if self.in_stage >= stage.steps or accuracy >= stage.until:
            self.stage, self.in_stage = self.stage + 1, 0

    def save(self, out: Path) -> None:
        """The checkpoint to resume from, and the model as transformers loads it (bf16)."""
        held = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        held |= {"at": (self.step, self.stage, self.in_stage), "done": self.done, "minutes": self.minutes}
        torch.save(held, out / "checkpoint.pt.tmp")
        (out / "checkpoint.pt.tmp").replace(out / "checkpoint.pt")
        save_weights(self.model, out)

    def resume(self, out: Path) -> None:
        path = out / "checkpoint.pt"
        if path.exists():
            held = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(held["model"])
            for optimizer, state in zip(self.optimizers, held["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step, self.stage, self.in_stage = held["at"]
            self.done, self.minutes = held.get("done", self.done), held.get("minutes", self.minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bench/quality/model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
