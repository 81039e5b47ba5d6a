"""What a conversation asks of a language model; :func:`kvstrata.hf.chat_model` is it for transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from kvstrata.config import Shape
from kvstrata.episodes.segment import Turn


class Attending(Protocol):
    """What takes each layer's queries, keys and values: an open :class:`kvstrata.Step` of one sequence, or alike."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [T, Hq, D], k, v [T, H, D] after rotary embedding, in the shape's dtype, the last dimension contiguous; returns
        the attention output [T, Hq, D]. layer: index in the shape. Which tokens see which is its affair."""


class ChatModel(Protocol):
    """A decoder, its tokenizer and its way to write a conversation. Holds no state of any conversation.

    shape: of its cache; max_positions: positions it can tell apart; stop_ids: tokens that end an answer; embeddings:
    its input embeddings [V, d]; fingerprint: SHA-256 of model and weights, 64 hex digits; style: "chat", where answers
    join the conversation as they are generated, or "transcript", where they are given on a fork and then added as turns;
    closing: i64 [c], the tokens between an answer's last one and the next turn (a stop token belongs to them, and is not fed
    before them); none in style "transcript".
    """

    shape: Shape
    max_positions: int
    stop_ids: frozenset[int]
    embeddings: Tensor
    fingerprint: str
    style: Literal["chat", "transcript"]
    closing: Tensor

    def tokens(self, turns: Sequence[Turn], *, first: bool, answer: bool) -> tuple[Tensor, Tensor]:
        """ids i64 [T] and offsets i64 [n + 1]: turn i is ids[offsets[i] : offsets[i + 1]].

        first: the conversation begins here, its opening (system text) is ids[: offsets[0]]. answer: ids[offsets[n] :] ask
        for an answer. Turns are written one by one: in parts or at once, the ids are the same. ValueError names a turn that
        cannot be written.
        """

    def forward(
        self, ids: Tensor, positions: Tensor, step: Attending, logits: Literal["last", "none"] = "last"
    ) -> Tensor | None:
        """Runs ids i64 [T] at positions i64 [T] through the layers; each hands its q, k, v to ``step``, which stays open.

        Returns the last token's logits f32 [V]; None where none are asked for, and the LM head does not run. ValueError for
        ids or positions out of range.
        """

    def plain(self, text: str) -> Tensor:
        """ids i64 [T] of a text alone: no special tokens."""

    def text(self, ids: Tensor) -> str:
        """The text of ids i64 [T], special tokens left out."""
