"""Long talks under a fifth of the dense bytes: ``epicache`` and its parts beside eviction, questions unseen while it is read.

    python bench/quality/episodes.py --n 60 --out bench/results/cpu/episodes

Task ``conversation``: turns on four to eight topics, facts, corrections; one fact is asked. Every contender reads the talk in
blocks of C tokens and holds at most the budget, all of its bytes; private sets that are not read are Far, and said beside.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from published import Section, publish
from torch import Tensor

from kvstrata.budget import Budget
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output
from kvstrata.episodes import Embedder, InputEmbedding, MiniLM, Router, Turn
from kvstrata.episodes.history import History, Segments
from kvstrata.episodes.limits import sizes_of
from kvstrata.episodes.store import EpisodeStore
from kvstrata.hf.cache import KVCache
from kvstrata.hf.chat_model import HfChatModel, chat_model
from kvstrata.hf.load import load
from kvstrata.policy import Policy, full, h2o, keydiff, snapkv, streaming
from kvstrata.quality.lexical import HashedWords
from kvstrata.quality.measure import Subject, Tokens, judged
from kvstrata.quality.reader import Reader
from kvstrata.quality.run import prepared
from kvstrata.quality.tasks import EVAL_SEEDS, World, conversation
from kvstrata.report import Report

Found = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """How a talk is read and a question answered. prompt: "topics", or "question", the true one; routing: "router", "random",
    or "all", where every episode's set is read; separate: one cache for each episode, as the paper has them."""

    what: str
    episodes: int = 4
    prompt: str = "topics"
    routing: str = "router"
    separate: bool = False
    sizes: tuple[tuple[str, Any], ...] = ()


OURS: dict[str, Any] = {
    "prompts": "reconstruct",
    "heads": "model",
    "kernel": 1,
    "private": "int8",
    "common": "int8",
    "share": 0.75,
    "head_cap": 2.0,
}


def ours(what: str, episodes: int = 4, routing: str = "router", **other: Any) -> Way:
    """The text again as prompt, one budget for all layers, int8, but for what is given."""
    return Way(what, episodes, routing=routing, sizes=tuple((OURS | other).items()))


WAYS = {
    "epicache": ours("text again, one budget for all layers, int8"),
    "random routing": ours("so, an episode by lot", routing="random"),
    "one episode": ours("so, without topics", 1),
    "heads by layer": ours("so, a budget for each layer", heads="pair"),
    "uniform heads": ours("so, every head as many tokens", heads="uniform"),
    "full precision": ours("so, nothing quantized", private="full", common="full"),
    "representatives": Way("windows of a topic as its prompt (paper)"),
    "representatives int8": Way("so, as int8", sizes=(("private", "int8"), ("common", "int8"))),
    "true question": Way("the true question is the prompt", 1, "question"),
    "question for all": Way("so, of every episode", 4, "question"),
    "separate": Way("a cache for each episode (paper)", separate=True),
}
POLICIES: dict[str, tuple[str, Callable[..., Policy]]] = {
    "full": ("all tokens", full),
    "streaming": ("sinks and window", streaming),
    "snapkv": ("what the last queries attend to", snapkv),
    "h2o": ("accumulated mass", h2o),
    "keydiff": ("key diversity", keydiff),
}


@dataclass
class Bench:
    """What all contenders share."""

    chat: HfChatModel
    subject: Subject
    embedder: Embedder
    share: float
    chunk: int
    recent: int
    prompt: int
    representatives: int

    def budget(self, tokens: Tokens) -> int:
        """Bytes that a contender may hold."""
        return int(self.share * tokens.total * self.chat.shape.token_bytes())


def turns_of(context: str) -> list[Turn]:
    """The talk as turns: one for each line."""
    return [Turn(*line.split(": ", 1)) for line in context.splitlines() if ": " in line]


def offsets_of(bench: Bench, turns: Sequence[Turn], tokens: int) -> Tensor:
    """Where the tokens of each line begin, and end: i64 [n + 1]."""
    lengths = [len(bench.chat.plain(f"{t.speaker}: {t.text}\n")) for t in turns]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    assert int(offsets[-1]) <= tokens
    return offsets + tokens - offsets[-1]


def policy_answer(bench: Bench, name: str, tokens: Tokens, seed: int) -> Found:
    """A policy of the cache, cut in blocks of C tokens."""
    del seed
    policy, budget = POLICIES[name][1](), None
    if name != "full":
        policy = replace(policy, chunk=max(64, bench.chunk))
        budget = f"{bench.budget(tokens)}B"
    cache = KVCache.for_model(bench.subject.model, policy=policy, budget=budget)
    reader = Reader(bench.subject.model, cache, bench.subject.stops)
    reader.read(tokens.context)
    reader.compress()
    answer = reader.answer(reader.read(tokens.questions[0]), tokens.most[0])
    return found(bench, answer, tokens, cache.report(), 0)


def found(bench: Bench, answer: list[int], tokens: Tokens, report: Report, far: int) -> Found:
    dense = tokens.total * bench.chat.shape.token_bytes()
    held = {"peak": report.peak_bytes / dense, "far": far / dense}
    return {"score": judged(bench.subject, [answer], tokens.example)["scores"][0]} | held


def way_answer(bench: Bench, name: str, tokens: Tokens, seed: int) -> Found:
    """Episodes over a store of the same bytes."""
    way = WAYS[name]
    how = Segments(episodes=way.episodes, representatives=bench.representatives)
    question = tokens.example.questions[0]
    turns = turns_of(tokens.example.context)
    history = History().said(turns, how, offsets_of(bench, turns, len(tokens.context)))
    history = history.grouped(how, bench.embedder, bench.chat.plain, bench.prompt)
    prompts = list(history.prompts)
    if way.prompt == "question":
        prompts = [torch.tensor(tokens.questions[0])] * way.episodes
    options = {"recent": bench.recent, "episodes": max(2, way.episodes)} | dict(way.sizes)
    sizes = sizes_of(
        Budget.bytes(bench.budget(tokens)), bench.chat.shape, chunk=bench.chunk, prompt=bench.prompt, **options
    )
    route = history.route(question, how, Router(), bench.embedder, None)
    assert route is not None
    chosen = route.episodes if way.routing == "router" else (random.Random(seed).randrange(len(prompts)),)
    if way.separate:
        prompts, chosen = [prompts[chosen[0]]], (0,)  # the cache that the question goes to
    places = history.places()
    store = EpisodeStore(bench.chat, sizes, lambda: places if sizes.prompts == "reconstruct" else prompts)
    store.read(torch.tensor(tokens.context))
    if not store.compactions:
        store.compact()
    store.show(chosen)
    store.make_room(len(tokens.questions[0]) + tokens.most[0])
    answer = greedy(store, torch.tensor(tokens.questions[0]), tokens.most[0], bench.subject.stops)
    report = store.cache.report()
    return found(bench, answer, tokens, report, report.far_bytes) | {"B": sizes.budget}


def greedy(store: EpisodeStore, ids: Tensor, most: int, stops: frozenset[int]) -> list[int]:
    logits, out = store.read(ids, logits=True), list[int]()
    while logits is not None and len(out) < most and (token := int(logits.argmax())) not in stops:
        out.append(token)
        logits = store.read(torch.tensor([token]), logits=True)
    return out


def interval(scores: Sequence[int], draws: int = 2000) -> str:
    """95 % of means of samples of the examples, in per cent."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(scores, k=len(scores))) for _ in range(draws))
    return f"{100 * means[int(0.025 * draws)]:.1f} to {100 * means[int(0.975 * draws)]:.1f}"


def embedder_of(name: str, chat: HfChatModel) -> Embedder:
    if name == "minilm":
        return MiniLM()
    return HashedWords() if name == "hashed" else InputEmbedding(chat.embeddings, chat.plain)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bench/quality/model")
    parser.add_argument("--length", type=positive, default=2048)
    parser.add_argument("--n", type=positive, default=60, help="talks per seed")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--share", type=float, default=0.2, help="of the dense bytes")
    parser.add_argument("--chunk", type=positive, default=32)
    parser.add_argument("--recent", type=positive, default=16)
    parser.add_argument("--prompt", type=positive, default=256, help="tokens of a patched prompt")
    parser.add_argument("--representatives", type=positive, default=8, help="windows of a prompt")
    parser.add_argument("--embedder", choices=("minilm", "input", "hashed"), default="minilm")
    parser.add_argument("--contenders", default=",".join([*POLICIES, *WAYS]), metavar="C,..")
    parser.add_argument("--out", type=Path, metavar="STEM", help="writes STEM.md and STEM.json")
    return parser.parse_args()


def main() -> int:
    args, out = arguments(), Output(json=False)
    names = [name.strip() for name in args.contenders.split(",")]
    if unknown := [name for name in names if name not in POLICIES and name not in WAYS]:
        return out.fail(f"contenders: {unknown[0]!r} is unknown, expected some of {', '.join([*POLICIES, *WAYS])}")
    model, tokenizer = load(args.model, "auto")
    subject, world = prepared(model, tokenizer)
    chat = chat_model(model, tokenizer, style="transcript")
    bench = Bench(
        chat,
        subject,
        embedder_of(args.embedder, chat),
        args.share,
        args.chunk,
        args.recent,
        args.prompt,
        args.representatives,
    )
    rows = measured(bench, names, args, world, out)
    body = []
    for name in names:
        mine = rows[name]
        scores = [r["score"] for r in mine]
        relative = (
            fmean(scores) / max(1e-9, fmean(r["score"] for r in rows["full"])) if "full" in rows else float("nan")
        )
        what = POLICIES[name][0] if name in POLICIES else WAYS[name].what
        tokens = f"{fmean(r['B'] for r in mine):.0f}" if "B" in mine[0] else "-"
        shares = (f"{100 * max(r[key] for r in mine):.1f}" for key in ("peak", "far"))
        body.append([name, what, f"{100 * fmean(scores):.1f}", interval(scores), f"{relative:.3f}", tokens, *shares])
    said = (
        f"Exact match in per cent, {args.seeds} x {args.n} talks (seeds x n) of {args.length} tokens, query-agnostic; the share"
        " of `full`; B, tokens that a question sees; the most bytes Near, and Far, in per cent of the dense cache's."
    )
    header = ["contender", "what", "answers", "interval", "of full", "B", "peak", "far"]
    publish(out, "Long talks under a fixed budget", args, rows, [Section("Talks", said, header, body)])
    return 0


def measured(
    bench: Bench, names: list[str], args: argparse.Namespace, world: World, out: Output
) -> dict[str, list[Found]]:
    rows: dict[str, list[Found]] = {name: [] for name in names}
    with out.progress("talks", args.seeds * args.n) as advance, torch.inference_mode():
        for seed in range(args.seeds):
            for index in range(args.n):
                example = conversation(args.length, EVAL_SEEDS + seed * 1_000_003 + index, world)
                tokens = bench.subject.tokens(example)
                for name in names:
                    answer = partial(policy_answer if name in POLICIES else way_answer, bench, name)
                    rows[name].append(answer(tokens, seed * args.n + index))
                advance(f"seed {seed}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
