"""A run: a folder with what was asked, one line per measurement, and what was made of them. Resumes where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from kvstrata.hf.load import load
from kvstrata.hf.patch import patch
from kvstrata.quality import MODES, jsonl, manifest, outside
from kvstrata.quality.contenders import Contender, line_up, missing
from kvstrata.quality.manifest import whole_lines
from kvstrata.quality.measure import Record, Subject, measure
from kvstrata.quality.tasks import EVAL_SEEDS, TASKS, Example, World
from kvstrata.quality.text import lines

RECORDS = "records.jsonl"
Key = tuple[str, int, int, str, str]
"""(task, length, index, contender, budget or "")."""


@dataclass(frozen=True)
class Config:
    """What a run is about: two runs of one configuration on one machine give the same records.

    tasks: names of the registry, or paths of JSONL files. lengths: tokens; 0 for a file's own. n: examples per task and
    length. dtype: of the model, "auto" as it was saved.
    """

    model: str
    tasks: tuple[str, ...]
    policies: tuple[str, ...]
    peers: tuple[str, ...]
    budgets: tuple[str, ...]
    lengths: tuple[int, ...]
    n: int
    seed: int = 0
    mode: str = "query-agnostic"
    dtype: str = "auto"
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: {self.mode!r} is unknown, expected one of {', '.join(MODES)}")
        for task in self.tasks:
            if task not in TASKS and not Path(task).is_file():
                raise ValueError(f"tasks: {task!r} is neither a file nor one of {', '.join(TASKS)}")
        if min(self.n, self.jobs) < 1 or min(self.lengths) < 128:
            raise ValueError(f"expected n >= 1, jobs >= 1, lengths >= 128, got {self.n}, {self.jobs}, {self.lengths}")
        self.contenders()

    def contenders(self) -> list[Contender]:
        return line_up(list(self.policies), list(self.peers), list(self.budgets))


@dataclass(frozen=True)
class Unit:
    """One example, and the contenders that have still to meet it."""

    task: str
    length: int
    index: int
    contenders: tuple[Contender, ...]


class Run:
    """The folder of a run.

    Records are appended line by line, each flushed; a line cut short by a kill is dropped and measured again.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        """ValueError if the folder holds a run of another configuration."""
        self.folder, self.config = folder, config
        self.complaints: list[str] = []
        manifest.settle(folder, json.loads(json.dumps(asdict(config))))
        self.records = load_records(folder)

    def examples(self) -> list[tuple[str, int, int]]:
        """(task, length, index) of every example of the run."""
        found = []
        for task in self.config.tasks:
            sizes = self.config.lengths if task in TASKS else (0,)
            count = self.config.n if task in TASKS else min(self.config.n, len(self._file(task)))
            found += [(task, length, i) for length in sizes for i in range(count)]
        return found

    def units(self) -> list[Unit]:
        """What is left to do, example by example, so that contenders stay comparable wherever a run stops."""
        inside = [c for c in self._present() if not c.outside]
        units = [Unit(*at, tuple(c for c in inside if key(*at, c) not in self.records)) for at in self.examples()]
        return [unit for unit in units if unit.contenders]

    def outside(self) -> list[Contender]:
        """Peers of other environments with something left to do."""
        at = self.examples()
        return [c for c in self._present() if c.outside and any(key(*a, c) not in self.records for a in at)]

    def work(self, done: Callable[[Unit], None]) -> None:
        """Measures what is left in this environment. ``done`` is called after each example."""
        for unit, found in _measured(self.config, self.units()):
            at = (unit.task, unit.length, unit.index)
            self._keep([(key(*at, c), record) for c, record in zip(unit.contenders, found, strict=True)])
            done(unit)

    def work_outside(self, contender: Contender) -> None:
        """Measures what is left of one peer of another environment; a complaint if it fails there."""
        asked, _ = subject(self.config.model, self.config.dtype)
        refused, prompts, examples = [], [], {}
        for at in self.examples():
            if key(*at, contender) in self.records:
                continue
            made = made_example(self.config, *at)
            if reason := outside.refusal(contender, made):
                refused.append((key(*at, contender), {"refused": reason}))
            else:
                name = json.dumps(at)
                examples[name] = asked.tokens(made)
                prompts.append(outside.prompt(asked, name, examples[name], self.config.mode))
        self._keep(refused)
        dtype = str(asked.model.dtype).removeprefix("torch.")
        rows = outside.answered(contender, self.config.model, dtype, prompts, self.folder / "outside")
        try:
            for name, row in rows:
                task, length, index = json.loads(name)
                self._keep([(key(task, length, index, contender), outside.record(asked, examples[name], row))])
        except RuntimeError as error:
            self._complain(str(error))

    def _keep(self, found: Iterable[tuple[Key, Record]]) -> None:
        with (self.folder / RECORDS).open("a", encoding="utf-8") as file:
            for at, record in found:
                self.records[at] = record
                file.write(json.dumps({"key": at, **record}) + "\n")

    def _present(self) -> list[Contender]:
        """The contenders that can run here; a complaint for each other."""
        present = []
        for c in self.config.contenders():
            reason = outside.missing() if c.outside else missing(c.name)
            if reason is None:
                present.append(c)
            else:
                self._complain(f"{c.name}: {reason}")
        return present

    def _file(self, task: str) -> list[Example]:
        examples, complaints = own_examples(task)
        self._complain(*complaints)
        return examples

    def _complain(self, *complaints: str) -> None:
        self.complaints = sorted({*self.complaints, *complaints})


def key(task: str, length: int, index: int, contender: Contender) -> Key:
    return task, length, index, contender.name, contender.budget or ""


def load_records(folder: Path) -> dict[Key, Record]:
    """The records of a folder by key; a line that a kill cut short is cut off the file."""
    found: dict[Key, Record] = {}
    for line in whole_lines(folder / RECORDS):
        record = json.loads(line)
        task, length, index, name, budget = record.pop("key")
        found[task, length, index, name, budget] = record
    return found


# --- Workers ----------------------------------------------------------------------------------------------------------


def _measured(config: Config, units: list[Unit]) -> Iterator[tuple[Unit, list[Record]]]:
    """In this process, or in ``jobs`` of their own with the threads shared out; the order is that of the units."""
    one = partial(measured, config)
    if config.jobs == 1:
        yield from ((unit, one(unit)) for unit in units)
        return
    threads = max(1, torch.get_num_threads() // config.jobs)
    with ProcessPoolExecutor(
        config.jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(threads,)
    ) as pool:
        yield from zip(units, pool.map(one, units), strict=True)


def _begin(threads: int) -> None:
    """A worker starts. It ends with the run: a run that was killed cannot tell it to."""
    torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def measured(config: Config, unit: Unit) -> list[Record]:
    """The records of one example, one per contender."""
    asked, _ = subject(config.model, config.dtype)
    example = made_example(config, unit.task, unit.length, unit.index)
    tokens = asked.tokens(example)
    found = [measure(asked, tokens, contender, config.mode) for contender in unit.contenders]
    return [record | ({} if example.depth is None else {"depth": example.depth}) for record in found]


def made_example(config: Config, task: str, length: int, index: int) -> Example:
    """One example of the run."""
    if task not in TASKS:
        return own_examples(task)[0][index]
    _, world = subject(config.model, config.dtype)
    return TASKS[task](length, EVAL_SEEDS + config.seed * 1_000_003 + index, world)


@cache
def own_examples(path: str) -> tuple[list[Example], list[str]]:
    """A user's file, read once per process: examples and complaints."""
    return jsonl.read(Path(path))


@cache
def subject(model: str, dtype: str) -> tuple[Subject, World]:
    """A patched model and the world of its tasks, loaded once per process. ValueError without a tokenizer."""
    loaded, tokenizer = load(model, dtype)
    if tokenizer is None:
        raise ValueError(f"model: {model} has no tokenizer, which the tasks need")
    return prepared(loaded, tokenizer)


def prepared(model: Any, tokenizer: Any) -> tuple[Subject, World]:
    """The model, patched, and tasks whose lengths are in its tokens."""
    patch(model)
    asked = Subject(model, tokenizer)
    return asked, World(lines("held-out"), lambda text: len(asked.encode(text)))
