"""Windows that stand for an episode, and the patched prompt made of them. Source: arXiv 2509.17396, section 3.2: the one
window closest to the centroid; ``coverage`` is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvstrata.episodes.route import checked_index
from kvstrata.episodes.vectors import F64, first_of_largest, unit

BLOCK = 1024
"""Candidates compared with all windows at a time: cosines held are BLOCK * n."""


def represent(
    vectors: Tensor,
    labels: Tensor,
    centroids: Tensor,
    n: int = 4,
    pick: Literal["coverage", "closest"] = "coverage",
) -> list[list[int]]:
    """Up to n windows of each of E episodes, in the order picked; fewer where an episode has fewer.

    vectors f32 [windows, d], labels i32 [windows], centroids f32 [E, d]. ``coverage``: greedily for the largest sum, over
    the episode's windows, of the cosine to the most similar one picked; ``closest``: the nearest to the centroid. Ties:
    the earlier window. ValueError: n < 1, another pick, and as :meth:`Router.route`.
    """
    if n < 1:
        raise ValueError(f"represent: n is {n}, expected at least 1 window")
    if pick not in ("coverage", "closest"):
        raise ValueError(f"represent: pick is {pick!r}, expected 'coverage' or 'closest'")
    _, _, episodes = checked_index(vectors, labels, centroids)
    wide, centres, of = unit(vectors), unit(centroids), labels.cpu().numpy()
    picked = []
    for e in range(episodes):
        members = np.flatnonzero(of == e)
        own = wide[members]
        order = _coverage(own, n) if pick == "coverage" else _largest(own @ centres[e], n)
        picked.append([int(members[i]) for i in order])
    return picked


def _largest(values: F64, n: int) -> list[int]:
    left = values.copy()
    order: list[int] = []
    for _ in range(min(n, len(values))):
        order.append(first_of_largest(left))
        left[order[-1]] = -np.inf
    return order


def _coverage(own: F64, n: int) -> list[int]:
    covered = np.full(len(own), -1.0)  # each window's cosine to the most similar one picked
    order: list[int] = []
    for _ in range(min(n, len(own))):
        blocks = (own[i : i + BLOCK] @ own.T for i in range(0, len(own), BLOCK))
        gain = np.concatenate([np.maximum(block, covered).mean(axis=1) for block in blocks])
        gain[order] = -np.inf
        order.append(first_of_largest(gain))
        covered = np.maximum(covered, own @ own[order[-1]])
    return order


def fit(
    texts: Sequence[str],
    picked: Sequence[int],
    encode: Callable[[str], Tensor],
    tokens: int,
    instruction: str = "",
) -> Tensor:
    """The patched prompt, ids i64 [at most ``tokens``]: the texts of the picked windows in time order, one below the other.

    While it is too long the one picked last goes; a lone one is cut at its end. encode: ids [T] of a text, without special
    tokens; instruction: a line before the texts (ours: none). ValueError: nothing picked, a window there is not, one picked
    twice, tokens < 1, ids of another shape, a prompt of no token.
    """
    if tokens < 1:
        raise ValueError(f"fit: tokens is {tokens}, expected at least 1")
    if not picked or len(set(picked)) < len(picked) or not 0 <= min(picked) <= max(picked) < len(texts):
        raise ValueError(f"fit: picked is {list(picked)}, expected different windows below {len(texts)}")
    head = [instruction] if instruction else []
    for kept in range(len(picked), 0, -1):
        text = "\n".join([*head, *(texts[i] for i in sorted(picked[:kept]))])
        ids = torch.as_tensor(encode(text))
        if ids.dim() != 1 or ids.is_floating_point():
            raise ValueError(f"fit: encode gave {ids.dtype} {list(ids.shape)}, expected integers [T]")
        if len(ids) <= tokens:
            break
    if not len(ids):
        raise ValueError(f"fit: encode gave no token for {text!r:.80}")
    return ids[:tokens].to("cpu", torch.int64)
