"""A cache for each episode: each is what one guided by its prompt alone is, all within the limit of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from feeding import check_pages
from keeping import made as made_chat
from plain import KV_HEADS, PlainChat, words
from test_store import Watched, check_logits, dense
from topics import TOPICS, talk

from kvstrata import BudgetExceeded, Unsupported, testing
from kvstrata.episodes import Conversation, Router
from kvstrata.episodes.limits import Sizes
from kvstrata.episodes.separate import SeparateStore
from kvstrata.episodes.store import EpisodeStore

SIZES = Sizes(256, 128, 32, episodes=4, build="separate", far=False)
PROMPTS = [words(32 - 3 * e, 100 + e) for e in range(4)]


def made(model: PlainChat, sizes: Sizes = SIZES, episodes: int = 3) -> SeparateStore:
    return SeparateStore(model, sizes, lambda: PROMPTS[:episodes])


def tables(store: EpisodeStore) -> list[bytes]:
    """Of all rows of the cache in work."""
    found = (store.cache.materialize(i, store._seq) for i in range(len(store.cache.shape.layers)))
    return [x.view(torch.uint8).numpy().tobytes() for layer in found for x in layer]


def test_each_is_what_a_cache_for_its_prompt_alone_is() -> None:
    """To the bit: history in parts, a question of one of them, which the others read behind, and more history."""
    model, parts = PlainChat(layers=2, dtype=torch.bfloat16), [words(n, n) for n in (500, 700, 40)]
    store = made(model)
    for part in parts:
        store.read(part)
    store.make_room(40)
    store.show([1])
    asked = store.read(words(30, 1), logits=True)
    store.show([2])  # reads what the second one was asked
    store.show(None)
    store.read(words(300, 2))
    store.compact()
    assert store.compactions == 3 * store.compactions // 3 > 15 and store.length == 1570
    found = {}
    for e in range(3):
        store.show([e])
        found[e] = tables(store)
    for e in range(3):
        alone = EpisodeStore(model, replace(SIZES, build="shared", episodes=1), lambda e=e: [PROMPTS[e]])  # type: ignore[misc]
        for part in parts:
            alone.read(part)
        alone.make_room(40)
        alone.show([])
        logits = alone.read(words(30, 1), logits=True)
        assert asked is not None and logits is not None and torch.equal(logits, asked) == (e == 1)
        alone.read(words(300, 2))
        alone.compact()
        assert tables(alone) == found[e]
    check_pages(store.cache)


def test_what_fits_is_exact() -> None:
    """As under a shared build: one cache, B + C tokens."""
    model = PlainChat()
    store, ids = made(model), words(384, 1)
    logits = store.read(ids[:352], logits=True)
    assert logits is not None
    check_logits(logits, dense(model, ids[:352]))
    for n in range(352, 384):
        logits = store.read(ids[n : n + 1], logits=True)
        assert logits is not None
    check_logits(logits, dense(model, ids))
    assert (store.compactions, store.episodes, store.room) == (0, 0, 0)
    store.read(ids[:1])
    assert (store.compactions, store.episodes) == (3, 3)


class WatchedEach(Watched, SeparateStore):
    """Notes the most that all caches held at any page taken."""


@pytest.mark.parametrize(("episodes", "heads"), [(1, "uniform"), (4, "pair"), (4, "uniform"), (8, "uniform")])
def test_near_bytes_never_pass_the_limit(episodes: int, heads: str) -> None:
    """From C to 20 C tokens, then questions; with equal heads what is used is the same at 10 C as at 20 C, the most from 12 C
    on, when no page of the beginning is shared any more."""
    model = PlainChat(layers=1, dtype=torch.bfloat16)
    sizes = replace(SIZES, heads=heads, episodes=episodes)
    store = WatchedEach(model, sizes, lambda: [words(32, e) for e in range(episodes)])
    store._watch()
    limit, peaks, used, ids = sizes.limit_bytes(model.shape), [], [], words(20 * 128, 2)
    assert store.cache.report().limit_bytes == limit
    for n in range(0, len(ids), 128):
        store.read(ids[n : n + 128])
        peaks.append(max(store.most, store.cache.report().peak_bytes))
        used.append(store.cache._store.pool(0)["used"])
        assert peaks[-1] <= limit
    if heads == "uniform":
        assert used[9] == used[19] and peaks[11] == peaks[19]
    for e in range(episodes):
        store.make_room(40)
        store.show([e])
        store.read(words(40, e))
        assert max(store.most, store.cache.report().peak_bytes) <= limit == store.cache.report().limit_bytes
    assert store.compactions > 10 * episodes and store.episodes == episodes
    check_pages(store.cache)


def test_a_page_too_little_is_an_error() -> None:
    model = PlainChat()
    small = SIZES.limit_bytes(model.shape) // 3

    class Small(Sizes):
        def limit_bytes(self, shape: object) -> int:
            return small

    sizes = Small(**{name: getattr(SIZES, name) for name in SIZES.__dataclass_fields__})
    store = made(model, sizes, 4)
    with pytest.raises(BudgetExceeded, match="limit is"):
        store.read(words(128 * 10, 10))
    assert store.cache.report().peak_bytes <= small


def test_as_many_bytes_as_caches() -> None:
    """At least 0.9 of four caches of B = 1,024 bf16 tokens, N = 16 B, as the allocator says."""
    model = PlainChat(layers=1, dtype=torch.bfloat16)
    store = made(model, replace(SIZES, budget=1024, chunk=512), 4)
    store.read(words(16 * 1024, 9))
    store.compact()
    store.cache.trim()
    pool = store.cache._store.pool(0)
    separate = 4 * KV_HEADS * 1024 // 16 * (pool["page_bytes"] + 64)
    assert 0.9 <= pool["used"] * (pool["page_bytes"] + 64) / separate <= 1.05
    assert store.slots(4) == [store.stored // 4] * 4


def test_an_answer_can_be_taken_back() -> None:
    """Also one that the other caches have read, and after an answer so long that its cache alone was compacted in it."""
    store = made(PlainChat(layers=2))
    store.read(words(900, 7))
    store.show([1])
    store.read(words(400, 8))
    store.make_room(60)
    for others in (False, True):
        store.show([2])
        mark, before, stored = store.mark(), tables(store), store.stored
        first = store.read(words(50, 9), logits=True)
        if others:
            store.show(None)
            store.show([2])
        store.back(mark)
        assert store.length == mark.length and tables(store) == before and store.stored == stored
        again = store.read(words(50, 9), logits=True)
        assert first is not None and again is not None and torch.equal(first, again)
        store.back(mark)
    store.compact()
    with pytest.raises(ValueError, match="a compaction came since"):
        store.back(mark)


@pytest.mark.parametrize("point", ["append.after_take", "plan.after_write"])
def test_what_fails_is_read_by_all_in_the_end(point: str) -> None:
    """Whichever of them fails, all come to hold what they would have."""
    ids, expected = words(1200, 5), made(PlainChat(layers=2))
    expected.read(ids)
    for nth in (2, 50):
        store = made(PlainChat(layers=2))
        with testing.fault(point, nth), pytest.raises(RuntimeError):
            store.read(ids)
        store.read(ids[store.length :])
        store.make_room(0)
        assert store.length == 1200 and store.episodes == 3
        for e in range(3):
            store.show([e])
            assert store.length == 1200
        check_pages(store.cache)
    assert store.stored == expected.stored


# --- conversations --------------------------------------------------------------------------------------------------------


def conversation(**options: Any) -> Conversation:
    return made_chat(2, build="separate", **options)


def test_a_long_talk_keeps_the_limit() -> None:
    """Topics change, a new one comes, which gets a cache; two runs are alike to the byte."""
    found = []
    for _ in range(2):
        chat = conversation(max_episodes=6)
        limit, answers = chat.report().limit, []
        history = talk(60, seed=2) + talk(36, seed=3, topics=("garden",))
        for first in range(0, 96, 12):
            chat.add(history[first : first + 12])
            topic = list(TOPICS)[first // 12 % 5]
            answers.append(chat.ask(f"Tell me of {TOPICS[topic]}?", max_new_tokens=8, remember=first % 24 == 0))
            report = chat.report()
            assert report.near <= report.peak <= report.limit == limit and report.forks == 0
            check_pages(chat._store.cache)
        assert report.compactions > 24 and report.switches > 4 and 4 < len(report.episodes) <= 6
        assert {len(a.route.episodes) for a in answers if a.route} == {1}
        assert all(e.slots for e in report.episodes)
        found.append((answers, tables(chat._store)))
    assert [a.ids for a in found[0][0]] == [a.ids for a in found[1][0]] and found[0][1] == found[1][1]


def test_questions_leave_no_trace_and_forks_no_other() -> None:
    chat, still = conversation(), conversation()
    for one in (chat, still):
        one.add(talk(120, seed=4))
        one.build()
        one.ask("About the choir?", max_new_tokens=2, remember=False)
    twin = chat.fork()
    assert (twin.report().forks, twin.report().stored) == (1, chat.report().stored)
    assert twin.report().limit == 2 * still.report().limit
    first = twin.ask("What of the orbit of the moon?", max_new_tokens=6, remember=False)
    twin.ask("And the oven?", max_new_tokens=6)
    twin.add(talk(60, seed=5))
    twin.build()
    for one in (chat, still):
        again = one.ask("What of the orbit of the moon?", max_new_tokens=6, remember=False)
        assert (again.ids, again.route) == (first.ids, first.route)
    assert tables(chat._store) == tables(still._store)
    check_pages(chat._store.cache)
    twin.close()
    assert chat.report().forks == 0 and chat.report().limit == still.report().limit
    check_pages(chat._store.cache)
    chat.close()
    assert chat._store.cache._live == [] and chat._store.cache._store.pool(0)["used"] == 0


def test_refresh() -> None:
    """ "rebuild" is a new build to the byte; "labels" compacts each cache, of fewer topics if there are fewer."""
    one, two = conversation(), conversation()
    history = talk(110, seed=9)
    for first in range(0, 110, 37):
        one.add(history[first : first + 37])
        one.build()
    two.add(history)
    two.build()
    one.refresh("rebuild")
    for topic in TOPICS.values():
        answers = [c.ask(f"What of {topic}?", max_new_tokens=4, remember=False) for c in (one, two)]
        assert answers[0].ids == answers[1].ids and answers[0].route == answers[1].route
        assert tables(one._store) == tables(two._store)
    passes = one.report().compactions
    one.refresh("labels")
    assert one.report().compactions == passes + len(one.episodes) == passes + 4
    store = one._store
    given: Callable[[], Any] = store._prompts
    store._prompts = lambda: list(given())[:2]
    store.compact()
    assert store.episodes == 2 and store.slots(3)[2] == 0 and one.report().limit == two.report().limit
    check_pages(store.cache)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompts": "reconstruct"}, "prompts is 'reconstruct' with build 'separate'"),
        ({"far": True}, "far is True with build 'separate'"),
        ({"private": "int8"}, "private is 'int8', common 'full' with build 'separate'"),
        ({"router": Router()}, "top is 2 with build 'separate'"),
    ],
)
def test_what_separate_caches_have_not_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        conversation(**options)


def test_what_is_not_done_with_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build is 'both', expected 'shared' or 'separate'"):
        made_chat(build="both")
    with pytest.raises(Unsupported, match="save: build is 'separate'"):
        conversation().save(tmp_path / "c")
    with pytest.raises(ValueError, match=r"show: episodes is \[0, 1\], expected one"):
        made(PlainChat()).show([0, 1])
    assert list(tmp_path.iterdir()) == []
    assert conversation(private="int8", common="int8", budget="384tok").report().limit > 0
