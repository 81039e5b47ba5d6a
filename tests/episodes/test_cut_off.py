"""Saves that are killed, files that are damaged or made up, text that is read again or was not kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keeping import QUESTIONS, answers, content, elsewhere, full, loaded, made
from plain import PlainChat
from topics import TOPICS, CountedWords, talk

from kvstrata import testing
from kvstrata.episodes import folder as folders
from kvstrata.episodes.conversation import Conversation
from kvstrata.episodes.folder import LOCK, MANIFEST, encoded

# --- kills ------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No more is done, as after a SIGKILL."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """calls(n): the n-th file call from now on kills; returns the list of those that were made, also of the last."""
    made_: list[str] = []
    last = 0

    def point(name: str) -> None:
        made_.append(name)
        if len(made_) == last:
            raise Killed

    def from_now(n: int) -> list[str]:
        nonlocal last
        made_.clear()
        last = n
        return made_

    monkeypatch.setattr(folders, "fault_point", point)
    yield from_now


def test_a_kill_at_any_file_call_leaves_the_old_or_the_new(tmp_path: Path, calls: Callable[[int], list[str]]) -> None:
    chat = full(110, 1)
    chat.save(tmp_path / "base")
    old = content(chat)
    chat.ask("What of the oven?", max_new_tokens=3)
    chat.refresh("labels")
    new, kept = content(chat), chat._kept
    assert old != new
    found, n = [], 0
    while True:
        n += 1
        folder = tmp_path / f"{n}"
        shutil.copytree(tmp_path / "base", folder)
        chat._kept = kept
        done = calls(n)
        try:
            chat.save(folder)
        except Killed:
            names = list(done)
        else:
            break
        calls(0)
        other = loaded(folder, 1)
        now = content(other)
        assert now in (old, new), f"killed at call {n}, {names[-1]}"
        found.append((names[-1], now == new))
        if n % 6 == 0:  # what is left over is in nobody's way
            other.save(folder)
            assert content(loaded(folder, 1)) == now
            assert len(list(folder.glob("index-*"))) == 1
        shutil.rmtree(folder)
    kinds = [name for name, _ in found]
    assert {"disk.write", "disk.sync", "disk.rename", "disk.remove"} == set(kinds)
    switched = kinds.index("disk.rename")
    assert [is_new for _, is_new in found] == [i > switched for i in range(len(found))]
    files = {name for name in os.listdir(folder) if "-" in name} - set(os.listdir(tmp_path / "base"))
    assert kinds[:switched].count("disk.sync") == len(files) + 2, "each new file, then the folder, then the manifest"
    assert kinds[switched - 3 : switched + 2] == ["disk.sync", "disk.write", "disk.sync", "disk.rename", "disk.sync"]


def test_a_kill_in_the_first_save_leaves_nothing(tmp_path: Path, calls: Callable[[int], list[str]]) -> None:
    chat = full(60, 1)
    for n in (1, 2, 4, 9):
        calls(n)
        with pytest.raises(Killed):
            chat.save(tmp_path / "c")
        with pytest.raises(RuntimeError, match=r"MANIFEST\.json: it is missing, expected a saved conversation"):
            loaded(tmp_path / "c", 1)
    calls(0)
    chat.save(tmp_path / "c")
    assert content(loaded(tmp_path / "c", 1)) == content(chat)


def test_a_failed_save_takes_its_files_back(tmp_path: Path) -> None:
    chat = full(60, 1)
    chat.save(tmp_path / "c")
    before = {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}
    chat.ask("What of the boat?", max_new_tokens=2)
    for point, nth in (("disk.write", 1), ("disk.write", 5), ("disk.sync", 2), ("disk.rename", 1)):
        with testing.fault(point, nth), pytest.raises(RuntimeError, match="fault injected"):
            chat.save(tmp_path / "c")
        if point != "disk.rename":
            assert {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()} == before
    chat.save(tmp_path / "c")
    with testing.fault("disk.remove"), pytest.raises(RuntimeError, match="fault injected"):
        chat.save(tmp_path / "c")
    chat.save(tmp_path / "c")
    assert content(loaded(tmp_path / "c", 1)) == content(chat)


SAVING = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
torch.set_num_threads(1)
from keeping import loaded
from pathlib import Path
chat = loaded(Path(sys.argv[1]))
while True:
    chat.ask("What of the boat?", max_new_tokens=3)
    print("saves", flush=True)
    chat.save(sys.argv[1])
"""


def test_a_real_kill(tmp_path: Path) -> None:
    """SIGKILL in the midst of saves: what is there is a whole conversation, which goes on and is saved."""
    chat = full()
    chat.save(tmp_path / "c")
    process = elsewhere(SAVING, tmp_path / "c")
    assert process.stdout is not None
    for _ in range(4):
        assert process.stdout.readline() == "saves\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, error
    other = loaded(tmp_path / "c")
    assert other.turns[: len(chat.turns)] == chat.turns and len(other.turns) >= len(chat.turns) + 6
    other.ask("And the soup?", max_new_tokens=2)
    other.save(tmp_path / "c")
    assert content(loaded(tmp_path / "c")) == content(other)


# --- damage -----------------------------------------------------------------------------------------------------------------


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    """In every region of every file: the head's size, the head, the data from first to last; the manifest wherever. In a
    page of a set: when a question reads it."""
    full(80, 1).save(tmp_path / "c")
    found = later = 0
    private = {f"pages-1-{e}.safetensors" for e in range(1, 5)}
    for file in sorted((tmp_path / "c").iterdir()):
        text = file.read_bytes()
        if file.name == LOCK:
            assert text == b""
            continue
        head = 8 + int.from_bytes(text[:8], "little") if file.suffix == ".safetensors" else 1
        spread = range(0, len(text), max(1, len(text) // 24)) if file.name == MANIFEST else ()
        for at in {0, 9, head, (head + len(text)) // 2, len(text) - 1, *spread}:
            file.write_bytes(text[:at] + bytes([text[at] ^ 0x10]) + text[at + 1 :])
            if page := file.name in private and head <= at < len(text) - 1:
                match = rf"{file.name}: the \d+ bytes at \d+ are not .*, where a page of set \d was read"
            else:
                match = (
                    rf"{file.name}: (its sha256 is .*, expected|its content is damaged|its head|there is no|.* lies)"
                )
            with pytest.raises(RuntimeError, match=match):
                chat = loaded(tmp_path / "c", 1)
                assert page
                later += 1
                for e in range(4):
                    chat._store.show([e])
            found += 1
        for wrong in (text[:-1], text + b"\n"):
            file.write_bytes(wrong)
            with pytest.raises(RuntimeError, match=rf"{file.name}: (it has \d+ bytes, expected \d+|its content)"):
                loaded(tmp_path / "c", 1)
        file.unlink()
        with pytest.raises(RuntimeError, match=rf"{file.name}: .*expected"):
            loaded(tmp_path / "c", 1)
        file.write_bytes(text)
    assert found > 40 and later >= 4
    loaded(tmp_path / "c", 1)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that is whole, and other."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_bytes(encoded(manifest))


@pytest.mark.parametrize(
    "name", ["../turns-1.jsonl", "a/turns-1.jsonl", "/etc/passwd", "..", "turns-1.jsonl\n", "x.pkl"]
)
def test_file_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    made(1).save(tmp_path / "c")
    rewritten(tmp_path / "c", lambda m: m["files"].update({name: {"bytes": 0, "sha256": ""}}))
    with pytest.raises(ValueError, match="names the file .*, expected one of the folder"):
        loaded(tmp_path / "c", 1)


def test_links_are_not_followed(tmp_path: Path) -> None:
    full(60, 1).save(tmp_path / "c")
    turns = tmp_path / "c" / "turns-1.jsonl"
    turns.rename(tmp_path / "t")
    turns.symlink_to(tmp_path / "t")
    with pytest.raises(RuntimeError, match=r"turns-1\.jsonl: .*expected a file of \d+ bytes"):
        loaded(tmp_path / "c", 1)


def test_other_models_and_formats_are_refused(tmp_path: Path) -> None:
    full(60, 1).save(tmp_path / "c")
    with pytest.raises(ValueError, match=f"model is '{1:064x}', expected '{0:064x}', as it was saved"):
        Conversation.load(tmp_path / "c", PlainChat(1, seed=1), embedder=CountedWords())
    with pytest.raises(ValueError, match="embedder is 'counted words 64', expected 'counted words 256'"):
        loaded(tmp_path / "c", 1, embedder=CountedWords(64))
    model = PlainChat(1)
    model.tokenizer_fingerprint = "t"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="tokenizer is 't', expected None"):
        Conversation.load(tmp_path / "c", model, embedder=CountedWords())
    rewritten(tmp_path / "c", lambda m: m.update(format=1))
    with pytest.raises(ValueError, match="format is 1, expected 4"):
        loaded(tmp_path / "c", 1)


def cut(m: dict[str, Any], *keys: str, to: Any) -> None:
    for key in keys[:-1]:
        m = m[key]
    m[keys[-1]] = to


@pytest.mark.parametrize(
    ("keys", "to", "text"),
    [
        (("counters", "length"), 3, r"floor is \d+, expected 0..3"),
        (("counters", "length"), None, "holds what no conversation does"),
        (("counters", "floor"), -1, "floor is -1"),
        (("counters", "windows"), 10_000, "holds what no conversation does"),
        (("counters", "tau"), 7, "tau is 7"),
        (("kinds",), ["f32x64"], "expected some of"),
        (("kinds",), [], "kinds"),
        (("pages",), [], "entries are"),
        (("settings", "sizes", "budget"), 100, "holds what no conversation does"),
        (("settings",), None, "holds what no conversation does"),
    ],
)
def test_a_whole_manifest_that_says_nonsense(keys: tuple[str, ...], to: Any, text: str, tmp_path: Path) -> None:
    """Nothing but an error comes of it, and no page stays taken."""
    full(60, 1).save(tmp_path / "c")
    rewritten(tmp_path / "c", lambda m: cut(m, *keys, to=to))
    with pytest.raises(RuntimeError, match=text):
        loaded(tmp_path / "c", 1)


# --- repair, and no text ----------------------------------------------------------------------------------------------------


def test_repair_reads_the_text_again(tmp_path: Path) -> None:
    chat = made(2)
    chat.add(talk(100, seed=1))
    chat.build()
    chat.save(tmp_path / "c")
    (page,) = (tmp_path / "c").glob("pages-1-0.*")
    text = page.read_bytes()
    page.write_bytes(text[:4000] + bytes(1000) + text[5000:])
    with pytest.raises(RuntimeError, match="its sha256"):
        loaded(tmp_path / "c", 2)
    other = loaded(tmp_path / "c", 2, repair=True)
    anew = made(2)
    anew.add(chat.turns)
    anew.build()
    assert content(other) == content(anew)
    other.save(tmp_path / "d")
    other.save(tmp_path / "c")  # nothing of what was damaged is used
    assert content(loaded(tmp_path / "c", 2)) == content(anew)
    (turns,) = (tmp_path / "c").glob("turns-*")
    turns.write_bytes(turns.read_bytes()[:-2])
    with pytest.raises(RuntimeError, match="turns-2.jsonl: it has"):
        loaded(tmp_path / "c", 2, repair=True)


@pytest.mark.parametrize("turns", [150, 30])
def test_without_its_text(turns: int, tmp_path: Path) -> None:
    """No turn is on disk; it answers as before, goes on through new topics, and refuses what needs the text."""
    chat = made(2)
    chat.add(talk(turns, seed=6))
    chat.build()
    chat.save(tmp_path / "c", keep_text=False)
    assert not list((tmp_path / "c").glob("turns-*"))
    secret = [w for w in TOPICS["sea"].split() if any(w.encode() in f.read_bytes() for f in (tmp_path / "c").iterdir())]
    assert not secret
    other = loaded(tmp_path / "c", 2)
    assert other.turns == () and len(other.episodes) == 4 and other.report().advice is None
    if turns == 150:
        assert [a[0] for a in answers(chat)] == [a[0] for a in answers(other)]
    other.add(talk(90, seed=7, topics=("garden", "music")))
    other.build()
    assert other.report().compactions > 0 and len(other.episodes) > 4
    for what in ("labels", "rebuild"):
        with pytest.raises(ValueError, match="its text was not kept"):
            other.refresh(what)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_text is True, expected False: the text was not kept before"):
        other.save(tmp_path / "c")
    other.save(tmp_path / "c", keep_text=False)
    again = loaded(tmp_path / "c", 2)
    for question in QUESTIONS[::4]:
        first, second = (c.ask(question, max_new_tokens=6, remember=False) for c in (again, other))
        assert (first.ids, first.route) == (second.ids, second.route)
    page = next((tmp_path / "c").glob("pages-*"))
    page.write_bytes(b"")
    with pytest.raises(RuntimeError, match="it has 0 bytes"):
        loaded(tmp_path / "c", 2, repair=True)
