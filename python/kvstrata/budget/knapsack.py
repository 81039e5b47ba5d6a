"""A format for every token of every layer and row at once: the most attention mass per byte (ours, after arXiv 2509.25849).

Items are chunks of 16 tokens, so that a kept chunk is one page and costs are true bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvstrata.budget.allocate import Allocation, RowsSeen, count_nans, masses
from kvstrata.config import SLOTS, Unsupported
from kvstrata.ops import choose_chunks, chunk_order

FULL_NAMES = ("full", "f32", "bf16", "f16")
FIDELITY: Mapping[str, float] = {
    **dict.fromkeys(FULL_NAMES, 1.0),
    "int8": 0.9935,
    "int4": 0.905,
    "int2": 0.67,
}
"""1 less the relative error of the attention output, Gaussian data."""

PRIOR = 0.2
"""Least squares, over rows of the bundled model, of the attention that answers paid to each token on what the last 32 queries
before them had paid (``bench/quality/priors.py``): of the sixteenth of the tokens that is read most, scores say how much; of
the others too little, the more so the lower they are. By scores alone, bytes go to Full pages in which more tokens would do."""

Step = tuple[int, float, int]
"""Bytes of a page, fidelity, and what it stands for: 0 Evicted, 1 + f the format f of ``RowsSeen.formats``."""


def hull(points: Sequence[Step]) -> list[Step]:
    """The upper concave hull of (cost, fidelity) points, by cost: gains per byte fall strictly from step to step.

    A point on the line between two others is off the hull. Starts at the cheapest point (of equal cost: the best).
    """
    kept: list[Step] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if kept and point[1] <= kept[-1][1]:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def _gain(a: Step, b: Step) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@dataclass(frozen=True)
class Knapsack:
    """Full, a quantized format or Evicted for each chunk, so that the sum of value * fidelity is largest within the bytes.

    formats: names out of ``RowsSeen.formats``, the first one Full, whatever the model's dtype; fidelity: of each format in
    (0, 1] (defaults: Gaussian data); layer_weight: omega [L] (None: 1); metric: "mass", or "energy" (value = (share * length
    of the token's value)^2, fidelity 1 - e^2; needs ``seen.norms``); prior: the part in [0, 1] of a row's attention that later
    queries are taken to spread evenly, whatever the scores say (PRIOR).
    Value of a token: omega * priority * ((1 - prior) * score / sum of its row's scores over visible tokens + prior / tokens of
    its row that are not protected), 0 where the score is NaN. A quantized token can only stay as it is or go below. The loss
    against the optimum is at most the largest single step.

    ``bytes`` are the pages' costs: at most ``total``, in whole pages, and what no page fits into is ``slack``; ``formats``
    says what each token becomes. Needs scores that are attention mass; without scores Unsupported, as are floors and caps
    below ``seen.full_bytes`` (a row has no limit of its own here). Shared pages (cost / refcount) are not seen yet.
    """

    formats: tuple[str, ...] = ("bf16", "int8", "int4")
    fidelity: Mapping[str, float] = field(default_factory=lambda: FIDELITY)
    layer_weight: tuple[float, ...] | None = None
    metric: Literal["mass", "energy"] = "mass"
    prior: float = PRIOR
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError(f"Knapsack: formats is {self.formats!r}, expected different names, Full first")
        for name in self.formats:
            if not 0 < self.fidelity.get(name, 0.0) <= 1:
                raise ValueError(f"Knapsack: fidelity of {name!r} is {self.fidelity.get(name)}, expected 0 < f <= 1")
        if self.fidelity[self.formats[0]] != 1:
            raise ValueError(f"Knapsack: formats[0] is {self.formats[0]!r}, expected a Full format (fidelity 1)")
        if self.metric not in ("mass", "energy"):
            raise ValueError(f"Knapsack: metric is {self.metric!r}, expected 'mass' or 'energy'")
        if not 0 <= self.prior <= 1:
            raise ValueError(f"Knapsack: prior is {self.prior}, expected 0 to 1")
        if any(not 0 <= w < float("inf") for w in self.layer_weight or ()):
            raise ValueError("Knapsack: a layer_weight is negative or not finite")

    def allocate(
        self, seen: RowsSeen, total: int, floor: Tensor | None = None, cap: Tensor | None = None
    ) -> Allocation:
        if seen.scores is None:
            raise Unsupported("Knapsack: there are no scores yet; divide uniformly until there are")
        if (floor is not None and floor.any()) or (cap is not None and (cap < seen.full_bytes).any()):
            raise Unsupported("Knapsack: floors, and caps below the rows' Full bytes, are not honoured")
        if total < 0:
            raise ValueError(f"Knapsack: total is {total}, expected >= 0")
        layers, rows, columns = seen.scores.shape
        kind = self._kind(seen)
        positions = (
            torch.arange(columns, dtype=torch.int32).expand_as(kind) if seen.positions is None else seen.positions
        )
        wide = (layers * rows, columns)
        order, w, items = chunk_order(self._value(seen).reshape(wide), kind.reshape(wide), positions.reshape(wide))
        counts, ladders, column = self._ladders(seen, kind.reshape(wide), w.shape[1])
        real = torch.arange(w.shape[1]) < items.unsqueeze(1)  # [L * R, M]
        cost, fidelity = _table(ladders, torch.int64, 0), _table(ladders, torch.float32, 1)
        step, _, _ = choose_chunks(w[real], column[real], cost, fidelity, total)
        picked = torch.zeros(real.shape, dtype=torch.int64)
        picked[real] = step.to(torch.int64)
        where = column.to(torch.int64)
        spent = torch.where(real, cost[picked, where], 0).sum(1).view(layers, rows)
        target = _table(ladders, torch.uint8, 2)[picked, where]
        formats = _to_tokens(order, target, counts).view(layers, rows, columns)
        return Allocation(spent, formats=formats, slack=total - int(spent.sum()), nans=count_nans(seen))

    def _kind(self, seen: RowsSeen) -> Tensor:
        """u8 [L, R, N]: 0 no token, 1 + the format it is stored in."""
        stored = torch.zeros(seen.present.shape, dtype=torch.uint8) if seen.stored is None else seen.stored
        if (stored >= len(seen.formats)).logical_and(seen.present).any():
            raise ValueError(f"Knapsack: stored names a format beyond {seen.formats}")
        return torch.where(seen.present, stored + 1, 0).to(torch.uint8)

    def _value(self, seen: RowsSeen) -> Tensor:
        """Value of each token, f32 [L, R, N]; 0 for NaN."""
        scores = masses("Knapsack", seen).clamp_min(0)
        whole = scores.sum(-1) if seen.mass is None else seen.mass
        share = torch.where(whole.unsqueeze(-1) > 0, scores / whole.unsqueeze(-1), 0.0)
        if self.prior and seen.scores is not None:
            evenly = (self.prior / seen.tokens.clamp_min(1)).unsqueeze(-1)
            known = seen.present & ~seen.scores.isnan()
            share = torch.where(known, (1 - self.prior) * share + evenly, 0.0).float()
        if self.metric == "energy":
            if seen.norms is None:
                raise ValueError("Knapsack: metric 'energy' needs seen.norms")
            share = (share * torch.where(seen.present, seen.norms, 0.0)).square()
        if self.layer_weight is not None:
            if len(self.layer_weight) != share.shape[0]:
                raise ValueError(f"Knapsack: {len(self.layer_weight)} layer weights, expected {share.shape[0]}")
            share = share * torch.tensor(self.layer_weight).view(-1, 1, 1)
        return share if seen.priority is None else (share * seen.priority.view(1, -1, 1)).float()

    def _ladders(self, seen: RowsSeen, kind: Tensor, chunks: int) -> tuple[Tensor, list[list[Step]], Tensor]:
        """Tokens of each kind i64 [L * R, 1 + F]; the ladders in use; the ladder of each chunk u8 [L * R, M]."""
        rows = seen.tokens.shape[1]
        counts = torch.stack([(kind == k).sum(1) for k in range(len(seen.formats) + 1)], dim=1)
        ends = ((counts[:, 1:] + SLOTS - 1) // SLOTS).cumsum(1)
        own = (torch.arange(chunks).view(1, -1, 1) >= ends.unsqueeze(1)).sum(-1)
        own = torch.where(own < len(seen.formats), own, 0)  # beyond a row's last chunk: any
        known: dict[tuple[Step, ...], int] = {}
        number = torch.zeros(seen.page_bytes.shape, dtype=torch.int64)  # of the ladder of (format now, layer)
        for now in torch.unique(own).tolist():
            for layer in range(number.shape[1]):
                number[now, layer] = known.setdefault(tuple(self.ladder(seen, layer, now)), len(known))
        if len(known) > 256:
            raise Unsupported(f"Knapsack: {len(known)} different ladders, at most 256 work")
        layer_of = torch.arange(number.shape[1]).repeat_interleave(rows).unsqueeze(1)
        return counts, [list(steps) for steps in known], number[own, layer_of].to(torch.uint8)

    def ladder(self, seen: RowsSeen, layer: int, now: int) -> list[Step]:
        """The steps of a chunk of one layer that is now stored in format ``now``: the hull of what it may become."""
        if seen.formats[0] not in FULL_NAMES or not set(self.formats[1:]) <= set(seen.formats[1:]):
            raise ValueError(
                f"Knapsack: formats are {self.formats}, expected some of {seen.formats}, {seen.formats[0]!r} first"
            )
        own, mine = seen.formats[now], (seen.formats[0], *self.formats[1:])  # Full pages are of the model's dtype
        names = [n for n in mine if now == 0 or self._fidelity(n) < self._fidelity(own)]
        points = [(0, 0.0, 0)]
        for name in names if now == 0 else [own, *names]:
            at = seen.formats.index(name)
            points.append((int(seen.page_bytes[at, layer]), self._fidelity(name), 1 + at))
        return hull(points)

    def _fidelity(self, name: str) -> float:
        if name in FULL_NAMES:
            return 1.0
        if name not in self.fidelity:
            raise ValueError(f"Knapsack: no fidelity is known of format {name!r}")
        f = self.fidelity[name]
        return 1 - (1 - f) ** 2 if self.metric == "energy" else f


def _table(ladders: list[list[Step]], dtype: torch.dtype, part: int) -> Tensor:
    """One part of the ladders' steps, [J, F]; a shorter ladder repeats its last."""
    most = max(map(len, ladders), default=1)
    full = [steps + steps[-1:] * (most - len(steps)) for steps in ladders] or [[(0, 0.0, 0)]]
    return torch.tensor([[steps[j][part] for steps in full] for j in range(most)], dtype=dtype)


def _to_tokens(order: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """What each token becomes, u8 [R, N], from what each chunk becomes, u8 [R, M], and the order of ``chunk_order``."""
    out = torch.zeros(order.shape, dtype=torch.uint8)
    chunks = (counts[:, 1:] + SLOTS - 1) // SLOTS
    ends = counts[:, 1:].cumsum(1)
    place = torch.arange(order.shape[1]).expand(order.shape)
    kind = (place.unsqueeze(-1) >= ends.unsqueeze(1)).sum(-1).clamp_max(ends.shape[1] - 1)
    first_token, first_chunk = ends - counts[:, 1:], chunks.cumsum(1) - chunks
    chunk = first_chunk.gather(1, kind) + (place - first_token.gather(1, kind)) // SLOTS
    row, at = torch.nonzero(order >= 0, as_tuple=True)
    out[row, order[row, at].to(torch.int64)] = target[row, chunk[row, at]]
    return out
