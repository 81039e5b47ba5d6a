"""Conversations on disk: the same after a load, whole after any kill, small when little is new; damage is found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from feeding import check_pages
from plain import PlainChat
from topics import TOPICS, CountedWords, talk

from kvstrata import testing
from kvstrata.episodes import InputEmbedding, Router, Turn
from kvstrata.episodes import folder as folders
from kvstrata.episodes.conversation import Conversation
from kvstrata.episodes.folder import LOCK, MANIFEST, Folder, encoded
from kvstrata.episodes.saved import load_conversation, save_conversation

HERE = Path(__file__).parent
QUESTIONS = [f"What of the {word}?" for words in TOPICS.values() for word in words.split()[:4]]


def made(layers: int = 4, **options: Any) -> Conversation:
    options = {"chunk": 128, "prompt_tokens": 32, "embedder": CountedWords()} | options
    return Conversation(PlainChat(layers), options.pop("budget", "256tok"), **options)


def loaded(path: Path, layers: int = 4, **options: Any) -> Conversation:
    options = {"embedder": CountedWords()} | options
    return Conversation.load(path, PlainChat(layers), **options)


def full(turns: int = 150, layers: int = 4, **options: Any) -> Conversation:
    """After compactions, a routed question, and turns that are not read yet."""
    chat = made(layers, **options)
    chat.add(talk(turns, seed=1))
    chat.build()
    chat.ask("Which harbour did the boat and its captain reach?", max_new_tokens=4)
    chat.add(talk(3, seed=2))
    return chat


def content(chat: Conversation) -> list[Any]:
    """Tables and bytes of all rows, and all else that answers depend on."""
    cache, seq, out = chat._store.cache, chat._store._seq, []
    for layer, spec in enumerate(cache.shape.layers):
        out.append([t.view(torch.uint8).numpy().tobytes() for t in cache.materialize(layer, seq)])
        for head in range(spec.kv_heads):
            _, alive, hidden, sealed = cache._store.row(seq.id, layer, head)
            tags, aside, _ = cache._store.row_sets(seq.id, layer, head)
            out.append([alive, hidden, sealed, tags, aside, cache._store.centre(seq.id, layer, head)])
    history, store = chat._history, chat._store
    topics = history.topics
    out.append([history.turns, history.windows, history.left, history.clustered, [p.tolist() for p in history.prompts]])
    if topics is not None and history.vectors is not None:
        out.append([topics.labels.tolist(), topics.tau, topics.strays, topics.refused, topics.zeros])
        out.append([history.vectors.numpy().tobytes(), topics.totals.tobytes(), topics.held.tobytes()])
    out.append([chat._queue.tolist(), chat._begun, chat._turned, chat._sizes])
    out.append([store.length, store.pending, store.compactions, store.episodes, store._view])
    out.append([cache.crop_floor(seq), cache._store.view(seq.id)])
    return out


def entries(chat: Conversation) -> int:
    """Pages of all rows."""
    cache, seq = chat._store.cache, chat._store._seq.id
    places = [(layer, h) for layer, spec in enumerate(cache.shape.layers) for h in range(spec.kv_heads)]
    return sum(len(cache._store.row(seq, *place)[0]) for place in places)


def answers(chat: Conversation) -> list[Any]:
    found = []
    for i, question in enumerate(QUESTIONS):
        answer = chat.ask(question, max_new_tokens=6, remember=i % 3 > 0)
        route = answer.route
        found.append([list(answer.ids), None if route is None else [list(route.episodes), list(route.scores)]])
    return found


FRESH = """
import json, sys
sys.path[:0] = sys.argv[2:]
import torch
torch.set_num_threads(1)
from test_saved import answers, content, loaded
from pathlib import Path
from hashlib import sha256
chat = loaded(Path(sys.argv[1]))
print(json.dumps([sha256(repr(content(chat)).encode()).hexdigest(), answers(chat)]))
"""


def elsewhere(script: str, path: Path, **options: Any) -> subprocess.Popen[str]:
    """The script in a fresh process."""
    folders_ = (HERE, HERE.parent / "store", HERE.parents[1] / "python")
    command = [sys.executable, "-c", script, str(path), *map(str, folders_)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# --- the same ---------------------------------------------------------------------------------------------------------------


def test_a_fresh_process_goes_on_as_if_nothing_was(tmp_path: Path) -> None:
    """Pages bit-equal, twenty answers equal; ``content`` has everything else."""
    chat = full()
    save_conversation(chat, tmp_path / "c")
    process = elsewhere(FRESH, tmp_path / "c")
    before = sha256(repr(content(chat)).encode()).hexdigest()
    expected = answers(chat)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    digest, found = json.loads(out)
    assert digest == before
    assert len(found) == 20 and found == expected
    assert len({tuple(route[0]) for _, route in found}) > 2


@pytest.mark.parametrize(
    "options",
    [
        {"private": "int8", "heads": "uniform"},
        {"episodes": 1, "max_episodes": 2, "bounded": True, "dates": True},
        {"router": Router("vote", margin=0.3), "tau": 0.5, "layers": (256, 240), "recent": 48},
    ],
    ids=["int8", "one", "router"],
)
def test_settings_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    chat = Conversation(PlainChat(2), "256tok", chunk=128, prompt_tokens=32, embedder=CountedWords(), **options)
    for part in range(3):
        chat.add([Turn(t.speaker, t.text, date=f"day {part}") for t in talk(59, seed=part)])
        chat.build()
    chat.ask("What of the boat?", max_new_tokens=2)
    chat.save(tmp_path / "c")
    other = load_conversation(tmp_path / "c", PlainChat(2), embedder=CountedWords())
    assert content(other) == content(chat)
    assert (other._how, other._router, other._sizes) == (chat._how, chat._router, chat._sizes)
    assert answers(other) == answers(chat)
    assert content(other) == content(chat)
    if "private" in options:
        assert other._store.cache.report().states["int8"] > 0
    assert other._store.cache.report().far_tokens > 0 or "episodes" in options


def test_before_any_token_and_before_topics(tmp_path: Path) -> None:
    chat = made(2)
    chat.save(tmp_path / "c")
    assert content(loaded(tmp_path / "c", 2)) == content(chat)
    chat.add([("Ada", "The \ud800 boat\u2028left — nach Málaga."), Turn("Bo", "\n\r x ", caption="a quay", id="D1:2")])
    chat.save(tmp_path / "c")
    other = loaded(tmp_path / "c", 2)
    assert content(other) == content(chat) and other.turns == chat.turns
    assert other.ask("Where?", max_new_tokens=4).ids == chat.ask("Where?", max_new_tokens=4).ids
    chat.save(tmp_path / "c")
    assert content(loaded(tmp_path / "c", 2)) == content(chat)


def test_an_embedder_comes_back_as_it_was_fitted(tmp_path: Path) -> None:
    model = PlainChat(2)
    chat = made(2, embedder=InputEmbedding(model.embeddings, model.plain))
    chat.add(talk(120, seed=3))
    chat.ask("What of the soup?", max_new_tokens=2)
    chat.save(tmp_path / "c")
    with pytest.raises(ValueError, match=r"embedder is 'counted words 256', expected '[0-9a-f]{64}', as it was saved"):
        loaded(tmp_path / "c", 2)
    other = loaded(tmp_path / "c", 2, embedder=InputEmbedding(model.embeddings, model.plain))
    assert answers(other) == answers(chat)


def test_the_limit_holds_while_loading(tmp_path: Path) -> None:
    chat = full()
    chat.save(tmp_path / "c")
    other = loaded(tmp_path / "c")
    now, limit = other.report(), other._sizes.limit_bytes(other._model.shape)
    assert now.limit == limit and now.near <= now.peak <= limit
    check_pages(other._store.cache)
    assert now.far > 0 and other._store.moved_bytes == 0
    assert now.file == sum(f.stat().st_size for f in (tmp_path / "c").iterdir() if f.name not in (MANIFEST, LOCK))


# --- a folder ---------------------------------------------------------------------------------------------------------------


def test_what_a_folder_is(tmp_path: Path) -> None:
    """Private, without pickle, of safetensors that others can read; unused slots hold nothing."""
    safetensors = pytest.importorskip("safetensors.torch")
    chat = full()
    chat.save(tmp_path / "c")
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in (tmp_path / "c").iterdir())
    names = {f.name for f in (tmp_path / "c").iterdir()}
    sets = {"0", "1", "2", "3", "4", "pending"}
    pages = {f"pages-1-{tag}.safetensors" for tag in sets}
    assert names == pages | {"turns-1.jsonl", "index-1.safetensors", MANIFEST, LOCK}
    lines = (tmp_path / "c" / "turns-1.jsonl").read_text().splitlines()
    assert [Turn(**json.loads(line)) for line in lines] == list(chat.turns)
    index = safetensors.load_file(tmp_path / "c" / "index-1.safetensors")
    assert index["vectors"].shape[0] == index["labels"].shape[0]
    total = 0
    for name in pages:
        tensors = safetensors.load_file(tmp_path / "c" / name)
        payload, positions = tensors["f32x32.payload"], tensors["f32x32.positions"]
        total += len(payload)
        for page, at, digest in zip(payload, positions, tensors["f32x32.sha256"], strict=True):
            assert sha256(page.numpy().tobytes() + at.numpy().tobytes()).digest() == bytes(digest.tolist())
            k, v = page.view(torch.float32).view(2, -1)
            assert not k.view(32, 16)[:, at < 0].any() and not v.view(16, 32)[at < 0].any()
    assert total == entries(chat)


def test_a_save_a_turn_later_is_small(tmp_path: Path) -> None:
    chat = made(budget="2048tok", chunk=256)
    chat.add(talk(50, seed=4))
    chat.build()
    first = chat.save(tmp_path / "c")
    assert first == sum(f.stat().st_size for f in (tmp_path / "c").iterdir() if f.name not in (MANIFEST, LOCK))
    chat.add(talk(1, seed=5))
    chat.build()
    there = set(os.listdir(tmp_path / "c"))
    later = chat.save(tmp_path / "c")
    new = set(os.listdir(tmp_path / "c")) - there
    assert later == sum((tmp_path / "c" / name).stat().st_size for name in new) <= 0.1 * first
    assert chat.save(tmp_path / "c") < later  # nothing is new but the index
    assert content(loaded(tmp_path / "c")) == content(chat)


def test_files_more_than_half_dead_are_rewritten(tmp_path: Path) -> None:
    """After many saves and compactions the folder holds at most twice the pages that are in use, in few files."""
    chat = made(2)
    for part in range(14):
        chat.add(talk(12, seed=part))
        chat.build()
        chat.save(tmp_path / "c")
        size = chat._store.cache._store.pool(0)["page_bytes"] + 64 + 32
        files = list((tmp_path / "c").glob("pages-*"))
        assert sum(f.stat().st_size for f in files) <= 2 * entries(chat) * size + 4096 * len(files)
    assert chat.report().compactions > 3
    assert content(loaded(tmp_path / "c", 2)) == content(chat)


def test_pages_of_too_many_files_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvstrata.episodes import pages

    monkeypatch.setattr(pages, "MOST_FILES", 4)
    chat = made(2, budget="2048tok", chunk=256)
    for part in range(12):
        chat.add(talk(3, seed=part))
        chat.build()
        chat.save(tmp_path / "c")
        assert len(list((tmp_path / "c").glob("pages-*"))) <= 5
    assert content(loaded(tmp_path / "c", 2)) == content(chat)


def test_one_writer(tmp_path: Path) -> None:
    chat, other = full(60, 2), made(2)
    chat.save(tmp_path / "c")
    with Folder(tmp_path / "c").writing():
        for call in (lambda: chat.save(tmp_path / "c"), lambda: loaded(tmp_path / "c", 2)):
            with pytest.raises(RuntimeError, match="open elsewhere, expected one writer"):
                call()
    with Folder(tmp_path / "c").reading(), pytest.raises(RuntimeError, match="open elsewhere"):
        chat.save(tmp_path / "c")
    with pytest.raises(RuntimeError, match="expected none: another conversation was saved there"):
        other.save(tmp_path / "c")
    twin = loaded(tmp_path / "c", 2)
    twin.ask("What of the boat?", max_new_tokens=2)
    twin.save(tmp_path / "c")
    with pytest.raises(RuntimeError, match=r"its sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        chat.save(tmp_path / "c")
    assert content(loaded(tmp_path / "c", 2)) == content(twin)
    for name in ("d", "e", "d"):  # by turns
        chat.ask("What of the soup?", max_new_tokens=2)
        chat.save(tmp_path / name)
        assert content(loaded(tmp_path / name, 2)) == content(chat)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    mode = tmp_path.stat().st_mode
    with pytest.raises(ValueError, match="holds 'letter', expected a new folder or a conversation's"):
        made(2).save(tmp_path)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        made(2).save(tmp_path / "letter")
    assert os.listdir(tmp_path) == ["letter"] and tmp_path.stat().st_mode == mode
    chat = made(2)
    chat.save(tmp_path / "c")
    (tmp_path / "c" / "notes.txt").write_text("mine")
    chat.save(tmp_path / "c")
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"


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
from test_saved import loaded
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
    """In every region of every file: the head's size, the head, the data from first to last; the manifest wherever."""
    full(80, 1).save(tmp_path / "c")
    found = 0
    for file in sorted((tmp_path / "c").iterdir()):
        text = file.read_bytes()
        if file.name == LOCK:
            assert text == b""
            continue
        head = 8 + int.from_bytes(text[:8], "little") if file.suffix == ".safetensors" else 1
        spread = range(0, len(text), max(1, len(text) // 24)) if file.name == MANIFEST else ()
        for at in {0, 9, head, (head + len(text)) // 2, len(text) - 1, *spread}:
            file.write_bytes(text[:at] + bytes([text[at] ^ 0x10]) + text[at + 1 :])
            with pytest.raises(
                RuntimeError, match=rf"{file.name}: (its sha256 is .*, expected|its content is damaged)"
            ):
                loaded(tmp_path / "c", 1)
            found += 1
        for wrong in (text[:-1], text + b"\n"):
            file.write_bytes(wrong)
            with pytest.raises(RuntimeError, match=rf"{file.name}: (it has \d+ bytes, expected \d+|its content)"):
                loaded(tmp_path / "c", 1)
        file.unlink()
        with pytest.raises(RuntimeError, match=rf"{file.name}: .*expected"):
            loaded(tmp_path / "c", 1)
        file.write_bytes(text)
    assert found > 40
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
    rewritten(tmp_path / "c", lambda m: m.update(format=2))
    with pytest.raises(ValueError, match="format is 2, expected 1"):
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
    chat = full(100, 2)
    chat.save(tmp_path / "c")
    (page,) = (tmp_path / "c").glob("pages-1-0.*")
    text = page.read_bytes()
    page.write_bytes(text[:-1000] + bytes(1000))
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
