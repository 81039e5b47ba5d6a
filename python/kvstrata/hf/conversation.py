"""A conversation with a transformers model, in one call."""

from __future__ import annotations

from typing import Any

from kvstrata.budget import Budget
from kvstrata.episodes.conversation import Conversation
from kvstrata.hf.chat_model import Style, chat_model

WRITTEN = ("assistant", "max_positions", "template")
"""Options of :func:`chat_model`; the others are of :class:`kvstrata.Conversation`."""


def conversation(
    model: Any,
    tokenizer: Any,
    *,
    budget: Budget | str | int,
    system: str | None = None,
    style: Style = "chat",
    **options: Any,
) -> Conversation:
    """A :class:`kvstrata.Conversation` over :func:`chat_model`, which patches the model.

    budget: "2GiB", which holds everything, or "4096tok", of a row that one question sees; system, style, and of options
    assistant, max_positions, template: as :func:`chat_model`; the other options: as :class:`kvstrata.Conversation`. Raises
    what these two do.
    """
    written = {name: options.pop(name) for name in WRITTEN if name in options}
    return Conversation(chat_model(model, tokenizer, style=style, system=system, **written), budget, **options)
