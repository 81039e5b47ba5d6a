"""``PatchedPrompt``: what prompts that guess at future questions attend to (EpiCache, arXiv 2509.17396)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvstrata.policy.base import Seen


@dataclass(frozen=True)
class PatchedPrompt:
    """The most that any query of any span sees of a token, softmax over all that the query saw, its own span too.

    Deviation: the public code takes the softmax over the history alone, where a prompt that attends to itself counts as much
    as one that attends to the history.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"spans"})
    is_mass: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        assert seen.read is not None
        return seen.read.patched().amax(0)
