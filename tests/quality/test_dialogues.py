"""LoCoMo and RealTalk files: handmade ones in their formats, and the counts of the real ones where a user has them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvstrata.quality import dialogues
from kvstrata.quality.dialogues import WORDLESS, counts, evidence, locomo, realtalk


def said(speaker: str, place: str, text: str, **more: str) -> dict[str, str]:
    return {"speaker": speaker, "dia_id": place, "text": text, **more}


def asked(category: int, ids: Any, answer: Any = "yes") -> dict[str, Any]:
    return {"question": "Was it so?", "answer": answer, "evidence": ids, "category": category}


def conversation() -> dict[str, Any]:
    """Two sessions of three turns and one, session 10 last, a date without its session, and one question of each sort."""
    return {
        "sample_id": "conv-7",
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Ben",
            "session_10_date_time": "noon, 3 May",
            "session_10": [said("Ann", "D10:1", "Late.")],
            "session_2_date_time": "noon, 1 May",
            "session_2": [
                said("Ann", "D2:1", "First."),
                said("Ben", "D2:2", "Second.", blip_caption="a red door"),
                said("Ann", "D2:3", " ", blip_caption="a cat"),
            ],
            "session_11_date_time": "noon, 9 May",
        },
        "qa": [
            asked(4, ["D2:1"], answer=2022),
            asked(1, ["D10:1; D2:2", "D2:1"]),
            asked(2, ["D:2:03"]),
            asked(3, ["D"]),
            asked(3, []),
            {"question": "Never?", "adversarial_answer": "no", "evidence": ["D2:1"], "category": 5},
            asked(4, ["D2:9", "D2:2"]),
        ],
    }


def written(folder: Path, name: str, value: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_locomo_sessions_come_by_number_and_dates_make_none(tmp_path: Path) -> None:
    (one,) = locomo(written(tmp_path, "l.json", [conversation()]))
    assert [t.id for t in one.turns] == ["D2:1", "D2:2", "D2:3", "D10:1"] and one.sessions == (0, 3)
    assert [t.date for t in one.turns] == ["noon, 1 May"] * 3 + ["noon, 3 May"]
    assert (one.turns[1].text, one.turns[1].caption) == ("Second.", "a red door")
    assert one.turns[2].text == "a cat", "a turn without words shows its caption"


def test_locomo_evidence_is_looked_up(tmp_path: Path) -> None:
    (one,) = locomo(written(tmp_path, "l.json", [conversation()]))
    assert [q.evidence for q in one.questions] == [(0,), (0, 1, 3), (2,), (), (), (0,), (1,)]
    assert [q.usable for q in one.questions] == [True, True, True, False, False, False, True]
    assert [q.dangling for q in one.questions] == [0, 0, 0, 0, 0, 0, 1]
    assert one.questions[0].answer == "2022" and one.questions[5].answer == ""
    assert [q.id for q in one.questions[:2]] == ["conv-7/0", "conv-7/1"]


def test_counts(tmp_path: Path) -> None:
    assert counts(locomo(written(tmp_path, "l.json", [conversation()]))) == {
        "dialogues": 1,
        "sessions": 2,
        "turns": 4,
        "questions": 7,
        "categories": {"single-hop": 2, "multi-hop": 1, "temporal": 1, "open-domain": 2, "adversarial": 1},
        "usable": 4,
        "dangling": 1,
    }


PLACES = {(1, 1): 0, (1, 2): 1, (1, 3): 2, (2, 1): 3, (2, 2): 4, (12, 5): 5}


@pytest.mark.parametrize(
    ("texts", "turns", "dangling"),
    [
        ([], (), 0),
        ([""], (), 0),
        (["D1:1"], (0,), 0),
        (["D1:01"], (0,), 0),
        (["D:1:2"], (1,), 0),
        (["D1:1 D2:1 D1:2"], (0, 1, 3), 0),
        (["D1:1, D2:1; D1:2", "D1:1"], (0, 1, 3), 0),
        (["D1:1-D1:3"], (0, 1, 2), 0),
        (["D1:1 – D1:3"], (0, 1, 2), 0),
        (["D1:1-3, D12:5"], (0, 1, 2, 5), 0),
        (["D1:2-D2:1"], (1, 2, 3), 0),  # over the border of two sessions
        (["D1:3-D1:1"], (0, 2), 0),  # backwards: two ids
        (["D2:1-D2:7"], (3, 4), 1),
        (["D3:1"], (), 1),
        (["D12:50", "D12:5"], (5,), 1),  # no id is another's beginning
        (["D1:20"], (), 1),
    ],
)
def test_ids(texts: list[str], turns: tuple[int, ...], dangling: int) -> None:
    assert evidence(texts, PLACES) == (turns, dangling)


def chat(turns: int, **more: Any) -> dict[str, Any]:
    session = [
        {"clean_text": f"Line {i}.", "text": "raw", "speaker": "Eva", "date_time": f"{i} June", "dia_id": f"D1:{i}"}
        for i in range(1, turns + 1)
    ]
    return {"name": {"speaker_1": "Eva"}, "session_1": session, **more}


def test_realtalk_folder(tmp_path: Path) -> None:
    second = chat(2, qa=[asked(3, "D1:1-D1:2"), asked(1, None)])
    written(tmp_path, "Chat_2_Eva_Max.json", second)
    written(tmp_path, "Chat_1_Eva_Tom.json", chat(5, qa=[asked(2, ["D1:2-D1:4", "D1:9"])]))
    (tmp_path / "notes.txt").write_text("no chat")
    one, two = realtalk(tmp_path)
    assert (one.id, two.id) == ("chat-1", "chat-2"), "ids are numbers: the files' names name people"
    assert one.turns[0].text == "Line 1." and one.turns[4].date == "5 June"
    (question,) = one.questions
    assert (question.evidence, question.dangling, question.category) == ((1, 2, 3), 1, "temporal")
    assert [q.usable for q in two.questions] == [True, False] and two.questions[0].category == "commonsense"


def test_realtalk_list_in_one_file_and_turns_without_words(tmp_path: Path) -> None:
    silent = chat(1)
    silent["session_1"].append({"clean_text": "", "speaker": "Max", "dia_id": "D1:2"})
    one, two = realtalk(written(tmp_path, "all.json", [silent, chat(3)]))
    assert [t.text for t in one.turns] == ["Line 1.", WORDLESS] and len(two.turns) == 3 and two.questions == ()


def broken(**more: Any) -> dict[str, Any]:
    return conversation() | more


@pytest.mark.parametrize(
    ("held", "said_of_it"),
    [
        ({}, "l.json: expected list, got dict"),
        ([1], r"l.json\[0\]: expected dict, got int"),
        ([broken(conversation=None)], "conv-7: conversation: expected dict, got NoneType"),
        ([broken(conversation={"session_1": [7]})], r"conv-7: session_1\[0\]: expected dict, got int"),
        ([broken(conversation={"session_1": [{"text": "x"}]})], "speaker: expected str, got NoneType"),
        ([broken(conversation={"session_1": [{"text": 3, "speaker": "A"}]})], "text: expected str, got int"),
        (
            [broken(conversation={"session_1": [{"text": "x", "speaker": " "}]})],
            r"session_1\[0\]: Turn: speaker is blank",
        ),
        ([broken(conversation={"session_1_date_time": "noon"})], "expected lists named session_<n>"),
        ([broken(qa=[asked(9, [])])], r"conv-7/0: category is 9, expected one of \[1, 2, 3, 4, 5\]"),
        ([broken(qa=[asked(1, [["D1:1"]])])], "conv-7/0: evidence: expected str, got list"),
        ([broken(), broken()], "sample_id: conv-7 more than once"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, held: Any, said_of_it: str) -> None:
    with pytest.raises(ValueError, match=said_of_it):
        locomo(written(tmp_path, "l.json", held))


def test_no_json_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text('{"secret": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"l\.json: expected JSON") as refused:
        locomo(tmp_path / "l.json")
    assert "secret" not in str(refused.value)
    with pytest.raises(OSError, match="none"):
        locomo(tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"holds no \.json file"):
        realtalk(tmp_path / "empty")


def test_the_digest_tells_files_apart(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a.json", [1]), written(tmp_path, "b.json", [2])
    assert dialogues.digest(a) == dialogues.digest(a) != dialogues.digest(b)


# --- The files themselves, where a user has them ----------------------------------------------------------------------


def given(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no file")
    return Path(os.environ[variable])


def test_counts_of_locomo() -> None:
    found = counts(locomo(given("KVSTRATA_LOCOMO")))
    assert (found["sessions"], found["turns"], found["questions"], found["usable"]) == (272, 5882, 1986, 1536)
    by_number = [found["categories"][name] for name in dialogues.LOCOMO.values()]
    assert by_number == [282, 321, 96, 841, 446]


def test_counts_of_realtalk() -> None:
    found = counts(realtalk(given("KVSTRATA_REALTALK")))
    assert (found["turns"], found["questions"], found["usable"]) == (8944, 728, 705)
    assert [found["categories"][name] for name in dialogues.REALTALK.values()] == [301, 319, 108]
