"""What the routing evaluation measures, on dialogues small enough to count by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstrata.episodes import Turn
from kvstrata.quality import routing, routing_metrics
from kvstrata.quality.dialogues import Dialogue, Question
from kvstrata.quality.lexical import HashedWords, LatentWords, words
from kvstrata.quality.routing import Cut, Loaded, Outcome, chunks, grouping, measured, percentiles, read
from kvstrata.quality.routing_metrics import auroc, cells


class Angles:
    """Each text names an angle in degrees: its last number."""

    fingerprint = "angles"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def embed(self, texts: Sequence[str], kind: Any) -> Tensor:
        self.asked += [(kind, text) for text in texts]
        degrees = [math.radians(float(text.split()[-1].rstrip("?"))) for text in texts]
        return torch.tensor([[math.cos(a), math.sin(a)] for a in degrees], dtype=torch.float32)


def dialogue(degrees: Sequence[int], *questions: tuple[int, tuple[int, ...]]) -> Dialogue:
    turns = tuple(Turn("A", f"turn at {a}") for a in degrees)
    asked = tuple(Question(f"d/{i}", f"at {a}?", "one", where) for i, (a, where) in enumerate(questions))
    return Dialogue("d", turns, (0,), asked)


ONE = Cut(window=1, episodes=2, representatives=1)
SIX = dialogue([0, 10, 21, 88, 100, 111], (0, (0, 1)), (100, (4,)), (0, (2, 5)))
"""Three turns about one topic, three about another; the last question's evidence lies in both."""


def six() -> Loaded:
    reading = read(SIX, Angles(), ONE, len)
    return Loaded(reading, grouping(reading, np.array([0, 0, 0, 1, 1, 1])), [[1], [4]])


def test_recall_whole_some_and_tokens() -> None:
    loaded = six()
    length = len("A: turn at 0")
    assert list(loaded.reading.tokens) == [length, length + 1, length + 1, length + 1, length + 2, length + 2]
    shares = [(o.recall, o.whole, o.some, o.tokens) for o in (loaded.outcome(q, (0,)) for q in range(3))]
    assert shares == [(1, 1, 1, 3 * length + 2), (0, 0, 0, 3 * length + 2), (0.5, 0, 1, 3 * length + 2)]
    both = loaded.outcome(2, (1, 0), margin=0.5)
    assert (both.recall, both.whole, both.tokens, both.episodes, both.margin) == (1, 1, 6 * length + 7, (1, 0), 0.5)


def test_ppa_and_evaff() -> None:
    loaded = six()
    first = loaded.outcome(0, (0,))  # the prompt is turn 1, second nearest of six to the question at 0 degrees
    assert first.ppa == pytest.approx(1 / 5)
    # Ranked by cosine to turn 1, at 10 degrees: 1, 0, 2, 3, 4, 5.
    assert first.evaff == pytest.approx((1 / 5 + 0) / 2) and first.top == 1
    wrong = loaded.outcome(0, (1,))  # to turn 4, at 100 degrees: 4, 5, 3, 2, 1, 0
    assert wrong.evaff == pytest.approx((5 / 5 + 4 / 5) / 2) and wrong.top == 0
    assert wrong.ppa == pytest.approx(4 / 5)
    pair = loaded.outcome(0, (0, 1))
    assert pair.ppa == pytest.approx((1 / 5 + 4 / 5) / 2), "the mean over both prompts"
    assert Loaded(loaded.reading, loaded.group, None).outcome(0, (0,)).ppa is None
    # With turns 0 and 4 as one prompt: these two, then 1, 10 degrees off, 5, 3 and 2.
    wide = Loaded(loaded.reading, loaded.group, [[0, 4], [4]]).outcome(0, (0,))
    assert wide.evaff in (pytest.approx((0 + 2 / 5) / 2), pytest.approx((1 / 5 + 2 / 5) / 2)), "0 and 4 tie"


def test_percentiles() -> None:
    assert list(percentiles(np.array([0.5, 0.9, 0.5, 0.1]))) == [1 / 3, 0, 2 / 3, 1]
    assert list(percentiles(np.array([0.3]))) == [0]


def test_controls_by_expectation() -> None:
    loaded = six()
    even = loaded.mean(2, np.array([0.5, 0.5]))
    assert (even.recall, even.whole, even.some) == (0.5, 0, 1)
    assert loaded.mean(0, np.array([0.25, 0.75])).recall == 0.25
    assert loaded.best(1).episodes == (1,) and loaded.best(2).episodes == (0,), "ties: the lower"


def test_a_turn_over_two_windows_is_loaded_with_either() -> None:
    long = Dialogue(
        "d",
        (Turn("A", "x" * 450 + " 0"), Turn("A", "y" * 430 + ". " + "z" * 400 + " 90")),
        (0,),
        (Question("d/0", "at 0?", "one", (1,)),),
    )
    reading = read(long, HashedWords(), Cut(window=2), len)
    assert reading.holds.tolist() == [[True, False], [True, True]]
    loaded = Loaded(reading, grouping(reading, np.array([0, 1])), None)
    assert [loaded.outcome(0, (e,)).recall for e in (0, 1)] == [1, 1]


def test_every_rule_and_control_on_two_topics() -> None:
    pytest.importorskip("sklearn")
    embedder = Angles()
    reading = read(SIX, embedder, ONE, len)
    lines = measured(reading, ONE, 0)
    for rule in ("nearest_window", "centroid", "vote", "shipped"):
        chosen = [o.episodes for o in lines[rule, "raw"]]
        assert chosen == [(0,), (1,), (0,)], rule
    assert [o.recall for o in lines["nearest_window, two", "raw"]] == [1, 1, 1]
    assert [o.recall for o in lines["oracle", "-"]] == [1, 1, 0.5]
    assert [o.recall for o in lines["windows @8", "raw"]] == [1, 1, 1], "there are six windows"
    margin = 1 - math.cos(math.radians(88))
    assert lines["nearest_window", "raw"][0].margin == pytest.approx(margin, abs=1e-6)
    assert all(len(outcomes) == 3 for outcomes in lines.values())
    queries = [text for kind, text in embedder.asked if kind == "query"]
    assert queries[:3] == ["at 0?", "at 100?", "at 0?"], "a raw query is the question alone"
    assert all(t.startswith("Answer the question") and q in t for q, t in zip(queries, queries[3:], strict=False))


def test_the_shipped_rule_takes_the_longer_centroid() -> None:
    """Tight topics have long means: a dot product favours them, a cosine does not."""
    reading = read(dialogue([0, 60, 90, 91], (55, (1,))), Angles(), ONE, len)
    group = grouping(reading, np.array([0, 0, 1, 1]))
    loaded = Loaded(reading, group, None)
    assert routing._shipped(reading, loaded, "raw")[0].episodes == (1,)
    assert routing._routed(reading, loaded, "centroid", "raw")["centroid", "raw"][0].episodes == (0,)


def test_windows_alone_and_stretches_of_time() -> None:
    reading = read(SIX, Angles(), ONE, len)
    queries = reading.queries["raw"]
    assert [o.recall for o in routing._retrieved(reading, queries, 2)] == [1, 1, 0]
    assert [o.recall for o in routing._retrieved(reading, queries, 3)] == [1, 1, 0.5]
    assert chunks(reading, 4).labels.tolist() == [0, 0, 1, 2, 2, 3] and chunks(reading, 9).labels.tolist() == list(
        range(6)
    )


def test_shuffled_episodes_keep_their_sizes() -> None:
    reading = read(dialogue(list(range(40)), (0, (0,))), Angles(), ONE, len)
    group = grouping(reading, np.repeat([0, 1], [30, 10]))
    dealt = routing._dealt(reading, group, 3)
    assert np.bincount(dealt.labels).tolist() == [30, 10] and (dealt.labels != group.labels).any()
    assert routing._dealt(reading, group, 3).labels.tolist() == dealt.labels.tolist()


def test_a_dialogue_without_evidence_is_refused() -> None:
    with pytest.raises(ValueError, match="d: no question has evidence"):
        read(dialogue([0, 1], (0, ())), Angles(), ONE, len)


# --- Cells ------------------------------------------------------------------------------------------------------------


def record(recalls: dict[str, Sequence[float]], categories: Sequence[str], margins: Sequence[float]) -> dict[str, Any]:
    lines = {}
    for name, values in recalls.items():
        outcomes = [Outcome((0,), r, r == 1, r > 0, 10.0, margin=m) for r, m in zip(values, margins, strict=True)]
        lines[name] = routing.columns(outcomes)
    questions = [f"q{i}" for i in range(len(categories))]
    return {"windows": 4, "tokens": 40, "questions": questions, "categories": list(categories), "lines": lines}


def two_records() -> dict[tuple[str, int], dict[str, Any]]:
    a = {"r|raw": [1, 0, 1], "shipped|templated": [0, 0, 1], "random|-": [0.25] * 3, "oracle|-": [1, 0.5, 1]}
    b = {"r|raw": [0.5], "shipped|templated": [0.5], "random|-": [0.25], "oracle|-": [1]}
    return {("a", 0): record(a, ["x", "x", "y"], [0.3, 0.1, 0.2]), ("b", 0): record(b, ["y"], [0.05])}


def test_means_lift_gain_and_macro() -> None:
    found = {(c["rule"], c["category"]): c for c in cells(two_records())}
    everything, macro = found["r", "all"], found["r", "macro"]
    assert everything["n"] == 4 and everything["recall"] == pytest.approx(2.5 / 4)
    assert everything["lift"] == pytest.approx((0.625 - 0.25) / (0.875 - 0.25))
    assert everything["gain"] == pytest.approx((2.5 - 1.5) / 4)
    assert (found["r", "x"]["recall"], found["r", "y"]["recall"]) == (0.5, 0.75)
    assert macro["recall"] == pytest.approx((0.5 + 0.75) / 2) and macro["n"] == 4
    assert macro["gain"] == pytest.approx((0.5 + 0.0) / 2)
    assert (everything["whole"], everything["some"]) == (0.5, 0.75) and everything["tokens_share"] == 0.25
    assert everything["auroc"] == 1.0, "the two right ones have the largest margins"
    assert everything["low"] <= everything["recall"] <= everything["high"]
    assert found["shipped", "all"]["gain"] == found["shipped", "all"]["gain_high"] == 0


def test_intervals_are_over_dialogues() -> None:
    """A hundred questions of two dialogues are two draws, not a hundred."""
    names = ("r|raw", "shipped|templated", "random|-", "oracle|-")
    many = {
        (name, 0): record({line: [value] * n for line in names}, ["x"] * n, [0.1] * n)
        for name, value, n in (("a", 0.0, 75), ("b", 1.0, 25))
    }
    (whole,) = (c for c in cells(many) if (c["rule"], c["category"]) == ("r", "all"))
    assert (whole["low"], whole["recall"], whole["high"]) == (0, 0.25, 1)
    assert cells(many) == cells(dict(reversed(many.items()))), "the order of records plays no part"


def test_auroc_equals_all_pairs() -> None:
    rng = np.random.default_rng(1)
    margins, right = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.6
    pairs = [(a > b) + (a == b) / 2 for a in margins[right] for b in margins[~right]]
    assert auroc(margins, right) == pytest.approx(np.mean(pairs))
    assert auroc(margins, np.ones(60, bool)) is None


def test_no_records_no_cells() -> None:
    assert cells({}) == [] and routing_metrics.prompts([]) == []


# --- Embedders of words -----------------------------------------------------------------------------------------------

TEXTS = ["the red door and a blue door", "a boat on the sea", "sea and boat and sail", "red paint for the door"]


@pytest.mark.parametrize("kind", [HashedWords, LatentWords])
def test_words_are_embedded_by_what_they_share(kind: type[HashedWords] | type[LatentWords]) -> None:
    pytest.importorskip("sklearn")
    embedder = kind()
    embedder.fit(TEXTS)
    vectors = embedder.embed(TEXTS, "window")
    assert vectors.dtype == torch.float32 and torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-6)
    alone = torch.cat([embedder.embed([text], "window") for text in TEXTS])
    assert torch.allclose(alone, vectors, atol=1e-6), "a text's vector is its own"
    (query,) = embedder.embed(["What of the sail on that boat?"], "query")
    doors, boats = (vectors @ query)[[0, 3]], (vectors @ query)[[1, 2]]
    assert float(boats.min()) > 0.3 and float(doors.abs().max()) < 0.1
    assert not embedder.embed(["of the and"], "query").any(), "nothing said, no direction"


def test_hashed_words_weigh_rare_ones_more() -> None:
    embedder = HashedWords()
    even = embedder.embed(["boat door", "boat", "door"], "window")
    assert float(even[0] @ even[1]) == pytest.approx(float(even[0] @ even[2]))
    embedder.fit(["boat door", "boat", "boat", "sea"])
    fitted = embedder.embed(["boat door", "boat", "door"], "window")
    assert float(fitted[0] @ fitted[2]) > float(fitted[0] @ fitted[1])
    assert words("The BOAT's x-ray, No. 7_b") == ["boat", "x", "ray", "7", "b"]


def test_latent_words_of_one_word_are_refused() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="expected 2 of each"):
        LatentWords().fit(["boat", "boat"])
