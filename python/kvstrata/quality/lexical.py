"""Embedders of words as they are spelt, for evaluations: they need no weights and give the same numbers everywhere."""

# ruff: noqa: SIM905 (word lists read better as text)

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kvstrata.config import Unsupported
from kvstrata.episodes.vectors import F64, unit_rows

WORD = re.compile(r"[^\W_]+")
DIMENSIONS = 1024
COMPONENTS = 256
COMMON = frozenset(
    "a about after again all am an and another any are as at be been before but by can could did do does don for from get "
    "go goes got had has have he her here him his how i if in into is it its just know let like m me more most my never "
    "no not now of off on one or other our out over re s said say says see she should so some something such t than that "
    "the their them then there these they thing think this those time to too up us ve very was we well were what when "
    "where which who why will with would yes you your".split()
)
"""Words that say nothing of a topic; left out."""


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case, without the common ones."""
    return [word for word in WORD.findall(text.lower()) if word not in COMMON]


class HashedWords:
    """Each word adds +1 or -1 at one of 1,024 places, by its CRC-32, times its count and its weight.

    ``fit`` sets the weights from the windows it is given: ln((1 + n) / (1 + windows with the word)) + 0.1; a word in none
    of them counts as if in one. Before a fit all are 1.
    """

    fingerprint = f"hashed-words-{DIMENSIONS}"

    def __init__(self) -> None:
        self._windows = 0
        self._seen: Counter[str] = Counter()

    def fit(self, texts: Sequence[str]) -> None:
        self._windows = len(texts)
        self._seen = Counter(word for text in texts for word in set(words(text)))

    def embed(self, texts: Sequence[str], kind: Literal["window", "query"]) -> Tensor:
        """Unit rows, f32 [n, 1024]; a text without words is zero."""
        rows = np.zeros((len(texts), DIMENSIONS))
        for row, text in zip(rows, texts, strict=True):
            for word, count in Counter(words(text)).items():
                place = zlib.crc32(word.encode())
                sign = 1 if place & 1 else -1
                row[(place >> 1) % DIMENSIONS] += sign * count * self._weight(word)
        return _tensor(rows)

    def _weight(self, word: str) -> float:
        return float(np.log((1 + self._windows) / (1 + max(1, self._seen[word]))) + 0.1) if self._windows else 1.0


class LatentWords:
    """TF-IDF (scikit-learn, sublinear, English stop words) and its 256 leading components, both fitted to the windows.

    Needs ``fit`` first. Fewer windows or words: fewer components.
    """

    fingerprint = f"tfidf-lsa-{COMPONENTS}"

    def __init__(self) -> None:
        try:
            from sklearn.decomposition import TruncatedSVD
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise Unsupported("tfidf: scikit-learn is not installed; pip install kvstrata[episodes]") from error
        self._words: Any = TfidfVectorizer(sublinear_tf=True, stop_words="english")
        self._leading: Any = TruncatedSVD
        self._fitted: Any = None

    def fit(self, texts: Sequence[str]) -> None:
        """ValueError where the windows hold one word or none."""
        weighted = self._words.fit_transform(texts)
        count = min(COMPONENTS, min(weighted.shape) - 1)
        if count < 1:
            raise ValueError(f"tfidf: {weighted.shape[0]} windows with {weighted.shape[1]} words, expected 2 of each")
        self._fitted = self._leading(count, random_state=0).fit(weighted)

    def embed(self, texts: Sequence[str], kind: Literal["window", "query"]) -> Tensor:
        """Unit rows, f32 [n, at most 256]."""
        return _tensor(self._fitted.transform(self._words.transform(texts)))


def _tensor(rows: F64) -> Tensor:
    return torch.from_numpy(unit_rows(rows)).to(torch.float32)
