"""What is compared: policies of kvstrata and peers, each a function that makes a cache. Registries are dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from kvstrata.budget import Budget
from kvstrata.budget.protect import limit_bytes
from kvstrata.config import LayerSpec, Shape
from kvstrata.hf.cache import KVCache
from kvstrata.hf.decoder import facts_of
from kvstrata.hf.load import dense_cache
from kvstrata.hf.peers import PACKAGES, quantized_cache
from kvstrata.policy import NAMED
from kvstrata.quality import control

Make = Callable[[Any, Budget | None, int], Any]
"""(patched model, budget, tokens that the example will have) -> an empty cache for it."""


def _named(policy: str, model: Any, budget: Budget | None, tokens: int) -> Any:
    return KVCache.for_model(model, policy=policy, budget=in_bytes(budget, model, tokens))


def _random(model: Any, budget: Budget | None, tokens: int) -> Any:
    limit = in_bytes(budget, model, tokens)
    if limit is None:
        raise ValueError("budget: policy 'random' needs one, got None")
    return KVCache.for_model(model, policy=control.random(shape_of(model), limit), budget=limit)


def _dense(model: Any, budget: Budget | None, tokens: int) -> Any:
    del budget, tokens
    return dense_cache(model)


def _quantized(backend: str, bits: int, model: Any, budget: Budget | None, tokens: int) -> Any:
    del budget, tokens
    return quantized_cache(model, backend, bits)


QUANTIZED = {f"QuantizedCache-{backend}-{bits}": (backend, bits) for backend in PACKAGES for bits in (4, 2)}
PREFIX = "kvpress:"
PRESSES = ("SnapKV", "ExpectedAttention", "AdaKV", "KeyDiff", "TOVA", "StreamingLLM", "Knorm", "KVzip")
"""Peers that run in an environment of their own (outside.py)."""

POLICIES: dict[str, Make] = {name: partial(_named, name) for name in NAMED} | {"random": _random}
PEERS: dict[str, Make | None] = (
    {"DynamicCache": _dense}
    | {name: partial(_quantized, *how) for name, how in QUANTIZED.items()}
    | dict.fromkeys(PREFIX + press for press in PRESSES)
)
UNLIMITED = frozenset({"full", "DynamicCache", *QUANTIZED})
"""Contenders that take no budget: they run once."""


def missing(name: str) -> str | None:
    """Why a peer of this process cannot run here; None if it can."""
    module = {"hqq": "hqq", "quanto": "optimum.quanto"}.get(QUANTIZED.get(name, ("",))[0])
    if module is None or all(find_spec(part) for part in (module.split(".")[0], module)):
        return None
    return f"pip install {PACKAGES[QUANTIZED[name][0]]}"


@dataclass(frozen=True)
class Contender:
    """One column of the comparison. budget: as the user wrote it, or None."""

    name: str
    budget: str | None

    def make(self, model: Any, tokens: int) -> Any:
        """An empty cache. ValueError or Unsupported, with the reason, where this contender cannot keep its budget."""
        build = POLICIES.get(self.name) or PEERS[self.name]
        assert build is not None, "a peer of another environment"
        return build(model, Budget.parse(self.budget), tokens)

    @property
    def outside(self) -> bool:
        """Whether it runs in an environment of its own."""
        return self.name.startswith(PREFIX)

    @property
    def label(self) -> str:
        return label(self.name, self.budget)


def line_up(policies: list[str], peers: list[str], budgets: list[str]) -> list[Contender]:
    """Every policy and peer under every budget; those without a budget once. ValueError for an unknown name."""
    for kind, names, known in (("policies", policies, POLICIES), ("peers", peers, PEERS)):
        for name in names:
            if name not in known:
                raise ValueError(f"{kind}: {name!r} is unknown, expected some of {', '.join(known)}")
    for budget in budgets:
        Budget.parse(budget)
    found = []
    for name in [*peers, *policies]:
        found += [Contender(name, None)] if name in UNLIMITED else [Contender(name, b) for b in budgets]
    return found


def shape_of(model: Any) -> Shape:
    """The layers of a patched model."""
    _, facts = facts_of(model)
    specs = [LayerSpec(f.kv_heads, f.q_heads, f.head_dim, f.window) for f in facts.layers]
    return Shape(specs, facts.layers[0].dtype, facts.layers[0].device)


def in_bytes(budget: Budget | None, model: Any, tokens: int) -> Budget | None:
    """A share becomes bytes of the dense cache of the whole example, so that it binds as bytes; others as they are."""
    if budget is None or budget.unit != "share":
        return budget
    return Budget.bytes(limit_bytes(budget, shape_of(model), [tokens]))


def label(name: str, budget: str | None) -> str:
    """A contender as people read it."""
    return name if budget is None else f"{name} {budget}"
