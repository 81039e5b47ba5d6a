"""A talk of several topics, each with words of its own, and an embedder that counts words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from kvstrata.episodes import Turn

TOPICS = {
    "sea": "boat harbour wave anchor sail tide captain gull rope deck",
    "food": "bread oven flour butter salt recipe kitchen spoon sugar soup",
    "space": "planet orbit rocket comet star moon crater launch probe telescope",
    "music": "violin choir melody drum rhythm concert piano song stage tempo",
    "garden": "tulip soil seed rake hedge compost lawn pruning petal greenhouse",
}
COMMON = ("today", "maybe", "really", "think", "about", "with", "then", "also", "some", "very")


def talk(turns: int, seed: int = 0, switch: float = 0.3, topics: Sequence[str] = tuple(TOPICS)[:4]) -> list[Turn]:
    """Two people, who change the topic at that share of turns."""
    r = random.Random(seed)
    topic, out = r.choice(topics), []
    for i in range(turns):
        if r.random() < switch:
            topic = r.choice(topics)
        own = TOPICS[topic].split()
        text = " ".join(r.choice(own if r.random() < 0.7 else COMMON) for _ in range(r.randint(6, 14)))
        out.append(Turn(("Ada", "Bo")[i % 2], text))
    return out


class CountedWords:
    """Unit vectors of word counts, hashed; notes what it was asked."""

    def __init__(self, dim: int = 256) -> None:
        self.dim = dim
        self.asked: list[tuple[str, str]] = []

    @property
    def fingerprint(self) -> str:
        return f"counted words {self.dim}"

    def embed(self, texts: Sequence[str], kind: str) -> Tensor:
        self.asked += [(kind, text) for text in texts]
        out = torch.zeros(len(texts), self.dim)
        for i, text in enumerate(texts):
            for word in text.lower().replace(":", " ").replace("?", " ").split():
                if word not in COMMON and word not in ("ada", "bo", "user", "assistant"):
                    out[i, crc32(word.encode()) % self.dim] += 1
        return torch.nn.functional.normalize(out, dim=1)
