"""Questions that go to another topic than the one before: what moves, what stays, and what a fault leaves."""

from __future__ import annotations

import pytest
from feeding import check_pages
from keeping import QUESTIONS, content, full

from kvstrata import Conversation, testing


def apart(chat: Conversation) -> str:
    """A question that goes to no topic of the last one; all sets but those of the last one are Far alone."""
    chat.build()
    while chat._store.cache._store.give_way():
        pass
    now = set(chat._turned.episodes or ())
    routes = ((q, chat.route(q)) for q in QUESTIONS)
    return next(q for q, route in routes if route is not None and not now & set(route.episodes))


def test_a_change_moves_what_is_missing_once() -> None:
    chat = full(layers=2)
    question, limit = apart(chat), chat.report().limit
    before = chat.report()
    answer = chat.ask(question, max_new_tokens=3, remember=False)
    page, after = chat._store.cache._store.pool(0)["page_bytes"], chat.report()
    read = after.found[1] - before.found[1]
    assert answer.bytes_moved == read * page > 0 and after.switches == before.switches + 1
    assert chat.ask(question, max_new_tokens=3, remember=False).bytes_moved == 0
    for q in QUESTIONS:
        assert chat.ask(q, max_new_tokens=2, remember=False).route is not None
        assert chat.report().near <= chat.report().peak <= limit
    assert chat.report().found[0] > after.found[0]
    check_pages(chat._store.cache)


@pytest.mark.parametrize("nth", [1, 6])
def test_a_question_whose_sets_do_not_come_is_taken_back(nth: int) -> None:
    chat, plain = full(layers=2), full(layers=2)
    question = apart(chat)
    assert apart(plain) == question
    before = content(chat)
    with (
        testing.fault("far.read", nth),
        pytest.raises(RuntimeError, match="fault injected at far.read, where a page of set"),
    ):
        chat.ask(question, max_new_tokens=4)
    assert content(chat) == before
    check_pages(chat._store.cache)
    chat._store.cache._store.set_ahead(True, 20)
    never = r"pread of \d+ bytes at \d+ has not come back within 20 ms, where a page of set \d was read"
    with testing.trouble(stay=1.0), pytest.raises(RuntimeError, match=never):
        chat.ask(question, max_new_tokens=4)
    assert content(chat) == before
    chat._store.cache._store.set_ahead(True, 60_000)
    assert chat.ask(question, max_new_tokens=4).ids == plain.ask(question, max_new_tokens=4).ids
    assert content(chat) == content(plain)
