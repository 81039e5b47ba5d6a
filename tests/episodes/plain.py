"""A chat model of plain torch: four seeded random layers, words for tokens. What a custom model has to be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kvstrata import LayerSpec, Shape
from kvstrata.episodes import Turn
from kvstrata.episodes.model import Attending

VOCABULARY, SPECIAL = 512, 4
BEGIN, USER, ASSISTANT, END = range(SPECIAL)
HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 32, 64


class PlainChat:
    """Implements :class:`kvstrata.episodes.model.ChatModel`."""

    style: Literal["chat", "transcript"] = "chat"

    def __init__(
        self, layers: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0, positions: int = 1 << 20
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=g) * shape[-1] ** -0.5).to(dtype)

        self.shape = Shape([LayerSpec(KV_HEADS, HEADS, DIM)] * layers, dtype)
        self.max_positions = positions
        self.stop_ids = frozenset({END})
        self.embeddings = weight(VOCABULARY, WIDTH)
        self.fingerprint = f"{seed:064x}"
        self.closing = torch.tensor([END])
        self.layers = [
            {
                "q": 2 * weight(HEADS * DIM, WIDTH),
                "k": 2 * weight(KV_HEADS * DIM, WIDTH),
                "v": weight(KV_HEADS * DIM, WIDTH),
                "o": weight(WIDTH, HEADS * DIM),
                "up": weight(2 * WIDTH, WIDTH),
                "down": weight(WIDTH, 2 * WIDTH),
            }
            for _ in range(layers)
        ]
        self.read = 0  # tokens that forward has run

    def plain(self, text: str) -> Tensor:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return torch.tensor(
            [SPECIAL + sum(map(ord, w)) * 31 % (VOCABULARY - SPECIAL) for w in words], dtype=torch.int64
        )

    def text(self, ids: Tensor) -> str:
        return " ".join(f"w{i}" for i in ids.tolist() if i >= SPECIAL)

    def tokens(self, turns: Sequence[Turn], *, first: bool, answer: bool) -> tuple[Tensor, Tensor]:
        parts = [torch.tensor([BEGIN] if first else [], dtype=torch.int64)]
        offsets = [len(parts[0])]
        for turn in turns:
            role = ASSISTANT if turn.speaker == "assistant" else USER
            parts.append(torch.cat([torch.tensor([role]), self.plain(turn.text), torch.tensor([END])]))
            offsets.append(offsets[-1] + len(parts[-1]))
        if answer:
            parts.append(torch.tensor([ASSISTANT]))
        return torch.cat(parts), torch.tensor(offsets)

    def forward(
        self, ids: Tensor, positions: Tensor, step: Attending, logits: Literal["last", "none"] = "last"
    ) -> Tensor | None:
        self.read += len(ids)
        x = self.embeddings[ids]
        for layer, w in enumerate(self.layers):
            y = normed(x)
            q, k, v = (
                (y @ w[name].T).view(len(ids), -1, DIM).contiguous() for name in ("q", "k", "v")
            )  # fmt: skip
            out = step.attend(layer, turned(q, positions), turned(k, positions), v)
            x = x + out.reshape(len(ids), -1) @ w["o"].T
            x = x + torch.relu(normed(x) @ w["up"].T) @ w["down"].T
        return None if logits == "none" else (normed(x[-1]) @ self.embeddings.T).float() * 4


def normed(x: Tensor) -> Tensor:
    return x / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt().to(x.dtype)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding, halves."""
    angle = positions.double().unsqueeze(1) * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = angle.cos().unsqueeze(1).to(x.dtype), angle.sin().unsqueeze(1).to(x.dtype)
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def words(count: int, seed: int) -> Tensor:
    """Ids of so many random words."""
    return torch.randint(SPECIAL, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
