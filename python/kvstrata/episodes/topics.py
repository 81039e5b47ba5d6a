"""New windows of a running conversation: which episode each joins, and when strays found one. Ours: the paper has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvstrata.episodes.cluster import Clusters, sums
from kvstrata.episodes.vectors import F64, TIE, checked, first_of_largest, unit, unit_rows


@dataclass(frozen=True)
class Placed:
    """Where a new window went: its number, its episode, and whether it is a stray there.

    founded: the windows, rising, that left where they were and are the new episode, which then is ``episode``; refused: they
    would have been one, were there not max_episodes already.
    """

    window: int
    episode: int
    stray: bool = False
    founded: tuple[int, ...] = ()
    refused: bool = False


@dataclass(frozen=True, eq=False)
class Topics:
    """The episodes of n windows as they grow. Never changed: each step gives a new one, and a failed one leaves the old.

    labels: i32 [n], a stray's is that of the episode that holds it; strays: windows, rising, that no centroid is near and
    that count in none; refused: windows that would have founded an episode; zeros: windows of length 0.
    tau: cosine below which nothing is near; open_after: strays, each within tau of each other, that found an episode.
    """

    labels: Tensor
    tau: float
    open_after: int
    max_episodes: int
    strays: tuple[int, ...]
    refused: int
    zeros: int
    totals: F64
    """The sum of each episode's unit vectors, strays left out, f64 [E, d]: of the direction of their mean."""
    held: F64
    """The strays' unit vectors, f64 [k, d]."""

    @classmethod
    def of(
        cls,
        vectors: Tensor,
        clusters: Clusters,
        *,
        tau: float | Literal["auto"] = "auto",
        open_after: int = 2,
        max_episodes: int = 8,
    ) -> Topics:
        """As clustered. vectors: the windows', f32 [n, d]; tau ``auto``: that of the clusters. ValueError as :meth:`resume`."""
        number = clusters.tau if tau == "auto" else tau
        return cls.resume(vectors, clusters.labels, tau=number, open_after=open_after, max_episodes=max_episodes)

    @classmethod
    def resume(
        cls,
        vectors: Tensor,
        labels: Tensor,
        *,
        tau: float,
        open_after: int = 2,
        max_episodes: int = 8,
        strays: Sequence[int] = (),
        refused: int = 0,
    ) -> Topics:
        """As saved: equal to what was, to the last bit, given the same windows f32 [n, d], labels i32 [n] and strays.

        ValueError: misshapen, NaN or infinite vectors; labels that are not of [n] or lack an episode; strays that do not rise
        within n; tau outside -1..1; open_after < 1; more episodes than max_episodes.
        """
        wide = unit(checked("vectors", vectors, ("n", "d")))
        n = len(wide)
        if labels.shape != (n,) or labels.is_floating_point():
            raise ValueError(f"labels is {labels.dtype} {list(labels.shape)}, expected integers [{n}]")
        found = np.unique(labels.cpu().numpy())
        if not n or found.tolist() != list(range(len(found))):
            raise ValueError(f"labels name episodes {found.tolist()}, expected each from 0 on")
        if list(strays) != sorted(set(strays)) or any(not 0 <= k < n for k in strays):
            raise ValueError(f"strays is {list(strays)}, expected rising windows below {n}")
        if not -1 <= tau <= 1:
            raise ValueError(f"tau is {tau!r}, expected 'auto' or a cosine, -1 to 1")
        if open_after < 1:
            raise ValueError(f"open_after is {open_after}, expected at least 1 window")
        if not len(found) <= max_episodes:
            raise ValueError(f"max_episodes is {max_episodes}, expected at least the {len(found)} there are")
        own = np.ones(n, dtype=bool)
        own[list(strays)] = False
        totals = sums(wide[own], labels.cpu().numpy()[own], len(found))
        zeros = int((~wide.any(axis=1)).sum())
        kept = labels.to("cpu", torch.int32)
        return cls(kept, tau, open_after, max_episodes, tuple(strays), refused, zeros, totals, wide[list(strays)])

    @property
    def centroids(self) -> Tensor:
        """Unit vectors, f32 [E, d]."""
        return torch.from_numpy(unit_rows(self.totals)).to(torch.float32)

    def assign(self, vector: Tensor) -> tuple[Topics, Placed]:
        """Places the next window, f32 [d]. Ties: the lower episode; among strays, the earlier ones found.

        A window of length 0 joins episode 0. ValueError: misshapen, NaN or infinite.
        """
        w = unit(checked("vector", vector, (self.totals.shape[1],)))
        cos = unit_rows(self.totals) @ w
        if not w.any():
            return self._joined(w, 0, zeros=1)
        nearest = first_of_largest(cos)
        if cos[nearest] >= self.tau - TIE:
            return self._joined(w, nearest)
        window = len(self.labels)
        held = replace(
            self,
            labels=_with(self.labels, nearest),
            strays=(*self.strays, window),
            held=np.concatenate([self.held, w[None]]),
        )
        group = _group(held.held, self.open_after, self.tau)
        if not group:
            return held, Placed(window, nearest, stray=True)
        if len(self.totals) >= self.max_episodes:
            return replace(held, refused=self.refused + 1), Placed(window, nearest, stray=True, refused=True)
        return held._founded(group)

    def _joined(self, w: F64, episode: int, zeros: int = 0) -> tuple[Topics, Placed]:
        totals = self.totals.copy()
        totals[episode] += w
        grown = replace(self, labels=_with(self.labels, episode), totals=totals, zeros=self.zeros + zeros)
        return grown, Placed(len(self.labels), episode)

    def _founded(self, group: list[int]) -> tuple[Topics, Placed]:
        """The strays at these places of ``strays`` become an episode."""
        windows, episode = [self.strays[i] for i in group], len(self.totals)
        labels = self.labels.clone()
        labels[windows] = episode
        left = [i for i in range(len(self.strays)) if i not in group]
        total = sums(self.held[group], np.zeros(len(group), dtype=np.int32), 1)
        founded = replace(
            self,
            labels=labels,
            strays=tuple(self.strays[i] for i in left),
            held=self.held[left],
            totals=np.concatenate([self.totals, total]),
        )
        return founded, Placed(windows[-1], episode, founded=tuple(windows))


def _with(labels: Tensor, episode: int) -> Tensor:
    return torch.cat([labels, torch.tensor([episode], dtype=torch.int32)])


def _group(held: F64, size: int, tau: float) -> list[int]:
    """The first ``size`` of the strays, by place, of which the last is one and any two are within tau; else none."""
    last = len(held) - 1
    near = np.flatnonzero(held[:last] @ held[last] >= tau - TIE).tolist()

    def grown(group: list[int], start: int) -> list[int]:
        if len(group) == size - 1:
            return [*group, last]
        for at in range(start, len(near)):
            if (held[group] @ held[near[at]] >= tau - TIE).all():
                found = grown([*group, near[at]], at + 1)
                if found:
                    return found
        return []

    return grown([], 0)
