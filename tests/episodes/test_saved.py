"""Conversations on disk: the same after a load, small when little is new, alone in their folder."""

from __future__ import annotations

import json
import os
import shutil
import stat
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from feeding import check_pages
from keeping import QUESTIONS, answers, content, elsewhere, entries, full, loaded, made
from plain import PlainChat
from topics import CountedWords, talk

from kvstrata import stored, testing
from kvstrata.episodes import InputEmbedding, Router, Turn
from kvstrata.episodes.conversation import Conversation
from kvstrata.episodes.folder import LOCK, MANIFEST, Folder
from kvstrata.episodes.pages import hashes
from kvstrata.episodes.saved import load_conversation, save_conversation
from kvstrata.episodes.tensors import TensorFile

FRESH = """
import json, sys
sys.path[:0] = sys.argv[2:]
import torch
torch.set_num_threads(1)
from keeping import answers, content, loaded
from pathlib import Path
from hashlib import sha256
from io import FileIO
chat = loaded(Path(sys.argv[1]))
print(json.dumps([sha256(repr(content(chat)).encode()).hexdigest(), answers(chat)]))
"""


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


def test_a_set_that_was_loaded_is_clean(tmp_path: Path) -> None:
    """Leaving Near writes no byte, and what comes back is what was saved; a set was shown as it was saved."""
    chat = full()
    before = content(chat)
    assert chat._store._view is not None and chat._store._view[0]
    chat.save(tmp_path / "c")
    other = loaded(tmp_path / "c")
    view, moved = chat._turned.episodes, other._store.moved_bytes
    other._store.show([])
    while other._store.cache._store.give_way():
        pass
    assert other._store.moved_bytes == moved
    other._store.show(view)
    assert other._store.moved_bytes > moved and content(other) == before
    check_pages(other._store.cache)


@pytest.mark.parametrize(
    "options",
    [
        {"private": "int8", "heads": "uniform"},
        {"episodes": 1, "max_episodes": 2, "bounded": True, "dates": True},
        {"router": Router("vote", margin=0.3), "tau": 0.5, "layers": (272, 240), "recent": 48},
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
    assert other._store.cache.report().far_tokens > 0 or "episodes" in options
    assert content(other) == content(chat)
    assert (other._how, other._router, other._sizes) == (chat._how, chat._router, chat._sizes)
    assert answers(other) == answers(chat)
    assert content(other) == content(chat)
    if "private" in options:
        assert other._store.cache.report().states["int8"] > 0


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
    assert now.far == 0 < other._store.moved_bytes  # the set that is read came Near, the others are in their files
    assert now.file == sum(f.stat().st_size for f in (tmp_path / "c").iterdir() if f.name not in (MANIFEST, LOCK))


def test_sets_stay_in_their_files_until_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load reads the pages that are shown; whole files are hashed if pages are Near that no set brings."""
    chat = full()
    chat.save(tmp_path / "c")
    hashed, check = list[str](), Folder.check

    def noted(file: FileIO, facts: Any) -> None:
        hashed.append(Path(str(file.name)).name)
        check(file, facts)

    monkeypatch.setattr(Folder, "check", staticmethod(noted))
    with testing.fault("far.read", 1 << 30) as read:
        other = loaded(tmp_path / "c")
    page = other._store.cache._store.pool(0)["page_bytes"]
    assert chat._turned.episodes is not None and 0 < read.visits == other._store.moved_bytes // page
    assert {name for name in hashed if name.startswith("pages")} == {
        f"pages-1-{tag}.safetensors" for tag in ("0", "pending")
    }
    unread = set(range(4)) - set(chat._turned.episodes)
    with testing.fault("far.read", 1 << 30) as read:
        other._store.show(sorted(unread)[:1])
        assert other._store.moved_bytes == page * (other._store.cache._store.fetched()[1])
        other._store.show(chat._turned.episodes)
    assert read.visits > 0 and content(other) == content(chat)
    shutil.rmtree(tmp_path / "c")  # what is open stays
    assert answers(other) == answers(chat)
    check_pages(other._store.cache)
    other.close()
    check_pages(other._store.cache)


def test_a_damaged_set_fails_alone(tmp_path: Path) -> None:
    """The question that is routed there raises, with file and set, and is taken back; others are answered; repair mends."""
    chat = full(layers=2)
    chat.build()
    chat._store.compact()
    chat.save(tmp_path / "c")
    routes = {q: route.episodes for q in QUESTIONS if (route := chat.route(q)) is not None}
    assert chat._turned.episodes is not None
    bad = min({e for found in routes.values() for e in found} - set(chat._turned.episodes))
    file = tmp_path / "c" / f"pages-1-{bad + 1}.safetensors"
    text = file.read_bytes()
    first = 8 + int.from_bytes(text[:8], "little")
    pages = TensorFile(FileIO(str(file))).tensor("f32x32.payload", None, None).numel()
    file.write_bytes(text[:first] + bytes(pages) + text[first + pages :])
    other = loaded(tmp_path / "c", 2)

    def state() -> list[Any]:
        store = other._store
        tables = [store.cache._store.row_sets(store._seq.id, *place)[:2] for place in stored.places(store.cache)]
        return [other.turns, other._turned, store.length, store._view, store.cache._store.view(store._seq.id), tables]

    before = state()
    there, elsewhere_ = ([q for q, found in routes.items() if (bad in found) is there] for there in (True, False))
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=rf"{file.name}: the \d+ bytes at \d+ are not .* page of set {bad + 1} was read"
        ):
            other.ask(there[0], max_new_tokens=4, remember=False)
        assert state() == before
    for question in elsewhere_[:3]:
        assert (
            other.ask(question, max_new_tokens=4, remember=False).ids
            == chat.ask(question, max_new_tokens=4, remember=False).ids
        )
    check_pages(other._store.cache)
    with pytest.raises(RuntimeError, match=f"{file.name}: "):
        other.save(tmp_path / "d")
    mended = loaded(tmp_path / "c", 2, repair=True)
    mended.ask(there[0], max_new_tokens=4, remember=False)


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


def live(path: Path) -> dict[str, tuple[int, int]]:
    """Of each file of pages, those that are of the conversation, and all."""
    folder, manifest = Folder(path), json.loads((path / MANIFEST).read_text())
    (index,) = path.glob("index-*")
    with FileIO(str(index)) as file:
        table = TensorFile(file).tensor("entries", None, 5)
    held = {tuple(row) for row in table[:, :3].tolist()}
    return {
        name: (sum(row[0] == i for row in held), len(list(hashes(folder, name))))
        for i, name in enumerate(manifest["pages"])
    }


def test_files_more_than_half_dead_are_rewritten(tmp_path: Path) -> None:
    """Dead pages stay in a file until they are more than the others."""
    chat, found = made(2), []
    for part in range(14):
        chat.add(talk(12, seed=part))
        chat.build()
        chat.save(tmp_path / "c")
        found += live(tmp_path / "c").values()
        assert {name for name, _ in live(tmp_path / "c").items()} == {f.name for f in (tmp_path / "c").glob("pages-*")}
    assert all(2 * used >= total for used, total in found) and any(used < total for used, total in found)
    assert chat.report().compactions > 3
    assert content(loaded(tmp_path / "c", 2)) == content(chat)


def test_pages_that_are_gone_are_written_again(tmp_path: Path) -> None:
    chat = full(100, 2)
    chat.save(tmp_path / "c")
    for name, text in (("pages-1-0", None), ("pages-1-2", b"")):
        (file,) = (tmp_path / "c").glob(f"{name}.*")
        file.unlink() if text is None else file.write_bytes(text)
    chat.save(tmp_path / "c")
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
