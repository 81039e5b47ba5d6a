"""A cache under a falling limit: it changes at multiples of the interval only, and holds after every plan."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from feeding import feed

from kvstrata import Budget, Cache, LayerSpec, Shape
from kvstrata.budget import Schedule
from kvstrata.budget.protect import limit_bytes
from kvstrata.config import BudgetExceeded

SHAPE = Shape([LayerSpec(2, 4, 32)] * 2, torch.float32)
START, END = 900 << 10, 400 << 10


@pytest.mark.parametrize(("policy", "interval"), [("keydiff", 48), ("arkv", 256)])
def test_two_thousand_steps_with_forks(policy: str, interval: int) -> None:
    """held <= limit(t) after every step, t of the sequence that decoded most; it changes at multiples of I only."""
    schedule = Schedule("rex", interval=interval, horizon=1500, end=END)
    cache = Cache(SHAPE, Budget.bytes(START, schedule=schedule), policy)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    decoded = dict.fromkeys(cache.new(), 0)
    feed(cache, list(decoded), [900], generator)
    assert cache.report().limit_bytes == START, "a prompt is not decoded"
    peak = 0
    for _ in range(2000):
        draw = rng.random()
        live = list(decoded)
        if draw < 0.01 and len(live) < 3:
            source = rng.choice(live)
            decoded |= dict.fromkeys(cache.fork(source), decoded[source])
        elif draw < 0.02 and len(live) > 1:
            (gone,) = rng.sample(live, 1)
            cache.free([gone])
            del decoded[gone]
        n = rng.choice([1] * 20 + [3, 16])
        feed(cache, list(decoded), [n] * len(decoded), generator)
        decoded = {seq: t + n for seq, t in decoded.items()}
        limit = schedule.limit(START, max(decoded.values()))
        assert cache.report().limit_bytes == limit
        assert cache.nbytes() <= limit
        peak = max(peak, cache.nbytes())
    assert limit == END
    assert peak > 0.75 * START, "the first limit was used"
    assert cache.nbytes() > 0.5 * END, "and most of the last one is, by up to three sequences"


def limits(cache: Cache, seqs: list, steps: list[int]) -> list[int]:  # type: ignore[type-arg]
    """The limit after each step, which is held."""
    generator, found = torch.Generator().manual_seed(1), []
    for n in steps:
        feed(cache, seqs, [n] * len(seqs), generator)
        limit = cache.report().limit_bytes
        assert limit is not None and cache.nbytes() <= limit
        found.append(limit)
    return found


@pytest.mark.parametrize("equal_area", [False, True])
def test_what_is_decoded(equal_area: bool) -> None:
    """Prompts are not, however they come; a crop takes back, a fork inherits, an emptied sequence begins anew."""
    schedule = Schedule("linear", interval=32, horizon=320, end=END, equal_area=equal_area)
    cache = Cache(SHAPE, Budget.bytes(START, schedule=schedule), "keydiff")
    at = [schedule.limit(START, t) for t in range(0, 320, 32)]
    seqs = cache.new()
    assert limits(cache, seqs, [300, 200, 17]) == [at[0]] * 3
    assert limits(cache, seqs, [16, 15, 1, 60, 1]) == [at[0], at[0], at[1], at[1], at[1]]
    cache.crop(seqs, [cache.logical_length(seqs[0]) - 3])
    assert limits(cache, seqs, [1, 1]) == [at[0], at[1]]
    (kid,) = cache.fork(seqs[0])
    cache.free(seqs)
    assert limits(cache, [kid], [1] * 32) == [at[1]] * 31 + [at[2]]
    cache.clear([kid])
    assert limits(cache, [kid], [300]) == [at[0]]


def test_a_schedule_of_tokens() -> None:
    """It begins with the bytes of so many tokens in every row, for each sequence."""
    schedule = Schedule("linear", interval=64, horizon=128, end=END)
    cache = Cache(SHAPE, Budget.tokens(512, schedule=schedule), "keydiff")
    start = limit_bytes(Budget.tokens(512), SHAPE, [0, 0])
    assert limits(cache, cache.new(2), [300, *[1] * 128])[::64] == [start, (start + END) // 2, END]


@pytest.mark.parametrize(
    ("make", "policy", "message"),
    [
        (lambda s: Budget.bytes(START, schedule=s(END)), "full", "policy 'full' holds cannot fall"),
        (lambda s: Budget.bytes(START, schedule=s(END)), "streaming", "policy 'streaming' holds cannot fall"),
        (lambda s: Budget.bytes(START, schedule=s(START + 1)), "keydiff", "end is 921601 bytes, expected at most"),
        (lambda s: Budget.bytes(START, schedule=s(40000)), "keydiff", "budget: 40000 bytes for 1 .* at least"),
    ],
)
def test_refused_at_construction(make: Any, policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cache(SHAPE, make(lambda end: Schedule("linear", 64, 640, end)), policy)


def test_the_least_end_is_the_one_that_is_named() -> None:
    def cache(end: int) -> Cache:
        return Cache(SHAPE, Budget.bytes(START, schedule=Schedule("linear", 16, 64, end)), "arkv")

    with pytest.raises(ValueError, match="at least") as refused:
        cache(40000)
    least = int(str(refused.value).split()[-1])
    with pytest.raises(ValueError, match=f"at least {least}"):
        cache(least - 1)
    made = cache(least)
    assert limits(made, made.new(), [400, *[1] * 200])[-1] == least


def test_more_forks_than_the_end_holds_are_refused() -> None:
    cache = Cache(SHAPE, Budget.bytes(START, schedule=Schedule("linear", 16, 64, 200 << 10)), "keydiff")
    seqs = cache.new()
    limits(cache, seqs, [300])
    before = cache.report()
    with pytest.raises(BudgetExceeded, match="budget: 204800 bytes are too few for 9 sequences"):
        cache.fork(seqs[0], 8)
    assert cache.report() == before
