"""Which episode each token of a conversation is of, and what a text is scored by in parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Which episode each token is of. starts: i64 [K], the first token of each window, rising; episodes: i32 [K], 0..count-1;
    count: E. ValueError for other shapes, and without a window."""

    starts: Tensor
    episodes: Tensor
    count: int

    def __post_init__(self) -> None:
        if self.starts.dim() != 1 or not len(self.starts) or self.starts.shape != self.episodes.shape:
            raise ValueError(
                f"Places: starts is {list(self.starts.shape)}, episodes {list(self.episodes.shape)}, expected both [K], K >= 1"
            )

    def of(self, tokens: int) -> Tensor:
        """i32 [tokens]; what stands before the first window is of its episode."""
        window = torch.searchsorted(self.starts, torch.arange(tokens), right=True) - 1
        return self.episodes[window.clamp(0)].to(torch.int32)


def parts_of(tokens: range, most: int) -> list[range]:
    """Parts of at most so many tokens, the first one the shortest."""
    first = tokens.start + len(tokens) % most
    ends = range(first if first > tokens.start else first + most, tokens.stop + 1, most)
    return [range(max(tokens.start, end - most), end) for end in ends]
