"""A hand-written PyTorch model in conversations longer than its cache: no transformers, about 60 lines of a chat model.

The weights are random, so it babbles; what it shows is all that `kvstrata.Conversation` asks of a model. Run it:
python examples/custom_chat_model.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

import kvstrata
from kvstrata.episodes import Attending, InputEmbedding

WIDTH, LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 128, 2, 4, 2, 32, 256
START, END = 2, 3  # bytes that no text holds


def rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding. x: [T, heads, D]; positions: i64 [T]."""
    angle = positions[:, None, None] * 10000 ** (-torch.arange(0, DIM, 2) / DIM)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class ByteChat:
    """A `kvstrata.episodes.ChatModel`: bytes for tokens; a turn is START, "speaker: text", END."""

    style: Literal["chat", "transcript"] = "chat"  # answers join the conversation as they are generated

    def __init__(self) -> None:
        self.shape = kvstrata.Shape([kvstrata.LayerSpec(KV_HEADS, HEADS, DIM)] * LAYERS, torch.float32)
        self.max_positions = 1 << 20
        self.stop_ids = frozenset({START, END})
        self.closing = torch.tensor([END])  # between an answer's last token and the next turn
        self.fingerprint = "0" * 64  # a hash of the weights, by which a saved conversation knows its model
        self.embeddings = torch.randn(VOCAB, WIDTH)
        self.qkv = torch.randn(LAYERS, (HEADS + 2 * KV_HEADS) * DIM, WIDTH) / WIDTH**0.5
        self.out = torch.randn(LAYERS, WIDTH, HEADS * DIM) / WIDTH**0.5

    def plain(self, text: str) -> torch.Tensor:
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    def text(self, ids: torch.Tensor) -> str:
        return bytes(i for i in ids.tolist() if i not in self.stop_ids).decode(errors="replace")

    def tokens(self, turns: Sequence[kvstrata.Turn], *, first: bool, answer: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """ids i64 [T] of turns, and where each begins and ends, i64 [n + 1]. A system text would come before the first one."""
        start, end = torch.tensor([START]), torch.tensor([END])
        parts = [torch.cat([start, self.plain(f"{t.speaker}: {t.text}"), end]) for t in turns]
        offsets = torch.tensor([0, *map(len, parts)]).cumsum(0)
        asks = [torch.cat([start, self.plain("assistant: ")])] if answer else []
        return torch.cat([torch.tensor([], dtype=torch.int64), *parts, *asks]), offsets

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, step: Attending, logits: Literal["last", "none"] = "last"
    ) -> torch.Tensor | None:
        """ids, positions: i64 [T]; logits f32 [V] of the last one, if asked for."""
        x = self.embeddings[ids]
        for layer in range(LAYERS):
            y = torch.nn.functional.rms_norm(x, (WIDTH,)) @ self.qkv[layer].T
            q, k, v = y.view(len(ids), -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
            out = step.attend(layer, rope(q, positions), rope(k, positions), v)  # stores k and v, reads what is seen
            x = x + out.flatten(1) @ self.out[layer].T
        return None if logits == "none" else torch.nn.functional.rms_norm(x[-1], (WIDTH,)) @ self.embeddings.T


def main() -> None:
    torch.manual_seed(0)
    model = ByteChat()
    topics = ("the boat in the harbour", "bread from the oven", "a rocket to the moon")
    turns = [("Ada", f"Today it was {topics[i // 3 % 3]}, for the {i}th time.") for i in range(60)]
    embedder = InputEmbedding(model.embeddings, model.plain)
    with kvstrata.Conversation(model, "256tok", chunk=128, prompt_tokens=64, embedder=embedder) as chat:
        chat.add(turns)
        answer = chat.ask("What of the boat?", max_new_tokens=16)
        report = chat.report()
        print(
            f"{report.tokens:,} tokens seen, {len(report.episodes)} episodes, read: {answer.route and answer.route.episodes}"
        )
        print(f"{report.near:,} bytes of at most {report.limit:,}; a cache of all tokens: {report.full:,}")


if __name__ == "__main__":
    main()
