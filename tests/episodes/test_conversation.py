"""Conversations: what is asked and kept, limits at every step, what a failed call leaves."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
import torch
from feeding import check_pages
from plain import END, KV_HEADS, PlainChat, words
from rich.console import Console
from topics import TOPICS, CountedWords, talk

from kvstrata import Cache, LayerSpec, Shape, testing
from kvstrata.episodes import Turn
from kvstrata.episodes.conversation import Conversation


def made(model: PlainChat | None = None, budget: str | int = "256tok", **options: Any) -> Conversation:
    options = {"chunk": 128, "prompt_tokens": 32, "embedder": CountedWords()} | options
    return Conversation(model or PlainChat(), budget, **options)


def tables(chat: Conversation) -> list[Any]:
    store = chat._store
    return [store.cache.materialize(i, store._seq) for i in range(len(store.cache.shape.layers))]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_while_all_fits_answers_are_those_of_a_whole_cache() -> None:
    model = PlainChat()
    chat = made(model)
    chat.add([("Ada", "The boat left the harbour."), Turn("Bo", "Nice!", date="2024-05-08")])
    answer = chat.ask("Where is the boat?", max_new_tokens=12)
    assert answer.route is None
    ids, _ = model.tokens([*chat.turns[:2], Turn("user", "Where is the boat?")], first=True, answer=True)
    cache, out = Cache(model.shape), []
    (seq,) = cache.new()
    fed = ids
    while len(out) < 12:
        with cache.step([seq], [len(fed)]) as step:
            logits = model.forward(fed, step.positions, step)
        assert logits is not None
        out.append(int(logits.argmax()))
        if out[-1] == END:
            break
        fed = torch.tensor(out[-1:])
    assert list(answer.ids) == [t for t in out if t != END]
    assert [t.speaker for t in chat.turns] == ["Ada", "Bo", "user", "assistant"]


def test_a_question_is_routed_by_itself_alone() -> None:
    """The embedder sees exactly the user's question, once, as a query."""
    spy = CountedWords()
    chat = made(embedder=spy)
    chat.add(talk(150, seed=1))
    chat.build()
    spy.asked.clear()
    question = "Which harbour did the boat and its captain reach?"
    answer = chat.ask(question, max_new_tokens=4)
    assert [text for kind, text in spy.asked if kind == "query"] == [question]
    assert answer.route is not None
    about = chat.episodes[answer.route.episodes[0]].label
    assert set(about.split(", ")) & set(TOPICS["sea"].split())


def test_three_hundred_turns_keep_the_limit() -> None:
    """Topics change, a new one comes, questions switch episodes: the limit and what is stored hold at every step, two runs
    are alike to the byte, pages in use are those in tables."""
    found = []
    for _ in range(2):
        chat = made(PlainChat(layers=2, dtype=torch.bfloat16), episodes=4, max_episodes=6)
        limit, sizes = chat.report().limit, chat._sizes
        seen = sizes.budget - sizes.recent  # backbone and a set, of a row on average; of six sets, with the tail:
        bound = 2 * KV_HEADS * max(sizes.whole, seen * (6 - 5 * sizes.share) + sizes.recent + sizes.chunk + 16)
        history = talk(240, seed=2) + talk(60, seed=3, topics=("garden", "sea"))
        answers = []
        for first in range(0, 300, 10):
            chat.add(history[first : first + 10])
            if first % 30 == 20:
                topic = list(TOPICS)[first // 30 % 5]
                answers.append(chat.ask(f"Tell me of {TOPICS[topic]}?", max_new_tokens=8, remember=first % 20 == 0))
            else:
                chat.build()
            report = chat.report()
            assert report.near <= limit and report.peak <= limit and report.stored <= bound
            check_pages(chat._store.cache)
        assert report.compactions > 10 and report.switches > 2 and 4 <= len(report.episodes) <= 6
        found.append((answers, tables(chat)))
    assert [a.ids for a in found[0][0]] == [a.ids for a in found[1][0]]
    assert same(found[0][1], found[1][1])


def test_a_question_that_is_not_remembered_leaves_no_trace() -> None:
    """With room, the store is the same to the byte."""
    chat = made()
    chat.add(talk(120, seed=4))
    chat.build()
    chat.ask("About the choir?", max_new_tokens=2, remember=False)  # makes room
    chat._store.show(None)
    before, turns, length = tables(chat), chat.turns, chat.report().tokens
    first = chat.ask("What of the orbit of the moon?", max_new_tokens=6, remember=False)
    chat.ask("And the oven?", max_new_tokens=6, remember=False)
    second = chat.ask("What of the orbit of the moon?", max_new_tokens=6, remember=False)
    assert first.ids == second.ids and first.route == second.route
    chat._store.show(None)
    after = tables(chat)
    assert chat.turns == turns and chat.report().tokens == length
    assert same(before, after)


def test_words_of_a_stream_are_the_answer() -> None:
    one, two = (made() for _ in range(2))
    for chat in (one, two):
        chat.add(talk(100, seed=5))
    pieces = list(one.stream("How is the soup?", max_new_tokens=10))
    answer = two.ask("How is the soup?", max_new_tokens=10)
    assert "".join(pieces) == answer.text
    assert same(tables(one), tables(two))


def test_a_stream_closed_early_keeps_its_words() -> None:
    chat = made()
    chat.add(talk(20, seed=6))
    stream = chat.stream("How is the soup?", max_new_tokens=50)
    words_ = next(stream) + next(stream)
    with pytest.raises(RuntimeError, match="an answer is still streaming"):
        chat.ask("And now?")
    with pytest.raises(RuntimeError, match="an answer is still streaming"):
        chat.add([("Ada", "hello")])
    stream.close()  # type: ignore[attr-defined]
    assert chat.turns[-1] == Turn("assistant", words_)
    chat.ask("And now?", max_new_tokens=2)


def test_the_next_question_reads_what_closed_the_answer() -> None:
    """Tokens fed so far are those of the turns written at once."""
    model = PlainChat()
    chat = made(model)
    chat.add([("Ada", "The boat left.")])
    answer = chat.ask("Where?", max_new_tokens=3)
    chat.ask("When?", max_new_tokens=2, remember=False)
    fed = chat.report().tokens
    ids, _ = model.tokens([Turn("Ada", "The boat left."), Turn("user", "Where?")], first=True, answer=True)
    assert fed == len(ids) + len(answer.ids) + 1  # and END


class Failing(PlainChat):
    """Fails at a call of forward."""

    left = -1

    def forward(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the model failed")
        return super().forward(*args, **options)


def test_a_failed_answer_takes_back_its_question() -> None:
    model = Failing()
    chat = made(model)
    chat.add(talk(60, seed=7))
    chat.build()
    chat.ask("The boat?", max_new_tokens=2, remember=False)
    turns, length, before = chat.turns, chat.report().tokens, tables(chat)
    expected = made(PlainChat())
    expected.add(talk(60, seed=7))
    expected.build()
    expected.ask("The boat?", max_new_tokens=2, remember=False)
    for left in (1, 2, 4):
        model.left = left
        with pytest.raises(RuntimeError, match="the model failed"):
            chat.ask("Of the violin?", max_new_tokens=8)
        assert chat.turns == turns and chat.report().tokens == length
        assert chat.report().questions == 1
    assert same(before, tables(chat))
    model.left = -1
    assert chat.ask("Of the violin?", max_new_tokens=8).ids == expected.ask("Of the violin?", max_new_tokens=8).ids


@pytest.mark.parametrize(("point", "nth"), [("far.read", 1), ("far.read", 3), ("append.after_take", 2)])
def test_a_failed_fetch_or_append_of_an_answer_can_be_tried_again(point: str, nth: int) -> None:
    """No layer was compacted: the retry is as if unharmed, whatever was Near then."""
    chat, plain = (made(PlainChat(layers=2)) for _ in range(2))
    for one in (chat, plain):
        one.add(talk(120, seed=4))
        one.build()
        one.ask("About the choir?", max_new_tokens=2, remember=False)  # makes room, and reads a set
        while one._store.cache._store.give_way():  # so that the other set is read
            pass
    compactions = chat.report().compactions
    with testing.fault(point, nth), pytest.raises(RuntimeError):
        chat.ask("What of the orbit of the moon?", max_new_tokens=20)
    assert chat.turns == plain.turns and chat.report().questions == 1
    found = [one.ask("What of the orbit of the moon?", max_new_tokens=20) for one in (chat, plain)]
    assert found[0].ids == found[1].ids and found[0].route == found[1].route
    assert same(tables(chat), tables(plain)) and chat.report().compactions == compactions
    check_pages(chat._store.cache)


def test_reading_goes_on_where_it_failed() -> None:
    """Faults in every kind of step: the next build reads the rest, all tokens once."""
    chat, whole = made(), made()
    for c in (chat, whole):
        c.add(talk(200, seed=8))
    for point, nth in (
        ("append.after_take", 3),
        ("append.after_take", 14),
        ("plan.after_write", 1),
        ("plan.after_write", 9),
    ):
        with testing.fault(point, nth), pytest.raises(RuntimeError):
            chat.build()
    chat.build()
    whole.build()
    assert chat.report().tokens == whole.report().tokens
    assert chat.report().near <= chat.report().limit
    chat.ask("Of the boat?", max_new_tokens=2)


def test_refresh_rebuild_is_a_new_build() -> None:
    """To the byte, however the turns came before: a window that was short when topics were told apart is full again."""
    one, two = made(), made()
    history = talk(220, seed=9)
    for first in range(0, 220, 21):
        one.add(history[first : first + 21])
        one.build()
    two.add(history)
    two.build()
    assert not same(tables(one), tables(two))
    one.refresh("rebuild")
    assert same(tables(one), tables(two))
    assert [e.label for e in one.episodes] == [e.label for e in two.episodes]


def test_refresh_labels_compacts_what_is_stored() -> None:
    chat = made()
    history = talk(220, seed=10)
    chat.add(history[:60])
    chat.build()
    chat.add(history[60:])
    chat.build()
    compactions, tokens = chat.report().compactions, chat.report().tokens
    chat.refresh("labels")
    assert chat.report().compactions == compactions + 1 and chat.report().tokens == tokens
    assert chat.report().advice is None


def test_advice_when_windows_have_doubled() -> None:
    chat = made()
    history = talk(400, seed=11)
    chat.add(history[:150])
    chat.build()
    assert chat.report().advice is None
    chat.add(history[150:])
    chat.build()
    assert "twice as many windows" in str(chat.report().advice)


def test_bad_calls_are_named() -> None:
    chat = made()
    with pytest.raises(ValueError, match=r"turns\[1\]: text is blank|turns\[1\]: Turn: text is blank"):
        chat.add([("Ada", "hello"), ("Bo", "  ")])
    assert chat.turns == ()
    with pytest.raises(ValueError, match="text is blank"):
        chat.ask(" ")
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        chat.ask("hello", max_new_tokens=0)
    with pytest.raises(ValueError, match="200 more that are taken back, expected at most the 128 of a chunk"):
        chat.ask("hello", max_new_tokens=200, remember=False)
    with pytest.raises(ValueError, match="refresh: 'all' is unknown"):
        chat.refresh("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Conversation: unknown \['bugdet'\]"):
        made(bugdet=3)
    with pytest.raises(ValueError, match="budget is None"):
        Conversation(PlainChat(), None, embedder=CountedWords())  # type: ignore[arg-type]
    chat.close()
    with pytest.raises(RuntimeError, match="it was closed"):
        chat.ask("hello")


def test_a_report_can_be_read() -> None:
    chat = made()
    chat.add(talk(150, seed=12))
    chat.ask("Of the boat?", max_new_tokens=2)
    console = Console(width=120, record=True, file=StringIO())
    console.print(chat.report())
    text = console.export_text()
    for part in ("near bytes", "limit", "compactions", "episodes", "CountedWords"):
        assert part in text
    assert chat.report().to_dict()["turns"] == len(chat.turns)


def test_no_turns_is_a_plain_chat() -> None:
    chat = made()
    first = chat.ask("Hello there?", max_new_tokens=3)
    assert first.route is None and chat.report().episodes == ()
    for i in range(40):
        chat.ask(f"{chr(97 + i % 26)} boat harbour wave tide anchor?", max_new_tokens=8)
    assert chat.report().compactions > 0 and chat.report().near <= chat.report().limit
    assert words(3, 0).shape == (3,)


def test_labels_are_words_of_a_topic_and_no_names() -> None:
    """What is said in every topic alike, and who says it, tells none from the others."""
    chat = made()
    chat.add([Turn(t.speaker, f"well, well, about this: {t.text}") for t in talk(200, seed=13, switch=0.05)])
    chat.build()
    own = [set(words.split()) for words in TOPICS.values()]
    assert len(chat.episodes) == 4
    for episode in chat.episodes:
        assert any(set(episode.label.split(", ")) <= words for words in own), episode.label


class Endless(PlainChat):
    """Never stops by itself."""

    def forward(self, *args: Any, **options: Any) -> Any:
        logits = super().forward(*args, **options)
        if logits is not None:
            logits[END] = -torch.inf
        return logits


def test_an_answer_longer_than_a_chunk_compacts_within_it() -> None:
    chat = made(Endless())
    chat.add(talk(150, seed=13))
    chat.build()
    compactions = chat.report().compactions
    answer = chat.ask("Of the boat?", max_new_tokens=400)
    assert len(answer.ids) == 400 and chat.report().compactions > compactions + 2
    assert chat.report().near <= chat.report().limit
    assert chat.turns[-1].text == answer.text


def test_what_is_taken_back_leaves_the_recent_tokens_recent() -> None:
    """Sealed pages are the tail again once what came after them is gone: the next compaction leaves them."""
    chat = made(Endless())
    chat.add(talk(150, seed=14))
    chat.build()
    for question in ("Of the boat?", "Of bread?", "Of the moon?"):
        chat.ask(question, max_new_tokens=100, remember=False)
    length = chat.report().tokens
    chat.refresh("labels")
    for _, _, positions in tables(chat):
        for row in positions:
            assert set(range(length - 64, length)) <= set(row.tolist())


class Windowed(PlainChat):
    """Every second layer sees a sliding window."""

    def __init__(self) -> None:
        super().__init__()
        layers = [LayerSpec(2, 4, 32, 96 if i % 2 else None) for i in range(4)]
        self.shape = Shape(layers, torch.float32)


def test_answers_are_taken_back_from_sliding_windows() -> None:
    chat = made(Windowed())
    chat.add(talk(150, seed=15))
    chat.build()
    first = chat.ask("Of the boat?", max_new_tokens=100, remember=False)
    second = chat.ask("Of the boat?", max_new_tokens=100, remember=False)
    assert first.ids == second.ids and chat.report().near <= chat.report().limit


def test_one_window_is_an_episode() -> None:
    chat = made()
    chat.add([("Ada", "boat " * 600)])
    chat.build()
    assert len(chat.episodes) == 1 and chat.report().compactions > 0
    chat.ask("Of the boat?", max_new_tokens=2)


def test_the_last_piece_of_an_answer_is_streamed() -> None:
    class Broken(PlainChat):
        def text(self, ids: torch.Tensor) -> str:
            return super().text(ids) + ("\N{REPLACEMENT CHARACTER}" if len(ids) > 2 else "")

    one, two = made(Broken()), made(Broken())
    pieces = "".join(one.stream("Of the boat?", max_new_tokens=6))
    assert pieces == two.ask("Of the boat?", max_new_tokens=6).text
