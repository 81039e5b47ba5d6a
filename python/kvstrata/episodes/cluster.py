"""Windows of one topic together. Source: arXiv 2509.17396, section 3.1; its centroids are means, ours unit vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvstrata.config import Unsupported
from kvstrata.episodes.vectors import F64, TIE, checked, unit, unit_rows

STRAY_PERCENTILE = 5.0
"""Of cos(window, own centroid): what lies below is a stray."""


@dataclass(frozen=True)
class Clusters:
    """Which episode each window is of.

    labels: i32 [n], numbered from 0 by first window; centroids: unit means of the members, f32 [E, d]; tau: the 5th
    percentile of the cosines of windows and their own centroids (-1 if no window says anything: nothing is a stray);
    zeros: windows of length 0, which joined episode 0 and count nowhere else.
    """

    labels: Tensor
    centroids: Tensor
    tau: float
    zeros: int


def cluster(vectors: Tensor, episodes: int = 4, *, seed: int = 42, n_init: int = 10) -> Clusters:
    """k-means (scikit-learn, k-means++, best of ``n_init``, fp64, one thread) over the windows' vectors, f32 [n, d].

    There are as many episodes as asked for, or as different windows, if these are fewer; empty ones are dropped.
    ValueError: no window, misshapen, NaN or infinite vectors, episodes or n_init below 1. Unsupported: no scikit-learn.
    """
    for name, value in (("episodes", episodes), ("n_init", n_init)):
        if value < 1:
            raise ValueError(f"cluster: {name} is {value}, expected at least 1")
    wide = unit(checked("vectors", vectors, ("n", "d")))
    if not wide.size:
        raise ValueError(f"vectors is {list(wide.shape)}, expected at least one window")
    spoken = wide.any(axis=1)  # [n], those that are not zero
    labels = np.zeros(len(wide), dtype=np.int32)
    if spoken.any():
        labels[spoken] = _by_first(_kmeans(wide[spoken], episodes, seed, n_init))
    centroids = unit_rows(sums(wide, labels, int(labels.max()) + 1))
    own = (wide[spoken] * centroids[labels[spoken]]).sum(axis=1)
    tau = float(np.percentile(own, STRAY_PERCENTILE).clip(-1, 1)) if own.size else -1.0  # rounding may pass 1
    found = torch.from_numpy(centroids).to(torch.float32)
    return Clusters(torch.from_numpy(labels), found, tau, int((~spoken).sum()))


def _kmeans(wide: F64, episodes: int, seed: int, n_init: int) -> np.ndarray[Any, Any]:
    """Labels [n] as scikit-learn numbers them. On one thread: sums over threads differ in the last bits."""
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise Unsupported("cluster: scikit-learn is not installed; pip install kvstrata[episodes]") from error
    count = _distinct(wide, episodes)
    if count == 1:
        return np.zeros(len(wide), dtype=np.int32)
    means = KMeans(count, init="k-means++", n_init=n_init, random_state=seed)
    with threadpool_limits(limits=1):
        found: np.ndarray[Any, Any] = means.fit(wide).labels_
    return found


def _distinct(wide: F64, most: int) -> int:
    """Different windows, counted up to ``most``; cosines of 1 - TIE are equal: a text's vector varies with its batch."""
    left, count = wide, 0
    while len(left) and count < most:
        left = left[left @ left[0] < 1 - TIE]
        count += 1
    return count


def _by_first(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same groups, numbered from 0 in the order of their first members."""
    _, first, group = np.unique(labels, return_index=True, return_inverse=True)
    return first.argsort().argsort().astype(np.int32)[group]


def sums(wide: F64, labels: np.ndarray[Any, Any], episodes: int) -> F64:
    """The sum of each episode's rows f64 [E, d], added in order, as the running sums of :class:`Topics` are."""
    total = np.zeros((episodes, wide.shape[1]))
    np.add.at(total, labels, wide)
    return total
