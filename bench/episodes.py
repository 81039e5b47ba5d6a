"""What a conversation costs in time: a shared build beside the paper's separate caches and a whole cache, in one run.

    python bench/episodes.py --out bench/results/cpu/episodes-time

A Llama of random weights reads N = 16 B tokens in chunks of C, and is compacted for E episodes by prompts of W tokens:

shared     one forward of a chunk and E prompts, a backbone and E private sets
again      the text once more as prompt, which is what a conversation does unless it is told otherwise
separate   E guided reads, a cache of B tokens each (paper)
whole      every token kept, read in the same chunks

Ready: seconds until all is read and compacted. Answer: a question of 32 tokens and 32 more, one by one, under one episode's
view, at 4 B and at 16 B; the two caches take turns by token. Questions: so many until what was read for them has taken less
than reading all anew for each ("reading again"), or than a whole cache that is kept ("keeping all"), answers included.
Prompts and episodes are random; embedding and clustering are not in it. Medians over --reps, ways taking turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "quality"))
from published import Section, publish

from kvstrata import Cache
from kvstrata.cli.generate import positive
from kvstrata.cli.output import Output
from kvstrata.cli.text import ByteTokenizer
from kvstrata.episodes.limits import Sizes
from kvstrata.episodes.places import Places
from kvstrata.episodes.separate import opened
from kvstrata.episodes.store import EpisodeStore
from kvstrata.hf.chat_model import chat_model
from kvstrata.hf.load import random_llama

ASKED, TOLD = 32, 32
"""Tokens of a question, and of its answer."""
EARLY, LATE = 4, 16
"""Tokens that were read, in budgets."""
WAYS = ("shared", "again", "separate", "whole")
Clock = Callable[[], float]
Found = dict[str, float]


class Whole:
    """A cache that keeps every token, read in chunks."""

    moved_bytes = 0

    def __init__(self, model: Any, chunk: int) -> None:
        self._model, self._chunk, self.cache = model, chunk, Cache(model.shape)
        (self._seq,) = self.cache.new()

    def read(self, ids: Tensor, logits: bool = False) -> Tensor | None:
        out = None
        for part in ids.split(self._chunk):
            with self.cache.step([self._seq], [len(part)]) as step:
                out = self._model.forward(part, step.positions, step, "last" if logits else "none")
        return out

    def compact(self) -> None: ...

    def show(self, episodes: Sequence[int] | None) -> None: ...

    def make_room(self, tokens: int) -> None: ...


@dataclass
class Bench:
    """What all ways share."""

    model: Any
    args: argparse.Namespace
    clock: Clock
    ids: Tensor
    prompts: list[Tensor]
    places: Places
    kept: dict[str, list[Found]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def store(self, way: str) -> EpisodeStore | Whole:
        a = self.args
        if way == "whole":
            return Whole(self.model, a.chunk)
        options: dict[str, Any] = {"recent": a.recent, "episodes": a.episodes}
        if way == "again":
            options |= {"prompts": "reconstruct", "heads": "model", "kernel": 1}
        if way == "separate":
            options |= {"build": "separate", "far": False}
        sizes = Sizes(a.budget, a.chunk, min(512, a.chunk) if way == "again" else a.chunk // 4, **options)
        return opened(self.model, sizes, lambda: self.places if way == "again" else self.prompts)

    def timed(self, work: Callable[[], object]) -> float:
        began = self.clock()
        work()
        return self.clock() - began

    def built(self, way: str) -> tuple[EpisodeStore | Whole, Found]:
        """Read and compacted, with seconds."""
        store, b = self.store(way), self.args.budget
        parts = self.ids.split(b)
        took = [self.timed(lambda part=part: store.read(part)) for part in parts]  # type: ignore[misc]
        last = self.timed(store.compact)
        early, late = (statistics.median(took[n - 2 : n]) for n in (EARLY, LATE))
        return store, {"ready": sum(took) + last, "read_early": early / b, "read_late": late / b}

    def answered(self, stores: Sequence[EpisodeStore | Whole]) -> list[list[float]]:
        """Seconds of each token of an answer in each store, the question's first; the stores take turns."""
        for store in stores:
            store.make_room(ASKED + TOLD)
            store.show([0])
        question, token = self.ids[:ASKED], self.ids[:1]
        found = [[self.timed(lambda s=s: s.read(question, logits=True))] for s in stores]  # type: ignore[misc]
        for _ in range(TOLD):
            for times, store in zip(found, stores, strict=True):
                times.append(self.timed(lambda s=store: s.read(token, logits=True)))  # type: ignore[misc]
        return found

    def run(self, way: str) -> None:
        """One repetition."""
        early = self.store(way)
        early.read(self.ids[: EARLY * self.args.budget])
        early.compact()
        late, found = self.built(way)
        first, last = self.answered([early, late])
        report = late.cache.report()
        found |= {"token_early": statistics.median(first[1:]), "token_late": statistics.median(last[1:])}
        found |= {
            "answer": last[0] + TOLD * statistics.median(last[1:]),
            "near": report.nbytes,
            "peak": report.peak_bytes,
        }
        moved = late.moved_bytes
        found |= {"turn": self.timed(lambda: late.show([1])), "moved": late.moved_bytes - moved}
        self.kept[way].append(found)

    def of(self, way: str, name: str) -> float:
        return statistics.median(found[name] for found in self.kept[way])

    def ratio(self, way: str, name: str, other: str, of: str) -> float:
        """The median of ratios within one repetition."""
        pairs = zip(self.kept[way], self.kept[other], strict=True)
        return statistics.median(a[name] / b[of] for a, b in pairs)


def questions(bench: Bench, way: str) -> tuple[int, int | None]:
    """So many until a way has paid, beside reading all again for each, and beside keeping all; None: never."""
    ready, answer, whole, dense = (
        bench.of(w, name) for w, name in ((way, "ready"), (way, "answer"), ("whole", "ready"), ("whole", "answer"))
    )
    again = max(1, ceil(ready / (whole + dense - answer)))
    return again, ceil(max(0.0, ready - whole) / (dense - answer)) if dense > answer else None


def result(bench: Bench) -> dict[str, Any]:
    """The ratios that are asked for, and all medians."""
    rows = []
    for way in WAYS:
        row: dict[str, Any] = {"way": way} | {name: bench.of(way, name) for name in bench.kept[way][0]}
        row["ready_ratio"] = bench.ratio(way, "ready", "separate", "ready")
        row["token_ratio"] = bench.ratio(way, "token_late", way, "token_early")
        row["read_ratio"] = bench.ratio(way, "read_late", way, "read_early")
        row["reading_again"], row["keeping_all"] = questions(bench, way) if way != "whole" else (None, None)
        rows.append(row)
    return {"rows": rows, "repetitions": bench.kept}


def section(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[Section]:
    c = args.cpu_time
    said = (
        f"{args.layers} layers, width {args.hidden}, {args.dtype}; B = {args.budget}, C = {args.chunk}, W = {args.chunk // 4},"
        f" E = {args.episodes}, N = {LATE} B; {'seconds of this process on the CPU' if c else 'seconds'}, {args.threads}"
        " threads. x separate: time to ready beside that of separate caches, in one run. Later: ms per token at 16 B over those"
        " at 4 B, of an answer and of reading. Questions until it has paid: beside reading all again for each, and keeping all."
    )
    header = [
        "way",
        "ready, s",
        "x separate",
        "ms a token",
        "later",
        "ms a token read",
        "later",
        "again",
        "kept",
        "MiB",
    ]
    body = []
    for r in rows:
        paid = ["-" if n is None else f"{n:,}" for n in (r["reading_again"], r["keeping_all"])]
        times = [f"{1e3 * r['token_late']:.2f}", f"{r['token_ratio']:.2f}", f"{1e3 * r['read_late']:.2f}"]
        first = [r["way"], f"{r['ready']:.1f}", f"{r['ready_ratio']:.2f}"]
        body.append([*first, *times, f"{r['read_ratio']:.2f}", *paid, f"{r['near'] / 2**20:.1f}"])
    turned = [r for r in rows if r["way"] in ("shared", "again")]
    swaps = [[r["way"], f"{1e3 * r['turn']:.2f}", f"{r['moved'] / 2**20:.2f}"] for r in turned]
    return [
        Section("Reading and answering", said, header, body),
        Section(
            "Another episode", "Until its sets are Near: a copy that nothing hides.", ["way", "ms", "MiB moved"], swaps
        ),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("hidden", 512), ("heads", 8), ("kv-heads", 4), ("episodes", 4), ("reps", 3)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--budget", type=positive, default=1024, help="B")
    parser.add_argument("--chunk", type=positive, default=512, help="C")
    parser.add_argument("--recent", type=positive, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where others share the machine")
    parser.add_argument("--out", type=Path, metavar="STEM", help="writes STEM.md and STEM.json")
    parser.add_argument("--json", action="store_true", help="one object, and nothing else")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    out = Output(json=args.json)
    torch.set_num_threads(args.threads)
    length, draw = LATE * args.budget, torch.Generator().manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "vocab_size": 512}
    shape |= {"num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads}
    model = random_llama(0, max_position_embeddings=4 * length, **shape).to(getattr(torch, args.dtype))
    ids = torch.randint(4, 512, (length,), generator=draw)
    windows = torch.arange(0, length, 64)
    places = Places(windows, torch.randint(0, args.episodes, windows.shape, generator=draw).int(), args.episodes)
    prompts = [torch.randint(4, 512, (args.chunk // 4,), generator=draw) for _ in range(args.episodes)]
    clock = time.process_time if args.cpu_time else time.perf_counter
    bench = Bench(chat_model(model, ByteTokenizer(), style="transcript"), args, clock, ids, prompts, places)
    with out.progress("repetitions", args.reps * len(WAYS)) as advance, torch.inference_mode():
        for _ in range(args.reps):
            for way in WAYS:
                bench.run(way)
                advance(way)
    found = result(bench)
    if args.json:
        print(json.dumps({"schema": 1, "bench": "episodes", "case": vars(args) | {"out": str(args.out)}, **found}))
        return 0
    publish(out, "Conversations: time to ready, and to answer", args, found, section(found["rows"], args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
