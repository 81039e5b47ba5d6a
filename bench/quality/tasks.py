"""Tasks: contexts of real text with facts spread over them, questions, answers. All from (task, length, seed).

A task is a function ``(length, seed, world) -> Example``; ``length`` bounds the context in tokens. Contexts of the splits
differ in filler; seeds below ``EVAL_SEEDS`` belong to training.
"""

# ruff: noqa: SIM905 (word lists read better as text)

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from text import Source
from tokenizers import Tokenizer

EVAL_SEEDS = 1 << 40
ADJECTIVES = (
    "amber bitter calm dusty eager fancy giant hollow icy jolly keen lively mellow noble odd plain quick rusty "
    "silent tiny urban vivid warm young zesty brave clever dark early faint"
).split()
NOUNS = (
    "fox lamp river tower garden engine mirror wagon piano hammer forest bridge candle rocket island basket violin "
    "castle tunnel kettle anchor ladder meadow pillow shovel temple valley window blanket compass"
).split()
MARKS = "kilo lima oscar papa romeo sierra tango victor whiskey yankee zulu quebec".split()
TOPICS = "travel cooking music sports school garden health money".split()


@dataclass(frozen=True)
class Example:
    """questions[i] ends where its answer begins; answers[i] is what must follow, one space before it."""

    context: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """Filler and the tokenizer that measures facts."""

    tokenizer: Tokenizer
    source: Source

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)


Task = Callable[[int, int, World], Example]


def digits(rng: random.Random) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(4))


def keys(rng: random.Random, n: int) -> list[str]:
    """n different two-word names."""
    picks = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), n)
    return [f"{ADJECTIVES[p // len(NOUNS)]} {NOUNS[p % len(NOUNS)]}" for p in picks]


def fact(key: str, value: str) -> str:
    return f"The code of the {key} is {value}.\n"


def ask(key: str) -> str:
    return f"Q: code of the {key}? A:"


def weave(rng: random.Random, length: int, facts: list[str], world: World, depths: list[float] | None = None) -> str:
    """Filler with the facts between its lines, in order, at random or given depths (0 start, 1 end)."""
    room = length - sum(world.tokens(f) for f in facts) - 2
    source = world.source
    start = rng.randrange(len(source.lines))
    body: list[str] = []
    for i in range(start, start + len(source.lines)):
        room -= source.counts[i % len(source.lines)]
        if room < 0:
            break
        body.append(source.lines[i % len(source.lines)])
    depths = sorted(rng.random() for _ in facts) if depths is None else depths
    places = [min(len(body), int(d * (len(body) + 1))) for d in depths]
    out: list[str] = []
    for i in range(len(body) + 1):
        out += [f for f, p in zip(facts, places, strict=True) if p == i]
        out += body[i : i + 1]
    return "".join(out)


def fitting(length: int, per_fact: int, most: int) -> int:
    """Facts of about ``per_fact`` tokens that leave at least a third of the context to filler."""
    return max(1, min(most, 2 * length // (3 * per_fact)))


def needle(length: int, seed: int, world: World) -> Example:
    rng = random.Random(f"needle {seed}")
    (key,), value = keys(rng, 1), digits(rng)
    return Example(weave(rng, length, [fact(key, value)], world), (ask(key),), (value,))


def multi_key(length: int, seed: int, world: World, questions: int = 1) -> Example:
    rng = random.Random(f"multi_key {seed} {questions}")
    names = keys(rng, fitting(length, 16, 48))
    values = [digits(rng) for _ in names]
    asked = rng.sample(range(len(names)), min(questions, len(names)))
    context = weave(rng, length, [fact(k, v) for k, v in zip(names, values, strict=True)], world)
    return Example(context, tuple(ask(names[i]) for i in asked), tuple(values[i] for i in asked))


def multi_query(length: int, seed: int, world: World) -> Example:
    return multi_key(length, seed, world, questions=8 + seed % 25)


def multi_value(length: int, seed: int, world: World) -> Example:
    """Three values under one key, answered in their order."""
    rng = random.Random(f"multi_value {seed}")
    names = keys(rng, fitting(length, 48, 12))
    values = {k: [digits(rng) for _ in range(3)] for k in names}
    facts = [fact(k, v) for k in names for v in values[k]]
    order = list(range(len(facts)))
    rng.shuffle(order)
    context = weave(rng, length, [facts[i] for i in order], world)
    key = rng.choice(names)
    mine = [values[key][i % 3] for i in order if names[i // 3] == key]
    return Example(context, (f"Q: all codes of the {key}? A:",), (" ".join(mine),))


def tracking(length: int, seed: int, world: World) -> Example:
    """Chains of 2 to 4 hops; the answer walks the chain and ends in the value."""
    rng = random.Random(f"tracking {seed}")
    chains = fitting(length, 60, 6)
    names = keys(rng, chains * 4)
    facts, walks = [], []
    for c in range(chains):
        chain, value = names[4 * c : 4 * c + rng.randint(2, 4)], digits(rng)
        links = [fact(chain[-1], value)] + [
            f"The {a} follows the {b}.\n" for a, b in zip(chain, chain[1:], strict=False)
        ]
        facts += links
        walks.append((chain, value))
    rng.shuffle(facts)
    chain, value = rng.choice(walks)
    answer = "".join(f"the {k}, " for k in chain[1:]) + value
    return Example(weave(rng, length, facts, world), (f"Q: follow the {chain[0]}? A:",), (answer,))


def frequent(length: int, seed: int, world: World) -> Example:
    """The two most frequent marks of six."""
    rng = random.Random(f"frequent {seed}")
    marks = rng.sample(MARKS, 6)
    unit = max(1, fitting(length, 5, 96) // 24)
    counts = [10 * unit, 7 * unit, 3 * unit, 2 * unit, unit, unit]
    facts = [f"mark {m}\n" for m, n in zip(marks, counts, strict=True) for _ in range(n)]
    rng.shuffle(facts)
    return Example(weave(rng, length, facts, world), ("Q: two most frequent marks? A:",), (f"{marks[0]} {marks[1]}",))


def conversation(length: int, seed: int, world: World) -> Example:
    """Turns over four topics that take turns; facts in turns; a later correction overrides."""
    rng = random.Random(f"conversation {seed}")
    topics = rng.sample(TOPICS, 4)
    names = keys(rng, fitting(length, 40, 24))
    turns, value = [], {}
    for key in names:
        value[key] = digits(rng)
        turns.append(f"User ({rng.choice(topics)}): {fact(key, value[key])}")
    for key in rng.sample(names, len(names) // 3):
        value[key] = digits(rng)
        turns.append(f"User ({rng.choice(topics)}): correction. {fact(key, value[key])}")
    key = rng.choice(names)
    return Example(weave(rng, length, turns, world), (ask(key),), (value[key],))


def recent(length: int, seed: int, world: World) -> Example:
    """Control: the fact lies in the last 64 tokens."""
    rng = random.Random(f"recent {seed}")
    names = keys(rng, fitting(length, 32, 12))
    values = [digits(rng) for _ in names]
    facts = [fact(k, v) for k, v in zip(names, values, strict=True)]
    context = weave(rng, length, facts, world, [rng.random() * 0.5 for _ in facts[1:]] + [1.0])
    return Example(context, (ask(names[-1]),), (values[-1],))


TASKS: dict[str, Task] = {
    "needle": needle,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "tracking": tracking,
    "frequent": frequent,
    "conversation": conversation,
    "recent": recent,
}
