r"""Answers the questions of JSONL prompts from a cache that a kvpress press has cut, and writes JSONL.

    bench/quality/peers/setup.sh
    bench/quality/peers/.venv/bin/python bench/quality/peers/kvpress_run.py \
        --model bench/quality/model --prompts prompts.jsonl --out snapkv.jsonl --press SnapKV --ratio 0.75

A prompt: {"id": str, "context": [token], "questions": [[token]], "most": [int], "stop": [token], "aware": bool}.
The context is prefilled under the press, which removes the share ``ratio``; with "aware" the first question belongs to
that prefill, so that the press sees it and, as in every cut after a dense prefill, the first answer token is the dense
one. Everything later is fed without the press and stays in the cache: context, question, answer, stop token, question,
and so on. The token decoded last is fed at the head of the next question. An answer ends before a token of "stop", or
after ``most[i]`` tokens.

A row of the output, appended and flushed prompt by prompt; a second run goes on after the last whole row:
  id, press, ratio, dtype
  answers     [[token]], one per question, without the stop token
  bytes       of the storages of all cached keys and values at the end
  kept_bytes  the same without the slots that the press masks and does not free (AdaKV, KVzip)
  peak_bytes  the largest sum of cache storages seen: a layer that grows holds its old keys beside the new ones, and a
              layer that is cut holds the dense beside the cut tensors; activations and scores are not in it
  decoded     tokens decoded, stop tokens included
  ms          for each token decoded by a step of its own: the first of an answer comes out of its question's step
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

Press = Callable[[Any], AbstractContextManager[Any]]
"""What a press is to us: called with a model, it gives the context in which a prefill is cut."""

# Name -> press, from the kvpress module and the share to remove. Parameters are kvpress's own defaults.
PRESSES: dict[str, Callable[[Any, float], Press]] = {
    "Dense": lambda kv, ratio: nullcontext,
    "Random": lambda kv, ratio: kv.RandomPress(ratio),
    "StreamingLLM": lambda kv, ratio: kv.StreamingLLMPress(ratio),
    "Knorm": lambda kv, ratio: kv.KnormPress(ratio),
    "KeyDiff": lambda kv, ratio: kv.KeyDiffPress(ratio),
    "TOVA": lambda kv, ratio: kv.TOVAPress(ratio),
    "SnapKV": lambda kv, ratio: kv.SnapKVPress(ratio),
    "ExpectedAttention": lambda kv, ratio: kv.ExpectedAttentionPress(ratio),
    # These two and KVzip mask what they evict, head by head: the cache stays dense, see kept_bytes.
    "AdaKV": lambda kv, ratio: kv.AdaKVPress(kv.ExpectedAttentionPress(ratio)),
    "AdaSnapKV": lambda kv, ratio: kv.AdaKVPress(kv.SnapKVPress(ratio)),
    "KVzip": lambda kv, ratio: kv.KVzipPress(ratio),  # reads the context a second time, in order to score it
}


@dataclass(frozen=True)
class Prompt:
    """One context and its questions, all of them token ids."""

    id: str
    context: list[int]
    questions: list[list[int]]
    most: list[int]
    stop: list[int]
    aware: bool = False

    def __post_init__(self) -> None:
        if not self.context or not self.questions or not all(self.questions):
            raise ValueError("context and questions hold at least one token each")
        if len(self.most) != len(self.questions) or min(self.most) < 1:
            raise ValueError(f"most: {len(self.questions)} numbers from 1 expected, got {self.most}")


class WatchedCache(DynamicCache):
    """A DynamicCache that counts its storages, and their peak over growing and over being cut."""

    peak_bytes = 0
    _grown: tuple[int, int] | None = None  # layer that grew last, its bytes then

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As stock; (B, H, N, D) both."""
        self.settle()
        before = self.nbytes()
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        # Old keys live until the new ones are whole.
        self.peak_bytes = max(self.peak_bytes, before + k.nbytes, self.nbytes())
        self._grown = layer_idx, self.nbytes(layer_idx)
        return k, v

    def settle(self) -> None:
        """Counts the cut, if there was one, of the layer that grew last: dense and cut tensors were there at once."""
        if self._grown is not None and self.nbytes(self._grown[0]) < self._grown[1]:
            self.peak_bytes = max(self.peak_bytes, self.nbytes() + self._grown[1])
        self._grown = None

    def nbytes(self, layer: int | None = None) -> int:
        """Bytes of the storages of one layer, or of all. A view counts as the storage that it keeps alive."""
        layers = self.layers if layer is None else [self.layers[layer]]
        tensors = [t for one in layers for t in (getattr(one, "keys", None), getattr(one, "values", None))]
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@dataclass
class Feed:
    """One sequence on its way through a model: its cache, and how many tokens it has really seen."""

    model: Any
    cache: WatchedCache = field(default_factory=WatchedCache)
    seen: int = 0

    def __call__(self, tokens: Sequence[int]) -> int:
        """Feeds T tokens at their logical positions; the best next token.

        Only position_ids are given, as kvpress's pipeline does: RoPE takes the logical positions, and the causal mask
        is made from the length of the cache. Logical cache positions would let a question see its own future.
        """
        ids = torch.tensor([list(tokens)], device=self.model.device)
        places = torch.arange(self.seen, self.seen + len(tokens), device=self.model.device)[None]
        out = self.model(input_ids=ids, position_ids=places, past_key_values=self.cache, logits_to_keep=1)
        self.seen += len(tokens)
        return int(out.logits[0, -1].argmax())


def masked_bytes(model: Any, cache: WatchedCache) -> int:
    """Bytes of the slots that a press hides and does not free."""
    total = 0
    for module in model.modules():
        places = getattr(module, "masked_key_indices", None)  # (batch, head, slot) of each
        if places is not None:
            layer = cache.layers[module.layer_idx]
            total += len(places[-1]) * (layer.keys[0, 0, 0].nbytes + layer.values[0, 0, 0].nbytes)
    return total


@torch.no_grad()
def answer(model: Any, prompt: Prompt, press: Press) -> dict[str, Any]:
    """One row of the output, without the names of the run."""
    torch.manual_seed(zlib.crc32(prompt.id.encode()))  # Random evicts the same, resumed or not
    feed = Feed(model)
    answers: list[list[int]] = []
    ms: list[float] = []
    decoded = 0
    with press(model):
        best = feed(prompt.context + (prompt.questions[0] if prompt.aware else []))
    feed.cache.settle()
    pending: list[int] = []
    for i, (question, most) in enumerate(zip(prompt.questions, prompt.most, strict=True)):
        if i > 0 or not prompt.aware:
            best = feed(pending + question)
        said: list[int] = []
        decoded += 1
        while best not in prompt.stop:
            said.append(best)
            if len(said) == most:
                break
            start = time.perf_counter()
            best = feed([best])
            ms.append(round(1e3 * (time.perf_counter() - start), 4))
            decoded += 1
        pending = [best]
        answers.append(said)
    held = feed.cache.nbytes()
    kept = held - masked_bytes(model, feed.cache)
    peak = feed.cache.peak_bytes
    return {
        "id": prompt.id, "answers": answers, "bytes": held, "kept_bytes": kept, "peak_bytes": peak,
        "decoded": decoded, "ms": ms,
    }  # fmt: skip


def read_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of a JSONL file. ValueError with the number of a malformed line."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                yield Prompt(**json.loads(line))
            except (ValueError, TypeError) as e:
                raise ValueError(f"{path.name}, line {number}: {e}") from e


def finished(path: Path, names: dict[str, Any]) -> set[str]:
    """Ids that a file of rows already holds; what follows its last whole row is cut off, so that rows can be appended.

    names: fields that every row must share with this run. ValueError where one differs, or a row is malformed.
    """
    if not path.exists():
        return set()
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    done: set[str] = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            theirs = {name: row[name] for name in names}
            done.add(row["id"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path.name}, line {number} is not a row of this script: {e!r}") from e
        if theirs != names:
            raise ValueError(f"{path.name}, line {number} is of another run: {theirs}, this one is {names}")
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return done


def write_rows(
    model: Any, prompts: Sequence[Prompt], out: Path, make: Callable[[], Press], names: dict[str, Any]
) -> int:
    """Appends the rows that are still missing; how many. make: a fresh press, one per prompt, since some keep state."""
    done = finished(out, names)
    left = [prompt for prompt in prompts if prompt.id not in done]
    with out.open("a") as file:
        for prompt in left:
            try:
                row = answer(model, prompt, make())
            except Exception as e:  # whatever a press raises: the reader wants to know where
                raise RuntimeError(f"prompt {prompt.id}: {type(e).__name__}: {e}") from e
            file.write(json.dumps({**row, **names}) + "\n")
            file.flush()
    return len(left)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    parser.add_argument("--press", required=True, choices=list(PRESSES))
    parser.add_argument(
        "--ratio", required=True, type=float, help="share of the context's tokens to remove, 0 to below 1"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip warns at every prompt that it is slow
    names = {"press": args.press, "ratio": args.ratio, "dtype": args.dtype}
    try:
        kvpress = None if args.press == "Dense" else importlib.import_module("kvpress")
        prompts = list(read_prompts(args.prompts))
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=getattr(torch, args.dtype), local_files_only=True
        ).eval()
        made = write_rows(model, prompts, args.out, lambda: PRESSES[args.press](kvpress, args.ratio), names)
    except ModuleNotFoundError as e:
        print(f"kvpress_run: {e}: run bench/quality/peers/setup.sh, then its .venv/bin/python", file=sys.stderr)
        return 1
    except Exception as e:  # one line for the harness that called us; the traceback is of foreign code
        print(f"kvpress_run: {args.press} at {args.ratio}: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    print(f"{args.press} at {args.ratio}: {made} prompts answered, {len(prompts) - made} were there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
