"""Tasks: contexts of real text with facts spread over them, questions, answers. All from (task, length, seed).

A task is a function ``(length, seed, world) -> Example``; context, questions and answers together fit in ``length``
tokens. Seeds from ``EVAL_SEEDS`` on are never trained on, and the worlds of the two splits differ in their filler.
"""

# ruff: noqa: SIM905 (word lists read better as text)

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

EVAL_SEEDS = 1 << 40
ADJECTIVES = (
    "amber bitter calm dusty eager fancy giant hollow icy jolly keen lively mellow noble odd plain quick rusty "
    "silent tiny urban vivid warm young zesty brave clever dark early faint"
).split()
NOUNS = (
    "fox lamp river tower engine mirror wagon hammer forest bridge candle rocket island basket castle tunnel kettle "
    "anchor ladder meadow pillow shovel temple valley window blanket compass button ribbon feather"
).split()
MARKS = "kilo lima oscar papa romeo sierra tango victor whiskey yankee zulu quebec".split()
ORDINALS = ("first", "second", "third")
TOPICS = {
    "travel": "ticket hotel passport train airport luggage harbor map".split(),
    "cooking": "soup oven pepper butter recipe onion plate spoon".split(),
    "music": "guitar drum concert melody singer chorus violin piano".split(),
    "sports": "match goal team coach racket stadium medal runner".split(),
    "school": "lesson pencil teacher essay library exam notebook chalk".split(),
    "garden": "rose seed hedge tulip lawn bucket beetle orchard".split(),
    "health": "doctor clinic vitamin sleep fever bandage muscle diet".split(),
    "money": "bank loan salary coin wallet invoice market refund".split(),
}
TOKENS_PER_FACT = 64
"""A context holds one fact per so many tokens: a quarter of it is facts."""
CONTINUATION = 256


@dataclass(frozen=True)
class Example:
    """questions[i] ends where its answer begins; answers[i] is what must follow, one space before it.

    ``depth``: where in the context the first question's answer lies (0 start, 1 end), where the task controls it.
    ``continuation``: text that follows the context and is scored instead of asked about.
    """

    context: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    depth: float | None = None
    continuation: str = ""


@dataclass(frozen=True)
class World:
    """Filler lines, and how long a text is for the model: ``length`` counts its tokens."""

    filler: Sequence[str]
    length: Callable[[str], int]
    _known: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def tokens(self, text: str) -> int:
        """Tokens of a text; those of filler lines and facts are remembered."""
        if text not in self._known:
            self._known[text] = self.length(text)
        return self._known[text]


@dataclass(frozen=True)
class Part:
    """Facts, and what may be asked about them: (question, answer) pairs."""

    facts: list[str]
    asks: list[tuple[str, str]]


Task = Callable[[int, int, World], Example]


def digits(rng: random.Random) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(4))


def keys(rng: random.Random, n: int, nouns: Sequence[str] = NOUNS) -> list[str]:
    """n different two-word names."""
    picks = rng.sample(range(len(ADJECTIVES) * len(nouns)), n)
    return [f"{ADJECTIVES[p // len(nouns)]} {nouns[p % len(nouns)]}" for p in picks]


def fact(key: str, value: str) -> str:
    return f"The code of the {key} is {value}.\n"


def ask(key: str) -> str:
    return f"Q: code of the {key}:"


def codes(rng: random.Random, names: list[str]) -> Part:
    values = [digits(rng) for _ in names]
    pairs = list(zip(names, values, strict=True))
    return Part([fact(k, v) for k, v in pairs], [(ask(k), v) for k, v in pairs])


def values(rng: random.Random, names: list[str]) -> Part:
    """Three values under each key, told apart by ordinals, in any order."""
    facts, asks = [], []
    for key in names:
        mine = [(o, digits(rng)) for o in ORDINALS]
        facts += [f"The {key} {o} is {v}.\n" for o, v in mine]
        asks.append((f"Q: all of the {key}:", ", ".join(f"{key} {o} is {v}" for o, v in mine)))
    rng.shuffle(facts)
    return Part(facts, asks)


def chains(rng: random.Random, names: list[str]) -> Part:
    """Chains of 2 to 4 hops over four names each; the answer walks the chain and ends in the value."""
    facts, asks = [], []
    for first in range(0, len(names) - 3, 4):
        chain, value = names[first : first + rng.randint(2, 4)], digits(rng)
        facts.append(fact(chain[-1], value))
        facts += [f"The {a} follows the {b}.\n" for a, b in zip(chain, chain[1:], strict=False)]
        walk = "".join(f"the {k}, " for k in chain[1:]) + value
        asks.append((f"Q: follow the {chain[0]}:", walk))
    rng.shuffle(facts)
    return Part(facts, asks)


def marks(rng: random.Random, n: int) -> Part:
    """About n marks of six kinds; the two most frequent are asked, the most frequent first."""
    names = rng.sample(MARKS, 6)
    unit = max(1, n // 23)
    counts = [12 * unit, 6 * unit, 2 * unit, unit, unit, unit]
    facts = [f"mark {m}\n" for m, c in zip(names, counts, strict=True) for _ in range(c)]
    rng.shuffle(facts)
    return Part(facts, [("Q: two most frequent marks:", f"{names[0]} {names[1]}")])


def weave(rng: random.Random, length: int, facts: list[str], world: World, depths: list[float] | None = None) -> str:
    """``length`` tokens of filler with the facts between its lines, in order, at random or given depths."""
    room = length - sum(world.tokens(f) for f in facts)
    start = rng.randrange(len(world.filler))
    body: list[str] = []
    for i in range(start, start + len(world.filler)):
        line = world.filler[i % len(world.filler)]
        room -= world.tokens(line)
        if room < 0:
            break
        body.append(line)
    depths = sorted(rng.random() for _ in facts) if depths is None else depths
    places = [min(len(body), int(d * (len(body) + 1))) for d in depths]
    out: list[str] = []
    for i in range(len(body) + 1):
        out += [f for f, p in zip(facts, places, strict=True) if p == i]
        out += body[i : i + 1]
    return "".join(out)


def example(
    rng: random.Random, length: int, part: Part, asked: list[int], world: World, depths: list[float] | None = None
) -> Example:
    """The part's facts in filler, with the asked questions; everything fits in ``length``."""
    asks = [part.asks[i] for i in asked]
    room = length - 1 - sum(world.tokens(f"{q} {a}\n") for q, a in asks)
    context = weave(rng, room, part.facts, world, depths)
    return Example(context, tuple(q for q, _ in asks), tuple(a for _, a in asks))


def count(length: int) -> int:
    return max(2, length // TOKENS_PER_FACT)


def needle(length: int, seed: int, world: World) -> Example:
    """One fact; its depth goes through 0, 0.1 … 1 with the seed."""
    rng = random.Random(f"needle {seed}")
    depth = seed % 11 / 10
    made = example(rng, length, codes(rng, keys(rng, 1)), [0], world, [depth])
    return Example(made.context, made.questions, made.answers, depth)


def multi_key(length: int, seed: int, world: World) -> Example:
    """Many facts of one shape, one is asked."""
    rng = random.Random(f"multi_key {seed}")
    part = codes(rng, keys(rng, count(length)))
    return example(rng, length, part, [rng.randrange(len(part.asks))], world)


def multi_query(length: int, seed: int, world: World) -> Example:
    """As multi_key; 8 to 32 questions, one after another."""
    rng = random.Random(f"multi_query {seed}")
    part = codes(rng, keys(rng, count(length)))
    return example(rng, length, part, rng.sample(range(len(part.asks)), min(8 + seed % 25, len(part.asks))), world)


def multi_value(length: int, seed: int, world: World) -> Example:
    rng = random.Random(f"multi_value {seed}")
    part = values(rng, keys(rng, max(1, count(length) // 3)))
    return example(rng, length, part, [rng.randrange(len(part.asks))], world)


def tracking(length: int, seed: int, world: World) -> Example:
    rng = random.Random(f"tracking {seed}")
    part = chains(rng, keys(rng, 4 * max(1, count(length) // 4)))
    return example(rng, length, part, [rng.randrange(len(part.asks))], world)


def frequent(length: int, seed: int, world: World) -> Example:
    rng = random.Random(f"frequent {seed}")
    return example(rng, length, marks(rng, length // 16), [0], world)


def recent(length: int, seed: int, world: World) -> Example:
    """Control: the fact is the context's last line; other facts lie in its first half."""
    rng = random.Random(f"recent {seed}")
    part = codes(rng, keys(rng, count(length)))
    depths = sorted(rng.random() * 0.5 for _ in part.facts[1:]) + [1.0]
    return example(rng, length, part, [len(part.asks) - 1], world, depths)


def talk(rng: random.Random, length: int, world: World) -> Part:
    """Turns that fill ``length`` tokens: 4 to 8 topics take turns in runs of two to five; some facts are corrected
    later, and the later one holds. ``facts`` are the turns."""
    topics = rng.sample(sorted(TOPICS), rng.randint(4, 8))
    held: dict[str, str] = {}
    turns: list[str] = []
    topic, run = topics[0], 0
    while True:
        if run == 0:
            topic, run = rng.choice([t for t in topics if t != topic]), rng.randint(2, 5)
        turn = say(rng, topic, held)
        length -= world.tokens(turn[0])
        if length < 0:
            break
        turns, run = [*turns, turn[0]], run - 1
        held |= dict([turn[1]] if turn[1] else [])
    return Part(turns, [(ask(k), v) for k, v in held.items()])


def say(rng: random.Random, topic: str, held: dict[str, str]) -> tuple[str, tuple[str, str] | None]:
    """One turn on a topic, and the key and value it states, if any."""
    a, b = rng.sample(TOPICS[topic], 2)
    mine = [k for k in held if k.split()[1] in TOPICS[topic]]
    u = rng.random()
    if u < 0.1 and mine:
        key, value = rng.choice(mine), digits(rng)
        return f"User: about {topic}, a correction. {fact(key, value)}", (key, value)
    if u < 0.4 or not held:
        key = next(k for k in iter(lambda: f"{rng.choice(ADJECTIVES)} {a}", "") if k not in held)
        value = digits(rng)
        return f"User: about {topic}. {fact(key, value)}", (key, value)
    return f"User: about {topic}, the {a} and the {b}.\nBot: tell me more of the {a}.\n", None


def conversation(length: int, seed: int, world: World) -> Example:
    """A talk over several topics; one fact is asked, half of the time one that was corrected."""
    rng = random.Random(f"conversation {seed}")
    part = talk(rng, length - 32, world)
    stated = [sum(f"the {q[15:-1]} is" in t for t in part.facts) for q, _ in part.asks]
    corrected = [i for i, n in enumerate(stated) if n > 1]
    asked = rng.choice(corrected) if corrected and seed % 2 else rng.randrange(len(part.asks))
    question, answer = part.asks[asked]
    return Example("".join(part.facts), (question,), (answer,))


def text(length: int, seed: int, world: World) -> Example:
    """Filler alone; its last CONTINUATION tokens are what is scored."""
    rng = random.Random(f"text {seed}")
    whole = weave(rng, length - 1, [], world).splitlines(keepends=True)
    tail, size = len(whole), 0
    while tail > 1 and size < min(CONTINUATION, length // 2):
        tail -= 1
        size += world.tokens(whole[tail])
    return Example("".join(whole[:tail]), (), (), continuation="".join(whole[tail:]))


TASKS: dict[str, Task] = {
    "needle": needle,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "tracking": tracking,
    "frequent": frequent,
    "conversation": conversation,
    "recent": recent,
    "text": text,
}
RETRIEVAL = ("needle", "multi_key", "multi_value", "multi_query", "tracking", "conversation")


def words() -> str:
    """Text in the words of all tasks, for the tokenizer's training."""
    rng = random.Random(0)
    lines = [fact(k, "0") + ask(k) + "\n" for k in keys(rng, 600)]
    lines += [say(rng, t, {"odd ticket": "0"})[0] for t in TOPICS for _ in range(500)]
    for part in (values(rng, keys(rng, 60)), chains(rng, keys(rng, 160)), *(marks(rng, 23) for _ in range(200))):
        lines += part.facts + [f"{q} {a}\n" for q, a in part.asks]
    return "".join(lines)
