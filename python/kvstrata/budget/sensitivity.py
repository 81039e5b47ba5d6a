"""More for the layers whose keys change when the cache is small (EpiCache, arXiv 2509.17396), from a measured profile."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvstrata.budget.allocate import Allocation, RowsSeen, divide, limits
from kvstrata.budget.split import Floats, split

_VERSION = 1
_STABLE = 1e-6
"""1 - cosine below this is rounding: the layer does not change."""


@dataclass(frozen=True)
class SensitivityProfile:
    """How alike a layer's keys are between a whole and a small cache, measured on a calibration text.

    sigma: mean cosine of each layer's keys, [L], -1..1; spread: standard deviation of it over samples, [L]; tokens: N, those
    whose keys were compared; text_hash, model_hash: SHA-256 in 64 hex digits of the text and of the model it was measured with.
    """

    sigma: tuple[float, ...]
    spread: tuple[float, ...]
    tokens: int
    text_hash: str
    model_hash: str

    def __post_init__(self) -> None:
        if not self.sigma or len(self.sigma) != len(self.spread):
            raise ValueError(
                f"SensitivityProfile: {len(self.sigma)} sigma, {len(self.spread)} spread, expected L of each"
            )
        if not all(-1.001 <= s <= 1.001 for s in self.sigma):
            raise ValueError("SensitivityProfile: a sigma is no cosine, expected values in -1..1")
        if not all(math.isfinite(s) and s >= 0 for s in self.spread):
            raise ValueError("SensitivityProfile: a spread is negative or not finite")
        if self.tokens < 1:
            raise ValueError(f"SensitivityProfile: tokens is {self.tokens}, expected >= 1")
        for name in ("text_hash", "model_hash"):
            if not re.fullmatch(r"[0-9a-f]{64}", getattr(self, name)):
                raise ValueError(f"SensitivityProfile: {name} is {getattr(self, name)!r}, expected 64 hex digits")

    @property
    def sensitivity(self) -> Floats:
        """s = 1 - sigma, f64 [L], 0 where it is under 1e-6."""
        s = 1.0 - np.asarray(self.sigma, np.float64)
        return np.where(s < _STABLE, 0.0, s)

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON; floats come back to the bit."""
        Path(path).write_text(json.dumps({"version": _VERSION} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, model_hash: str, text_hash: str | None = None) -> SensitivityProfile:
        """Reads a profile. ValueError for another model's or (where ``text_hash`` is given) another text's, or a file that
        is no profile."""
        try:
            fields = json.loads(Path(path).read_text())
            version = fields.pop("version")
            fields |= {name: tuple(map(float, fields[name])) for name in ("sigma", "spread")}
            profile = cls(**fields)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"sensitivity profile: {path} is none ({error})") from error
        if version != _VERSION:
            raise ValueError(f"sensitivity profile: {path} is of version {version}, expected {_VERSION}")
        profile.require("model_hash", model_hash)
        if text_hash is not None:
            profile.require("text_hash", text_hash)
        return profile

    def require(self, name: str, expected: str) -> None:
        """ValueError unless ``model_hash`` or ``text_hash`` is the one expected."""
        if getattr(self, name) != expected:
            what = "model" if name == "model_hash" else "text"
            raise ValueError(
                f"sensitivity profile: measured with another {what}: {getattr(self, name)}, not {expected}"
            )


@dataclass(frozen=True)
class Sensitivity:
    """w_l = s_l^alpha, with a floor of a quarter of the uniform share (paper: alpha 2 to 4; the floor is the code's).

    profile: of this model; alpha: > 0. All layers stable (s = 0): uniform. Floors that do not fit beside the caller's
    are lowered, equally. Deviation: the public code's mask ran as its own complement, min-max scales (the stablest layer
    gets nothing) and clamps after dividing, 2 to 17 % over budget; here s is used as measured and the sum is exact.
    ValueError if the cache has another number of layers than the profile.
    """

    profile: SensitivityProfile
    alpha: float = 2.0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"Sensitivity: alpha is {self.alpha}, expected > 0")

    def allocate(
        self, seen: RowsSeen, total: int, floor: Tensor | None = None, cap: Tensor | None = None
    ) -> Allocation:
        layers, rows = seen.tokens.shape
        s = self.profile.sensitivity
        if len(s) != layers:
            raise ValueError(f"Sensitivity: the profile has {len(s)} layers, the cache {layers}")
        low, high = limits(seen, floor, cap)
        wanted = torch.minimum(torch.clamp(low, min=total // max(layers * rows, 1) // 4), high)
        fits = total // seen.unit * seen.unit
        if int(_units(wanted, seen.unit).sum()) * seen.unit > fits:
            given = split(fits // seen.unit, np.ones(low.numel()), _flat(low, seen.unit), _flat(wanted, seen.unit))
            wanted = torch.minimum(torch.from_numpy(given * seen.unit).view(low.shape), wanted)
        return divide(seen, total, (s**self.alpha)[:, None], wanted, cap)


def _units(values: Tensor, unit: int) -> Tensor:
    return torch.div(values + unit - 1, unit, rounding_mode="floor")


def _flat(values: Tensor, unit: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.asarray(_units(values, unit).numpy().ravel(), np.int64)
