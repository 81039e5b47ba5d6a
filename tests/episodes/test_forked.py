"""Forks of a conversation: what they share, that neither sees the other, one limit for each, saved apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from feeding import check_pages
from keeping import QUESTIONS, answers, content, full, loaded, made
from plain import PlainChat
from topics import TOPICS, talk

from kvstrata import Conversation
from kvstrata.episodes import InputEmbedding


def used(chat: Conversation) -> int:
    """Pages in use, of both tiers."""
    store = chat._store.cache._store
    return sum(store.pool(p)["used"] for p in range(store.n_pools))


def test_a_fork_is_what_it_came_from_and_takes_no_page() -> None:
    chat = full()
    before, pages = content(chat), used(chat)
    twin = chat.fork()
    assert used(chat) == pages and content(twin) == before == content(chat)
    assert (twin.report().forks, chat.report().forks, made().report().forks) == (1, 1, 0)
    assert twin.turns == chat.turns and twin.episodes == chat.episodes
    assert (twin.report().stored, twin.report().full) == (chat.report().stored, chat.report().full)
    check_pages(chat._store.cache)


def test_no_more_than_the_open_page_of_each_row_is_copied() -> None:
    """A token on each side: of every row, a copy of the page that has room, and a page where there is none."""
    chat = made()
    chat.add(talk(150, seed=1))
    chat.build()
    store = chat._store
    store.make_room(4)
    store.read(torch.tensor([7] * (1 + -store.pending % 16)))
    twin, pages, rows = chat.fork(), used(chat), store.cache.shape.rows
    assert store.pending % 16 == 1
    twin._store.read(torch.tensor([8]))
    assert used(chat) == pages + rows
    store.read(torch.tensor([9]))
    assert used(chat) == pages + rows
    check_pages(store.cache)


def test_neither_sees_what_becomes_of_the_other() -> None:
    """Asked, added to, compacted and refreshed: the fork is to the byte what a conversation without forks is, and so is the
    other."""
    chat, plain, still = full(), full(), full()
    twin = chat.fork()
    for one in (twin, plain):
        one.ask("What of the recipe?", max_new_tokens=8)
        one.add(talk(120, seed=5))
        one.build()
        one.refresh("labels")
    assert content(chat) == content(still)
    assert content(twin) == content(plain)
    assert answers(twin) == answers(plain)
    assert content(chat) == content(still)
    assert answers(chat) == answers(still)
    check_pages(chat._store.cache)
    twin.close()
    assert content(chat) == content(still)
    assert chat.ask("Of the moon?", max_new_tokens=4).ids == still.ask("Of the moon?", max_new_tokens=4).ids


def test_the_first_may_end_first() -> None:
    chat, plain = full(), full()
    twin = chat.fork()
    chat.close()
    assert twin.report().forks == 0 and answers(twin) == answers(plain)
    with pytest.raises(RuntimeError, match="it was closed"):
        chat.fork()


def test_as_many_limits_as_conversations() -> None:
    """Three of them go apart over compactions and questions; near bytes keep the limit at every step, and again as they end."""
    chat = made(layers=2)
    chat.add(talk(120, seed=1))
    chat.build()
    limit, many = chat.report().limit, [chat]
    many += [chat.fork(), chat.fork()]
    for part in range(4):
        for i, one in enumerate(many):
            one.add(talk(40, seed=10 * i + part))
            one.ask(QUESTIONS[5 * i + part], max_new_tokens=6)
            report = one.report()
            assert report.limit == 3 * limit and report.near <= report.peak <= report.limit
            check_pages(chat._store.cache)
    assert all(one.report().compactions > 4 for one in many)
    for left, one in ((2, many[0]), (1, many[2])):
        one.close()
        report = many[1].report()
        assert report.limit == left * limit and report.near <= report.limit
    check_pages(many[1]._store.cache)
    many[1].add(talk(60, seed=4))
    many[1].ask("Of the moon?", max_new_tokens=6)
    assert many[1].report().near <= limit


def test_two_stream_at_once() -> None:
    chat, plain = full(), full()
    twin = chat.fork()
    first, second = (c.stream(q, max_new_tokens=8) for c, q in ((chat, "Of the boat?"), (twin, "Of the soup?")))
    said = [next(first), next(second)]
    said[0] += "".join(first)
    said[1] += "".join(second)
    other = plain.fork()
    assert said == [plain.ask("Of the boat?", max_new_tokens=8).text, other.ask("Of the soup?", max_new_tokens=8).text]
    stream = chat.stream("And now?", max_new_tokens=8)
    next(stream)
    with pytest.raises(RuntimeError, match="an answer is still streaming"):
        chat.fork()
    stream.close()  # type: ignore[attr-defined]


def test_a_fork_is_saved_apart(tmp_path: Path) -> None:
    chat = full()
    chat.save(tmp_path / "one")
    twin = chat.fork()
    twin.ask("What of the recipe?", max_new_tokens=8)
    with pytest.raises(RuntimeError, match="another conversation was saved there"):
        twin.save(tmp_path / "one")
    twin.save(tmp_path / "two")
    assert content(loaded(tmp_path / "two")) == content(twin)
    assert content(loaded(tmp_path / "one")) == content(chat)
    chat.save(tmp_path / "one")


def test_an_embedder_that_is_fitted_is_fitted_for_one() -> None:
    model = PlainChat()
    chat = made(embedder=InputEmbedding(model.embeddings, model.plain))
    chat.add(talk(150, seed=1))
    chat.build()
    twin, fitted = chat.fork(), chat._embedder.fitted  # type: ignore[attr-defined]
    route = chat.route("Of the boat?")
    twin.add(talk(60, seed=2, topics=tuple(TOPICS)[3:]))
    twin.refresh("labels")
    assert chat._embedder.fitted is fitted is not twin._embedder.fitted  # type: ignore[attr-defined]
    assert chat.route("Of the boat?") == route
