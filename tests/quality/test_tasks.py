"""Tasks: an oracle that reads the context scores 1.0, a blind guesser near chance, and everything follows from the seed."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from kvstrata.quality.tasks import CONTINUATION, EVAL_SEEDS, MARKS, RETRIEVAL, TASKS, Example, World
from kvstrata.quality.text import files, lines

PIECE = re.compile(r"\d|\n| ?[A-Za-z]+| +|[^\sA-Za-z\d]")
N = 40
ASKED = sorted(set(TASKS) - {"text"})


@pytest.fixture(scope="module")
def world() -> World:
    """A tokenizer of a kind: digits single, words whole."""
    return World(lines("held-out"), lambda text: len(PIECE.findall(text)))


def oracle(context: str, question: str) -> str:
    """The answer by reading: later statements override earlier ones."""
    codes = dict(re.findall(r"The code of the (\w+ \w+) is (\d{4})\.", context))
    if found := re.search(r"Q: code of the (.+):", question):
        return codes[found[1]]
    if found := re.search(r"Q: all of the (.+):", question):
        values = dict(re.findall(rf"The {found[1]} (\w+) is (\d{{4}})\.", context))
        return ", ".join(f"{found[1]} {o} is {values[o]}" for o in ("first", "second", "third"))
    if found := re.search(r"Q: follow the (.+):", question):
        links = dict(re.findall(r"The (\w+ \w+) follows the (\w+ \w+)\.", context))
        at, walk = found[1], ""
        while at in links:
            at = links[at]
            walk += f"the {at}, "
        return walk + codes[at]
    seen = Counter(re.findall(r"^mark (\w+)$", context, flags=re.M))
    return " ".join(mark for mark, _ in seen.most_common(2))


def blind(rng: random.Random, answer: str) -> str:
    """A guess of the right form that has not seen the context."""
    if not any(c.isdigit() for c in answer):
        return " ".join(rng.sample(MARKS, 2))
    return re.sub(r"\d", lambda _: str(rng.randrange(10)), answer)


def score(example: Example, answers: list[str]) -> float:
    return sum(a == e for a, e in zip(answers, example.answers, strict=True)) / len(example.answers)


@pytest.mark.parametrize("task", ASKED)
@pytest.mark.parametrize("length", [256, 2048])
def test_oracle_scores_all_and_blind_nothing(task: str, length: int, world: World) -> None:
    rng = random.Random(0)
    seeing, guessing = 0.0, 0.0
    for i in range(N):
        example = TASKS[task](length, EVAL_SEEDS + i, world)
        assert example.questions and len(example.questions) == len(example.answers)
        seeing += score(example, [oracle(example.context, q) for q in example.questions])
        guessing += score(example, [blind(rng, a) for a in example.answers])
    assert seeing == N
    assert guessing / N <= 0.05


@pytest.mark.parametrize("task", ASKED)
def test_a_task_fits_its_length_and_follows_from_its_seed(task: str, world: World) -> None:
    for length in (256, 1024):
        made = [TASKS[task](length, EVAL_SEEDS + i, world) for i in range(8)]
        for e in made:
            whole = e.context + "".join(f"{q} {a}\n" for q, a in zip(e.questions, e.answers, strict=True))
            assert 0.8 * length <= world.length(whole) < length
        assert made == [TASKS[task](length, EVAL_SEEDS + i, world) for i in range(8)]
        assert len({e.context for e in made}) == 8


def test_needle_is_where_its_depth_says(world: World) -> None:
    for i in range(11):
        e = TASKS["needle"](1024, 11 * 7 + i, world)
        assert e.depth == i / 10
        place = e.context.index(f"is {e.answers[0]}.") / len(e.context)
        assert place == pytest.approx(e.depth, abs=0.12)


def test_recent_lies_in_the_last_64_tokens(world: World) -> None:
    for i in range(N):
        e = TASKS["recent"](1024, i, world)
        after = e.context[e.context.rindex(f"The code of the {e.questions[0][15:-1]} is") :]
        assert world.length(after) <= 64


def test_conversation_overrides_and_switches_topics(world: World) -> None:
    corrected = 0
    for i in range(N):
        e = TASKS["conversation"](2048, i, world)
        turns = e.context.splitlines()
        assert 20 <= len(turns) <= 300
        assert 4 <= len({re.match(r"User: about (\w+)", t)[1] for t in turns if t.startswith("User")}) <= 8
        corrected += len(re.findall(rf"the {e.questions[0][15:-1]} is", e.context)) > 1
    assert corrected >= N // 4


def test_multi_query_asks_eight_to_thirty_two(world: World) -> None:
    asked = [len(TASKS["multi_query"](4096, i, world).questions) for i in range(25)]
    assert min(asked) == 8 and max(asked) == 32


def test_splits_share_no_file(world: World) -> None:
    assert not set(files("train")) & set(files("held-out"))
    assert len(files("held-out")) > 20


def test_text_continues_its_context(world: World) -> None:
    e = TASKS["text"](1024, 3, world)
    assert not e.questions
    assert CONTINUATION <= world.length(e.continuation) < CONTINUATION + 80
    whole = (e.context + e.continuation).splitlines(keepends=True)
    held = lines("held-out")
    start = next(i for i, line in enumerate(held) if line == whole[0] and held[i + 1 : i + 3] == tuple(whole[1:3]))
    assert [held[(start + i) % len(held)] for i in range(len(whole))] == whole


def test_retrieval_tasks_are_tasks() -> None:
    assert set(RETRIEVAL) < set(TASKS)
