"""Questions that are remembered: what they change of topics, and of where later ones go."""

from __future__ import annotations

import pytest
from keeping import made
from topics import TOPICS, talk


def test_remembered_questions_are_no_topic() -> None:
    """They are more like each other than like what they ask about: routes stay those of a chat that remembers none."""
    found = []
    for remember in (True, False):
        chat = made()
        chat.add(talk(150, seed=1))
        chat.build()
        chat.ask("What is the code of the boat?", max_new_tokens=2, remember=False)  # makes room
        before, routes = chat._history, []
        for words_ in zip(*(own.split() for own in TOPICS.values()), strict=True):
            for word in words_[:4]:
                question = f"Please tell me what is the secret code of the {word}?"
                routes.append(chat.ask(question, max_new_tokens=2, remember=remember).route)
        chat.add(talk(8, seed=3))  # is told, and joins
        chat.build()
        route = chat.route("Which harbour did the boat and its captain reach?")
        found.append((routes, route, [e.label for e in chat.episodes], chat._history.windows))
        assert len(chat.turns) == 158 + (2 * len(routes) if remember else 0)
        assert chat._history.windows[: len(before.windows)] == before.windows and len(chat.episodes) == 4
    assert [a.episodes for a in found[0][0]] == [b.episodes for b in found[1][0]]
    assert found[0][1:3] == found[1][1:3]
    assert [w.text for w in found[0][3]] == [w.text for w in found[1][3]]


def test_what_is_repeated_elsewhere_keeps_its_topics() -> None:
    """Under another budget all is read again; questions and answers, as turns, make no topic there either."""
    chat, plain = made(), made(budget="384tok")
    chat.add(talk(101, seed=1))
    plain.add(talk(101, seed=1))
    for word in TOPICS["sea"].split():
        chat.ask(f"Please tell me what is the secret code of the {word}?", max_new_tokens=2)
    fresh = made(budget="384tok")
    fresh.repeat(chat)
    for one in (fresh, plain):
        one.build()
    assert fresh.turns == chat.turns and fresh.report().tokens == len(
        chat._model.tokens(chat.turns, first=True, answer=False)[0]
    )
    assert [w.text for w in fresh._history.windows] == [w.text for w in plain._history.windows]
    assert [e.label for e in fresh.episodes] == [e.label for e in plain.episodes] and len(fresh.episodes) == 4
    with pytest.raises(ValueError, match="repeat: expected a conversation without a turn"):
        fresh.repeat(chat)


@pytest.mark.parametrize("added", [0, 2])
def test_where_most_is_asked_questions_are_told(added: int) -> None:
    """In a chat, with a few turns before it or none, topics are those of what is asked, and new ones come."""
    chat = made(max_episodes=12)
    chat.add(talk(added, seed=1))
    for turn in talk(100, seed=1):
        chat.ask(turn.text, max_new_tokens=2)
    own, before = set(TOPICS["garden"].split()), chat.episodes
    assert len(before) >= 4 and not any(own & set(e.label.split(", ")) for e in before)
    for _ in range(8):
        chat.ask(TOPICS["garden"], max_new_tokens=2)
    chat.build()
    assert any(set(e.label.split(", ")) <= own for e in chat.episodes[len(before) :])
