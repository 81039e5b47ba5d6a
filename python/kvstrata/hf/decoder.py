"""The decoder inside a model, and the one attribute in which a patched decoder remembers that it is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from kvstrata.config import Unsupported
from kvstrata.hf.facts import Facts, moved, weights_of
from kvstrata.hf.feed import UNPATCHED

ATTRIBUTE = "_kvstrata"


@cache
def _parameters(kind: Any) -> tuple[tuple[str, ...], bool]:
    parameters = list(inspect.signature(inspect.unwrap(kind.forward)).parameters.values())[1:]
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def parameters_of(module: Any) -> tuple[tuple[str, ...], bool]:
    """(names of the positional parameters of a module's forward, whether it takes **kwargs)."""
    return _parameters(type(module))  # type: ignore[arg-type]


def argument(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The argument `name` of a call of `module`, by keyword or by place; None when it is absent."""
    if name in kwargs or not args:
        return kwargs.get(name)
    return dict(zip(parameters_of(module)[0], args, strict=False)).get(name)


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper; anything else as it is."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def decoder_of(model: Any) -> Any:
    """The module that runs the layers: `get_decoder()` if it takes past_key_values, else `base_model`.

    Unsupported when neither does.
    """
    model = unwrap(model)
    candidates = [model.get_decoder() if hasattr(model, "get_decoder") else None, getattr(model, "base_model", None)]
    for module in candidates:
        if isinstance(module, torch.nn.Module) and "past_key_values" in parameters_of(module)[0]:
            return module
    raise Unsupported(f"{type(model).__name__}: no decoder whose forward takes past_key_values")


@dataclass
class Record:
    """What patch changed. implementations: every config it renamed, with the name it had before."""

    implementations: list[tuple[Any, str | None]]
    facts: Facts | None = None
    _modules: tuple[int, frozenset[int]] | None = field(default=None, repr=False)

    def modules(self, decoder: torch.nn.Module) -> frozenset[int]:
        """Ids of the decoder's modules, itself included."""
        if self._modules is None or self._modules[0] != id(decoder):
            self._modules = (id(decoder), frozenset(id(m) for m in decoder.modules()))
        return self._modules[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_modules": None}  # ids mean nothing in a copy


def record_of(decoder: Any) -> Record | None:
    """The record of a patched decoder; None for one that is not patched."""
    return decoder.__dict__.get(ATTRIBUTE)  # type: ignore[no-any-return]


def facts_of(model: Any) -> tuple[Any, Facts]:
    """(decoder, facts) of a patched model. RuntimeError if it is not patched, ValueError if its weights moved since."""
    decoder = decoder_of(model)
    record = record_of(decoder)
    if record is None or record.facts is None:
        raise RuntimeError(UNPATCHED)
    if moved(record.facts, decoder):
        raise ValueError(
            f"{record.facts.name}: expected {record.facts.weights}, the weights' dtype and device at patch, got "
            f"{weights_of(decoder)}: call kvstrata.patch(model) again"
        )
    return decoder, record.facts
