"""kvstrata: a KV-cache engine for long-context LLM inference.

Importing this patches nothing, starts nothing and touches no GPU; names are loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Budget": "budget",
    "BudgetExceeded": "config",
    "Cache": "cache",
    "Conversation": "episodes",
    "KVCache": "hf",
    "LayerSpec": "config",
    "MachineError": "config",
    "Policy": "policy",
    "Report": "report",
    "Sequence": "cache",
    "Shape": "config",
    "Step": "step",
    "Turn": "episodes",
    "Unsupported": "config",
    "backends": "backend",
    "patch": "hf",
    "patched": "hf",
    "unpatch": "hf",
}

if TYPE_CHECKING:
    from kvstrata.backend import backends as backends
    from kvstrata.budget import Budget as Budget
    from kvstrata.cache import Cache as Cache
    from kvstrata.cache import Sequence as Sequence
    from kvstrata.config import BudgetExceeded as BudgetExceeded
    from kvstrata.config import LayerSpec as LayerSpec
    from kvstrata.config import MachineError as MachineError
    from kvstrata.config import Shape as Shape
    from kvstrata.config import Unsupported as Unsupported
    from kvstrata.episodes import Conversation as Conversation
    from kvstrata.episodes import Turn as Turn
    from kvstrata.hf.cache import KVCache as KVCache
    from kvstrata.hf.patch import patch as patch
    from kvstrata.hf.patch import patched as patched
    from kvstrata.hf.patch import unpatch as unpatch
    from kvstrata.policy import Policy as Policy
    from kvstrata.report import Report as Report
    from kvstrata.step import Step as Step

_MODULES = ("budget", "ops", "policy", "testing")

__all__ = ["__version__", *sorted(_HOME), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"kvstrata.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'kvstrata' has no attribute {name!r}")
    value = getattr(import_module(f"kvstrata.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
