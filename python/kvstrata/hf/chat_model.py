"""A transformers model and its tokenizer as a conversation uses them (:class:`kvstrata.episodes.ChatModel`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kvstrata.config import Shape, Unsupported
from kvstrata.episodes.model import Attending, ChatModel
from kvstrata.episodes.segment import Turn
from kvstrata.hf import compat
from kvstrata.hf.cache import shape_of
from kvstrata.hf.capability import reasons
from kvstrata.hf.decoder import decoder_of, facts_of, parameters_of, record_of, unwrap
from kvstrata.hf.facts import Facts
from kvstrata.hf.fingerprint import of_model, of_writing
from kvstrata.hf.layers import FedCache
from kvstrata.hf.passage import Passage
from kvstrata.hf.patch import patch, unpatch
from kvstrata.hf.spelling import TRANSCRIPT, Spelling, row
from kvstrata.hf.writers import ChatWriter, LineWriter, Writer

Style = Literal["chat", "transcript"]


class HfChatModel(ChatModel):
    """See :class:`kvstrata.episodes.ChatModel`; made by :func:`chat_model`.

    tokenizer_fingerprint: SHA-256 of the vocabulary and of how turns are written, 64 hex digits.
    """

    def __init__(
        self, model: Any, facts: Facts, writer: Writer, spelling: Spelling, style: Style, positions: int
    ) -> None:
        self._model, self._facts = unwrap(model), facts
        self._writer, self._spelling = writer, spelling
        self.style: Style = style
        self.shape: Shape = shape_of(facts)
        self.max_positions = positions
        self.embeddings: Tensor = self._model.get_input_embeddings().weight.detach()
        self.stop_ids = writer.stops | _ends(self._model, spelling.tokenizer)
        self.closing = row(writer.closing)
        self.fingerprint = of_model(self._model)
        self.tokenizer_fingerprint = of_writing(spelling, writer)

    def tokens(self, turns: Sequence[Turn], *, first: bool, answer: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`kvstrata.episodes.ChatModel.tokens`."""
        return self._writer.tokens(turns, first=first, answer=answer)

    def plain(self, text: str) -> Tensor:
        """ids i64 [T] of a text, without special tokens."""
        return row(self._spelling.ids(text))

    def text(self, ids: Tensor) -> str:
        """The text of ids i64 [T], without special tokens."""
        return self._spelling.text(ids)

    def forward(
        self, ids: Tensor, positions: Tensor, step: Attending, logits: Literal["last", "none"] = "last"
    ) -> Tensor | None:
        """See :meth:`kvstrata.episodes.ChatModel.forward`. No gradients. Threads may share a model, not a step.

        RuntimeError after `unpatch`; Unsupported for a layer that did not reach the step.
        """
        if logits not in ("last", "none"):
            raise ValueError(f"forward: logits is {logits!r}, expected 'last' or 'none'")
        self._check("ids", ids, len(self.embeddings))
        self._check("positions", positions, self.max_positions)
        if len(ids) != len(positions):
            raise ValueError(f"forward: {len(ids)} ids, {len(positions)} positions, expected as many")
        decoder, _ = facts_of(self._model)
        cache = FedCache(Passage(self._facts, step, int(positions[0]), len(ids)))
        device = self.embeddings.device
        fed: dict[str, Any] = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device)}
        fed |= {"past_key_values": cache, "use_cache": True}
        with torch.no_grad():
            if logits == "none":
                decoder(**fed)
                return None
            out = self._model(**fed, logits_to_keep=1)
        found: Tensor = out.logits[0, -1].float()
        return found

    def _check(self, name: str, x: Tensor, end: int) -> None:
        if x.dtype != torch.int64 or x.dim() != 1 or len(x) == 0:
            raise ValueError(f"forward: {name} is {x.dtype} {list(x.shape)}, expected torch.int64 [T], T >= 1")
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= end:
            raise ValueError(f"forward: {name} are {low}..{high}, expected 0..{end - 1}")


def chat_model(
    model: Any,
    tokenizer: Any,
    *,
    style: Style = "chat",
    system: str | None = None,
    assistant: str = "assistant",
    max_positions: int | None = None,
    template: Mapping[str, Any] | None = None,
) -> HfChatModel:
    """A model and its tokenizer for conversations. Patches the model (`kvstrata.patch`), which `kvstrata.unpatch` undoes;
    with other caches, and without one, it does as before.

    style: "chat" writes each turn as the tokenizer's chat template does, "transcript" as a line of one long user message, or,
    without a template, of a text; system: what stands before all turns; assistant: the speaker that the model is;
    max_positions: None, the config's; template: more arguments for the chat template.

    ValueError for an unknown style or a blank system. Unsupported, the model unchanged: what `patch` refuses, recurrent
    layers, a forward without position_ids or logits_to_keep, and in style "chat" a tokenizer without a chat template or one
    whose template writes a turn otherwise when another follows.
    """
    if style not in ("chat", "transcript"):
        raise ValueError(f"chat_model: style is {style!r}, expected 'chat' or 'transcript'")
    if system is not None and not system.strip():
        raise ValueError("chat_model: system is blank, expected None or a text")
    compat.raise_first(reasons(model))
    positions = _positions(model, max_positions)
    _require_forward(model)
    spelling = Spelling(tokenizer, template)
    if style == "chat" and spelling.template is None:
        raise Unsupported(f"chat_model: the tokenizer has no chat template; {TRANSCRIPT}")
    writer = (ChatWriter if style == "chat" else LineWriter)(spelling, system, assistant)
    fresh = record_of(decoder_of(model)) is None
    try:
        _, facts = facts_of(patch(model))
        return HfChatModel(model, facts, writer, spelling, style, positions)
    except BaseException:
        if fresh:
            unpatch(model)
        raise


def _positions(model: Any, given: int | None) -> int:
    if given is not None:
        if given < 1:
            raise ValueError(f"chat_model: max_positions is {given}, expected >= 1")
        return int(given)
    said = getattr(compat.text_config(unwrap(model).config), "max_position_embeddings", None)
    if said is None or said < 1:
        raise Unsupported(
            f"{type(model).__name__}: the config's max_position_embeddings is {said}; give max_positions="
        )
    return int(said)


def _require_forward(model: Any) -> None:
    """Unsupported for a model that a conversation cannot run, whatever `patch` says."""
    base = unwrap(model)
    decoder = decoder_of(base)
    for module, names in ((base, ("position_ids", "logits_to_keep")), (decoder, ("position_ids",))):
        for name in names:
            if name not in parameters_of(module)[0]:
                raise Unsupported(
                    f"{type(module).__name__}: its forward takes no {name}; expected a causal LM that does"
                )
    kinds = sorted(
        {kind for kind, _ in compat.layer_types(compat.text_config(decoder.config))} & compat.RECURRENT_TYPES
    )
    if kinds:
        raise Unsupported(
            f"{type(decoder).__name__}: layer type {kinds[0]!r}: recurrent states cannot be cut or forked"
        )


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The end-of-text tokens of the generation config and of the tokenizer."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = said if isinstance(said, (list, tuple)) else [said]
    return frozenset(int(i) for i in (*found, getattr(tokenizer, "eos_token_id", None)) if i is not None)
