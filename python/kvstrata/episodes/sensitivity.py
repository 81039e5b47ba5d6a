"""How much a layer's keys change when the cache is small (EpiCache, arXiv 2509.17396), measured on calibration texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvstrata.budget.sensitivity import SensitivityProfile
from kvstrata.cache import Cache
from kvstrata.config import Shape, Unsupported
from kvstrata.episodes.model import Attending, ChatModel
from kvstrata.policy import streaming


def sensitivity(
    chat_model: ChatModel, texts: Sequence[Tensor], budget: int, chunk: int, sinks: int = 128
) -> SensitivityProfile:
    """The profile of a model's layers with full attention, in order, by a whole and a small cache that read in lockstep.

    texts: ids i64 [T]; chunk: tokens read at a time; budget: tokens that the small cache keeps in each row, the first ``sinks``
    and recent ones (policy ``streaming``). Keys are compared in fp32 as they are appended, over KV heads and the tokens read
    after the first eviction. Of several texts the means' mean and standard deviation.

    Deviation: the public code reads once, under a mask that ran as its own complement. ValueError: no texts; one of fewer than
    2 * (budget + chunk) tokens, or of more than the model has positions; chunk < 1; a budget too small for its sinks.
    Unsupported for a model whose layers all slide.
    """
    if chunk < 1:
        raise ValueError(f"sensitivity: chunk is {chunk}, expected >= 1")
    if not texts:
        raise ValueError("sensitivity: texts is empty, expected one or more")
    least, most = 2 * (budget + chunk), chat_model.max_positions
    for i, ids in enumerate(texts):
        if ids.dtype != torch.int64 or ids.dim() != 1 or not least <= len(ids) <= most:
            raise ValueError(
                f"sensitivity: texts[{i}] is {ids.dtype} {list(ids.shape)}, expected torch.int64 [T], T in {least}..{most}"
            )
    layers = _full(chat_model.shape)
    caches = Cache(chat_model.shape), Cache(chat_model.shape, budget=f"{budget}tok", policy=streaming(sinks))
    found = [_likeness(chat_model, caches, layers, ids, chunk) for ids in texts]
    means = torch.stack([mean for mean, _ in found])
    return SensitivityProfile(
        sigma=tuple(means.mean(0).tolist()),
        spread=tuple(means.std(0, correction=0).tolist()),
        tokens=sum(count for _, count in found),
        text_hash=_hash(texts),
        model_hash=chat_model.fingerprint,
    )


def _full(shape: Shape) -> list[int]:
    layers = [i for i, spec in enumerate(shape.layers) if spec.window is None]
    if not layers:
        raise Unsupported("sensitivity: every layer has a sliding window, expected one with full attention")
    return layers


def _likeness(
    chat_model: ChatModel, caches: tuple[Cache, Cache], layers: list[int], ids: Tensor, chunk: int
) -> tuple[Tensor, int]:
    """(mean cosine of each layer's keys f64 [L], tokens compared) of one text; the caches are as empty after it as before."""
    seqs = [cache.new(1) for cache in caches]
    total, count = torch.zeros(len(layers), dtype=torch.float64), 0
    try:
        for part in torch.split(torch.arange(len(ids)), chunk):
            evicted = caches[1].stored_length(layers[0], seqs[1][0], 0) < int(part[0])
            read = []
            for cache, seq in zip(caches, seqs, strict=True):
                with cache.step(seq, lengths=[len(part)]) as step:
                    read.append(keys := _Keys(step))
                    chat_model.forward(ids[part], part, keys, "none")
            if evicted:
                whole, small = (keys.seen for keys in read)
                cosines = [cosine_similarity(whole[i], small[i], dim=-1).double() for i in layers]
                total += torch.stack([c.mean(1).sum() for c in cosines])
                count += len(part)
    finally:
        for cache, seq in zip(caches, seqs, strict=True):
            cache.free(seq)
    return total / count, count


class _Keys:
    """A step, and the keys f32 [T, H, D] that each layer hands to it."""

    def __init__(self, step: Attending) -> None:
        self._step = step
        self.seen: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **arithmetic: Any) -> Tensor:
        self.seen[layer] = k.float()
        return self._step.attend(layer, q, k, v, **arithmetic)


def _hash(texts: Sequence[Tensor]) -> str:
    """SHA-256 of the texts' lengths and ids."""
    found = hashlib.sha256(repr([len(ids) for ids in texts]).encode())
    for ids in texts:
        found.update(ids.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
