"""Embeddings as numbers: checked once, then unit vectors in fp64, so that equal texts have equal cosines."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

F64 = NDArray[np.float64]

TIE = 1e-9
"""Cosines (or means of them) closer than this are equal: a matrix product may round equal vectors differently."""


def checked(name: str, vectors: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    """``vectors`` on the CPU, if they have the shape (a letter: any length), are floating point and finite; else ValueError."""
    wanted = f"[{', '.join(map(str, shape))}]"
    if not isinstance(vectors, Tensor):
        raise ValueError(f"{name} is {type(vectors).__name__}, expected a tensor {wanted}")
    fits = len(shape) == vectors.dim() and all(
        isinstance(s, str) or s == n for s, n in zip(shape, vectors.shape, strict=True)
    )
    if not fits or not vectors.is_floating_point():
        raise ValueError(f"{name} is {vectors.dtype} {list(vectors.shape)}, expected floating point {wanted}")
    wrong = int((~torch.isfinite(vectors)).sum())
    if wrong:
        raise ValueError(f"{name} {list(vectors.shape)} has {wrong} NaN or infinite values, expected none")
    return vectors.detach().cpu()


def unit(vectors: Tensor) -> F64:
    """Rows of length 1, f64 [..., d]; a zero row stays zero."""
    wide: F64 = vectors.detach().double().cpu().numpy()
    return unit_rows(wide)


def unit_rows(wide: F64) -> F64:
    norm = np.linalg.norm(wide, axis=-1, keepdims=True)
    rows: F64 = np.divide(wide, norm, out=np.zeros_like(wide), where=norm > 0)
    return rows


def first_of_largest(values: F64) -> int:
    """The lowest index among the largest values, ties by :data:`TIE`."""
    return int(np.argmax(values >= values.max() - TIE))
