"""Turns, utterances, windows: 20 tabled cuts; spans cover each text exactly once, whatever it is."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstrata.episodes import Turn, Utterance, Window, segment, turns_of, utterances


def words(n: int, end: str = "") -> str:
    """Words of four letters and a space, n characters in all, ending in ``end``."""
    return ("word " * n)[: n - len(end)] + end


# A text, or several; where each of its pieces starts; longest and shortest.
CUTS = {
    "one word": ("a", [0]),
    "exactly the longest": ("x" * 500, [0]),
    "no space at all: hard": ("x" * 1200, [0, 500, 1000]),
    "a hard cut leaves the shortest": ("x" * 505, [0, 495]),
    "spaces only: the last one": (words(600), [0, 500]),
    "no space in the first piece's last half": ("a" * 120 + " " + "b" * 600, [0, 121, 621]),
    "one sentence end": (words(300, "x. ") + words(300), [0, 300]),
    "the last of several sentence ends": (words(200, "x. ") + words(200, "x! ") + words(200), [0, 400]),
    "a sentence end at the very limit": (words(500, "x.") + " and then some more", [0, 500]),
    "a sentence end beyond the limit": (words(499, "xx") + "xx. and then some more", [0, 495]),
    "quotes belong to the sentence": (words(300, 'x?!") ') + words(300), [0, 300]),
    "a point inside a number ends nothing": (words(300, " 3.14") + "159" + " word" * 60, [0, 499]),
    "a line ends a sentence": (words(300, "x\n\n") + words(300), [0, 300]),
    "sentence ends without spaces": ("字" * 299 + "。" + "字" * 300, [0, 300]),
    "a short first sentence joins what follows": ("Oh! " + words(600), [0, 499]),
    "a short last sentence joins what precedes": (words(494, "x. ") + words(10, "x. ") + "Bye now.", [0, 494]),
    "too short a rest is not left": (words(495, "x. ") + "Bye now.", [0, 490]),
    "three pieces, three ways": (words(400, "x. ") + "y" * 600 + " " + words(480), [0, 400, 900, 1400]),
    "space within a text is kept, once": (words(495, "x.") + " " * 20 + words(300), [0, 500]),
    "a lone word before a long one": ("word " + "z" * 600, [0, 500]),
}


def test_twenty_cuts_are_tabled() -> None:
    assert len(CUTS) == 20


@pytest.mark.parametrize(("text", "starts"), CUTS.values(), ids=CUTS)
def test_a_text_is_cut_at(text: str, starts: list[int]) -> None:
    found = utterances([Turn("Ada", text)])
    assert [u.start for u in found] == starts
    assert [u.end for u in found] == [*starts[1:], len(text)]


def covered(turns: list[Turn], found: list[Utterance]) -> None:
    """Each text exactly once, in order."""
    assert [u.turn for u in found] == sorted(u.turn for u in found)
    for i, turn in enumerate(turns):
        mine = [u for u in found if u.turn == i]
        assert mine[0].start == 0 and mine[-1].end == len(turn.text)
        assert all(a.end == b.start for a, b in pairwise(mine))
        assert "".join(turn.text[u.start : u.end] for u in mine) == turn.text


LONG_TEXT = st.lists(
    st.sampled_from(
        ["a", "word", "x" * 30, "y" * 499, "z" * 501, ".", "!", "?”", "…", "。", " ", "  ", "\n", "\t", "é"]
    ),
    max_size=120,
).map("".join) | st.text(max_size=1500)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(LONG_TEXT.filter(str.strip), min_size=1, max_size=5),
    st.sampled_from([(500, 10), (40, 10), (20, 10), (2, 1)]),
)
@example(["a" + " " * 1000 + "b"], (500, 10))
@example([" " * 600 + "abc"], (500, 10))
@example(["." * 1001], (500, 10))
def test_pieces_cover_each_text_once_and_are_neither_long_nor_short(texts: list[str], sizes: tuple[int, int]) -> None:
    longest, shortest = sizes
    turns = [Turn("Ada", text) for text in texts]
    found = utterances(turns, longest, shortest)
    covered(turns, found)
    for u in found:
        assert u.end - u.start <= longest
        assert u.end - u.start >= shortest or turns[u.turn].text == turns[u.turn].text[u.start : u.end]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(LONG_TEXT.filter(str.strip), max_size=8),
    st.integers(1, 5),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_windows_hold_every_utterance_once(texts: list[str], window: int, bounded: bool, random) -> None:  # type: ignore[no-untyped-def]
    turns = [Turn("Ada", text) for text in texts]
    sessions = sorted({0, *random.sample(range(len(turns)), len(turns) // 2)}) if turns else []
    found = segment(turns, window=window, bounded=bounded, sessions=sessions)
    assert [u for w in found for u in w.utterances] == utterances(turns)
    borders = set(sessions) if bounded else set()
    for w, after in pairwise(found):
        assert len(w.utterances) == window or after.turns[0] in borders
    for w in found:
        assert 1 <= len(w.utterances) <= window
        assert not borders & set(range(w.turns[0] + 1, w.turns[-1] + 1))


def test_full_windows_stay_as_they_are_when_turns_are_added() -> None:
    turns = [Turn("Ada" if i % 2 else "Bo", words(10 + 37 * i % 900)) for i in range(1, 60)]
    whole = segment(turns)
    for n in range(len(turns)):
        full = [w for w in segment(turns[:n]) if len(w.utterances) == 4]
        assert full == whole[: len(full)]
        assert len(full) == len(utterances(turns[:n])) // 4


def test_the_text_of_a_window() -> None:
    turns = [
        Turn("Ada", "  I moved to Porto in May. ", date="8 May"),
        Turn("Bo", "Nice!", caption="a bridge"),
        Turn("Ada", words(300, "x. ") + words(297), date="9 May", caption="my flat"),
    ]
    plain, last = segment(turns, window=3)
    assert plain.text == f"Ada: I moved to Porto in May.\nBo: Nice!\nAda: {words(300, 'x. ').strip()}"
    assert plain.turns == (0, 1, 2) and last.turns == (2,)
    assert last == Window((Utterance(2, 300, 597),), f"Ada: {words(297).strip()}")
    full, last = segment(turns, window=3, dates=True, captions=True)
    first, second, third = full.text.splitlines()
    assert first == "[8 May] Ada: I moved to Porto in May."
    assert second == "Bo: Nice! (image: a bridge)"
    assert third.startswith("[9 May] Ada: word") and third.endswith("x.")  # the caption comes once, with the last piece
    assert last.text.startswith("[9 May] Ada: word") and last.text.endswith(" (image: my flat)")


def test_windows_cross_sessions_unless_bounded() -> None:
    turns = [Turn("Ada", f"number {i}") for i in range(11)]
    of = [[w.turns for w in segment(turns, bounded=b, sessions=[0, 6, 7])] for b in (False, True)]
    assert of[0] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10)]
    assert of[1] == [(0, 1, 2, 3), (4, 5), (6,), (7, 8, 9, 10)]
    assert segment([]) == [] == segment([], bounded=True, sessions=[])


def test_turns_are_given_in_three_ways() -> None:
    turn = Turn("Ada", "Hello", date="May", id="D1:1")
    assert turns_of([turn, ("Bo", "Hi"), ["Bo", "Hm"], {"speaker": "Bo", "text": "Hi", "caption": "x"}]) == [
        turn,
        Turn("Bo", "Hi"),
        Turn("Bo", "Hm"),
        Turn("Bo", "Hi", caption="x"),
    ]
    assert turns_of(iter([dataclasses.asdict(turn)])) == [turn]
    assert turns_of([]) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (("Ada", "  \n"), r"turns\[1\]: Turn: text is blank"),
        (("", "Hello"), r"turns\[1\]: Turn: speaker is blank"),
        (("Ada", 7), r"turns\[1\]: Turn: text is 7, expected a str$"),
        (("Ada", "Hello", "May"), r"turns\[1\]: \('Ada', 'Hello', 'May'\), expected a Turn"),
        ("ab", r"turns\[1\]: 'ab', expected a Turn"),
        (None, r"turns\[1\]: None, expected a Turn"),
        (
            {"speaker": "Ada", "text": "Hello", "name": "x"},
            r"turns\[1\]: unknown keys \['name'\], expected speaker, text",
        ),
        ({"speaker": "Ada"}, r"turns\[1\]: no text, expected"),
        ({"speaker": "Ada", "text": "Hello", "date": 8}, r"turns\[1\]: Turn: date is 8, expected a str or None"),
    ],
)
def test_a_bad_turn_is_named(bad: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        turns_of([("Bo", "Fine"), bad])  # type: ignore[list-item]


def test_bad_input() -> None:
    turns = [Turn("Ada", "Hello")] * 4
    with pytest.raises(ValueError, match="Turn: text is blank"):
        Turn("Ada", " ")
    for lone in ("Hello", {"speaker": "Ada", "text": "Hello"}):
        with pytest.raises(ValueError, match=f"got a single {type(lone).__name__}"):
            turns_of(lone)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window is 0, expected at least 1"):
        segment(turns, window=0)
    with pytest.raises(ValueError, match="bounded without sessions"):
        segment(turns, bounded=True)
    for sessions in ([], [1, 2], [0, 2, 2], [0, 3, 1], [0, 4], [-1, 0]):
        with pytest.raises(ValueError, match="sessions are"):
            segment(turns, bounded=True, sessions=sessions)
    for longest, shortest in ((10, 6), (10, 0), (0, 0)):
        with pytest.raises(ValueError, match="shortest is"):
            utterances(turns, longest, shortest)
