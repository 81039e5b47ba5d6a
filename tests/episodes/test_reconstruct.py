"""The text once more as prompt: exact while all fits, scores that last, hard limits, and nothing lost when it fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from feeding import check_pages
from keeping import answers, content, full, loaded
from plain import DIM, HEADS, KV_HEADS, PlainChat, words
from test_store import Watched, check_logits, dense

from kvstrata import Budget, Cache, LayerSpec, Shape, testing
from kvstrata.episodes.limits import Sizes, sizes_of
from kvstrata.episodes.places import Places, parts_of
from kvstrata.episodes.store import LEAD, EpisodeStore

SIZES = Sizes(256, 64, 64, recent=32, episodes=4, prompts="reconstruct", heads="model", kernel=1)
INT8 = replace(SIZES, private="int8", common="int8")


def places(episodes: int, length: int = 4000, window: int = 25) -> Places:
    starts = torch.arange(0, length, window)
    return Places(starts, (torch.arange(len(starts)) * 7 % episodes).int(), episodes)


def made(model: PlainChat, episodes: int = 4, sizes: Sizes = SIZES) -> EpisodeStore:
    return EpisodeStore(model, sizes, lambda: places(episodes))


def scores(store: EpisodeStore, layer: int) -> list[dict[int, float]]:
    """Of each head, by position."""
    cache, seq = store.cache, store._seq
    _, _, positions = cache.materialize(layer, seq)
    out = torch.empty(positions.shape)
    cache._store.look(layer, [seq.id], 0, 0, 0, out.data_ptr(), 0, 0, 0, out.shape[1])
    return [dict(zip(p.tolist(), s.tolist(), strict=True)) for p, s in zip(positions, out, strict=True)]


def test_parts() -> None:
    for first in (0, 5):
        for n in range(70):
            parts = parts_of(range(first, first + n), 16)
            assert [t for p in parts for t in p] == list(range(first, first + n))
            assert all(len(p) == 16 for p in parts[1:]) and all(1 <= len(p) <= 16 for p in parts)


def test_places() -> None:
    found = Places(torch.tensor([3, 5, 9]), torch.tensor([1, 0, 2], dtype=torch.int32), 3).of(12)
    assert found.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 2] and found.dtype == torch.int32
    with pytest.raises(ValueError, match=r"starts is \[0\]"):
        Places(torch.tensor([]), torch.tensor([]), 1)


@pytest.mark.parametrize("sizes", [SIZES, INT8])
def test_what_fits_is_exact(sizes: Sizes) -> None:
    model = PlainChat()
    store, ids = made(model, sizes=sizes), words(sizes.whole, 1)
    logits = store.read(ids, logits=True)
    assert logits is not None and store.compactions == 0 and store.room == 0
    check_logits(logits, dense(model, ids))
    store.read(ids[:1])
    assert store.compactions == 1


def test_a_score_is_the_most_that_any_query_of_the_text_saw() -> None:
    """The first compaction against attention written out: every query of every piece, over all that is stored and itself."""
    model = PlainChat(layers=1)
    store, ids = made(model), words(SIZES.whole + 16, 2)
    store.read(ids)
    assert store.compactions == 1
    seen = SIZES.whole // 64 * 64  # tokens when it was compacted: with the last chunk that found room
    text = range((seen - 32) // 16 * 16)
    k: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Taken:
        def attend(self, layer: int, q: Any, key: Any, v: Any, **_: Any) -> Any:
            k.append((q, key))
            return torch.zeros_like(q)

    model.forward(ids[:seen], torch.arange(seen), Taken(), "none")  # type: ignore[arg-type]
    most = torch.zeros(KV_HEADS, seen)
    passes = parts_of(text, 64)
    cut = [(i + 1 == len(passes), p) for i, part in enumerate(passes) for p in parts_of(part, 64 - LEAD)]
    for last, part in cut:
        piece = ids[max(0, part.start - LEAD) : part.stop]
        known = seen if last else seen - 64  # the last pass alone reads the last chunk, too
        model.forward(piece, torch.arange(known, known + len(piece)), Taken(), "none")  # type: ignore[arg-type]
        q, own = k[-1]
        keys, mask = torch.cat([k[0][1][:known], own]), torch.ones(len(piece), known + len(piece)).tril(known).bool()
        for head in range(HEADS):
            h = head * KV_HEADS // HEADS
            p = (q[:, head] @ keys[:, h].T * DIM**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
            most[h, :known] = torch.maximum(most[h, :known], p[:, :known].amax(0))
    found = scores(store, 0)
    for h in range(KV_HEADS):
        kept = {p: s for p, s in found[h].items() if 0 <= p < seen}
        assert len(kept) > 100
        for p, s in kept.items():
            assert s == pytest.approx(float(most[h, p]), abs=2e-5)


def test_scores_last() -> None:
    """Of tokens that are in a set; the tail is scored again as long as it is pending, and never lower."""
    store = made(PlainChat(layers=2))
    store.read(words(700, 3))
    before, planned = [scores(store, layer) for layer in range(2)], store._planned
    store.read(words(400, 4))
    store.compact()
    risen = 0
    for layer in range(2):
        for was, now in zip(before[layer], scores(store, layer), strict=True):
            both = [p for p in was if p in now and p >= 0]
            assert len(both) > 40 and all(now[p] == was[p] if p < planned else now[p] >= was[p] for p in both)
            risen += sum(now[p] > was[p] for p in both)
    assert risen > 0


@pytest.mark.parametrize("heads", ["model", "pair", "uniform"])
@pytest.mark.parametrize("episodes", [1, 4, 8])
@pytest.mark.parametrize("form", ["full", "int8"])
def test_near_bytes_never_pass_the_limit(form: str, episodes: int, heads: str) -> None:
    model = PlainChat(dtype=torch.bfloat16)
    for most in {episodes, max(2, episodes)}:
        sizes = replace(SIZES, heads=heads, episodes=most, private=form, common=form)
        store = Watched(model, sizes, lambda: places(episodes))
        store._watch()
        limit, ids = sizes.limit_bytes(model.shape), words(1500, 2)
        for n in range(0, len(ids), 100):
            store.read(ids[n : n + 100])
            assert max(store.most, store.cache.report().peak_bytes) <= limit
        for e in range(episodes):
            store.show([e])
            store.make_room(40)
            store.read(words(40, e))
            assert max(store.most, store.cache.report().peak_bytes) <= limit
        check_pages(store.cache)
        assert store.compactions > 10 and store.episodes == episodes


def test_bytes_that_hold_a_budget() -> None:
    shape = PlainChat(dtype=torch.bfloat16).shape
    chosen = {f.name: getattr(INT8, f.name) for f in INT8.__dataclass_fields__.values()}  # type: ignore[attr-defined]
    for name in ("budget", "chunk", "prompt"):
        chosen.pop(name)
    sizes = sizes_of(Budget.bytes(2 << 20), shape, chunk=64, **chosen)
    assert sizes.limit_bytes(shape) <= 2 << 20 < replace(sizes, budget=sizes.budget + 16).limit_bytes(shape)
    assert sizes.prompt == 64
    mixed = Shape([LayerSpec(2, 4, 32), LayerSpec(2, 4, 32, 64), LayerSpec(1, 4, 64)], torch.bfloat16)
    assert SIZES.limit_bytes(mixed) > 0


def test_tokens_are_run_twice_and_those_before_a_piece_once_more() -> None:
    model = PlainChat()
    store = made(model, sizes=replace(SIZES, prompt=128))
    store.read(words(64 * 30, 4))
    pieces = store.compactions + SIZES.whole // 64  # one each, but of the first compaction one for each chunk
    assert model.read <= 2 * 64 * 30 + LEAD * pieces
    assert model.read >= 2 * 64 * 30 - 64 - 48 + LEAD * (store.compactions - 1)


@pytest.mark.parametrize(
    ("point", "nth"),
    [("slab.lend", 1), *((point, n) for point in ("append.after_take", "plan.after_write") for n in (1, 3, 6, 12))],
)
def test_what_fails_can_be_tried_again(point: str, nth: int) -> None:
    """Tokens are fed once, whatever fails; the next compaction makes up for it."""
    model, ids = PlainChat(), words(900, 5)
    store = made(model)
    store.read(ids[:600])
    with testing.fault(point, nth), pytest.raises(RuntimeError, match="fault"):
        store.read(ids[600:])
    assert 600 <= store.length < 900
    store.read(ids[store.length :])
    assert store.length == 900 and store.pending == 900 - store._planned == len(store._text) - LEAD
    assert torch.equal(store._text, ids[store._planned - LEAD :])
    store.compact()
    check_pages(store.cache)


def test_an_answer_that_is_taken_back_leaves_the_text() -> None:
    store, ids = made(PlainChat()), words(640, 6)
    store.read(ids)
    store.make_room(30)
    mark = store.mark()
    store.read(words(30, 7), logits=True)
    store.back(mark)
    assert torch.equal(store._text, ids[store._planned - LEAD :])


def test_prompts_of_the_other_kind_are_refused() -> None:
    store = EpisodeStore(PlainChat(), replace(SIZES, prompts="representatives", heads="pair"), lambda: places(2))
    with pytest.raises(ValueError, match="places of 2 episodes"):
        store.compact()
    with pytest.raises(ValueError, match="places of 5 episodes, expected 1 to 4"):
        made(PlainChat(), 5).compact()
    with pytest.raises(ValueError, match="prompts is 'x'"):
        replace(SIZES, prompts="x")


def test_regroup_is_checked() -> None:
    store = made(PlainChat())
    store.read(words(100, 8))
    of = torch.zeros(100, dtype=torch.int32)
    for wrong, count in ((of[:99], 1), (of.long(), 1), (of + 2, 2)):
        with pytest.raises(ValueError, match="regroup: of is"):
            store.cache.regroup(store._seq, wrong, count)
    plain = Cache(store.cache.shape)
    (seq,) = plain.new()
    with pytest.raises(ValueError, match="policy 'full', expected one that names sets"):
        plain.regroup(seq, of, 1)
    with pytest.raises(ValueError, match="read: score, expected compact=False"):
        store.cache.read(store._seq, 0, [4], score=0)


# --- conversations --------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "prompts": "reconstruct",
    "heads": "model",
    "kernel": 1,
    "private": "int8",
    "common": "int8",
    "prompt_tokens": 64,
}


def test_windows_know_their_tokens() -> None:
    """Each window's first token is its first turn's, through questions, and after all is read again."""
    chat = full(60, **OPTIONS)
    for _ in range(2):
        ids, offsets = chat._model.tokens(chat.turns, first=True, answer=False)
        starts = [int(offsets[w.utterances[0].turn]) for w in chat._history.windows]
        assert [w.start for w in chat._history.windows] == starts and starts[-1] > 0
        chat.refresh("rebuild")


def test_a_saved_conversation_goes_on_as_if_nothing_was(tmp_path: Path) -> None:
    chat = full(**OPTIONS)
    chat.save(tmp_path / "c")
    other = loaded(tmp_path / "c")
    assert content(other) == content(chat)
    for layer in range(4):
        assert scores(other._store, layer) == scores(chat._store, layer)
    assert torch.equal(other._store._text, chat._store._text)
    assert answers(other) == answers(chat)
    assert content(other) == content(chat)
    assert chat._store.compactions > 5
    chat.save(tmp_path / "d", keep_text=False)
    blind = loaded(tmp_path / "d")
    assert [w.start for w in blind._history.windows] == [w.start for w in chat._history.closed(chat._how).windows]
    assert len(answers(blind)) == 20
