"""What roles see, made up: a layer's rows, and a reader that computes in plain torch what it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvstrata.policy.base import EVICTED, FULL, INT4, Allowance, Seen

C_FULL, C_INT8, C_INT4, C_INT2 = 400, 200, 100, 60
PAGE_BYTES = {FULL: C_FULL, 2: C_INT8, INT4: C_INT4, 4: C_INT2}


@dataclass
class FakeReader:
    """keys: f32 [R, N, D]; asked: f32 [R, G, W, D], every query so far; positions: i32 [R, N], queries are the last W."""

    positions: Tensor
    kept: Tensor
    asked: Tensor
    calls: list[tuple[object, ...]] = field(default_factory=list)

    def _weights(self, queries: int) -> Tensor:
        """f32 [R, G, W', N], W' = as many of the last queries as there are; no query sees a later token."""
        last = self.asked[:, :, -queries:]
        at = int(self.positions.max()) + 1 - torch.arange(last.shape[2], 0, -1)
        logits = torch.einsum("rgwd,rnd->rgwn", last, self.kept)
        seen = (self.positions >= 0)[:, None, None] & (self.positions[:, None, None] <= at[:, None])
        return logits.masked_fill(~seen, float("-inf")).softmax(-1)

    def attention(self, queries: int, spread: str, weight: float) -> Tensor:
        self.calls.append(("attention", queries, spread, weight))
        a = self._weights(queries)
        if spread == "mean" or a.shape[2] < 2:
            return a.mean(2)
        return a.mean(2) + weight * (a.std(2) if spread == "std" else a.var(2))

    def pool(self, score: Tensor, kernel: int, kind: str, divide: str) -> Tensor:
        self.calls.append(("pool", kernel, kind, divide))
        score = score.unsqueeze(1) if score.dim() == 2 else score
        far = (self.positions.unsqueeze(2) - self.positions.unsqueeze(1)).abs() > kernel // 2
        near = ~far & (self.positions >= 0).unsqueeze(1) & (self.positions >= 0).unsqueeze(2)  # [R, N, N]
        if kind == "max":
            wide = score.unsqueeze(2).masked_fill(~near.unsqueeze(1), float("-inf")).amax(-1)
            return torch.where(self.positions >= 0, wide.mean(1), 0.0)
        total = torch.einsum("rgm,rnm->rgn", score, near.float())
        by = near.sum(-1).clamp_min(1) if divide == "present" else torch.full_like(self.positions, kernel)
        return (total / by.unsqueeze(1)).mean(1)

    def mass(self) -> Tensor:
        return self._weights(self.asked.shape[2]).sum(2).mean(1)

    def key_scores(self, kind: str) -> Tensor:
        self.calls.append(("key_scores", kind))
        norm = self.kept.norm(dim=-1)
        if kind == "norm":
            return -norm
        stored = (self.positions >= 0).unsqueeze(-1)
        unit = torch.where(stored, self.kept / norm.clamp_min(1e-12).unsqueeze(-1), 0.0)
        return -torch.cosine_similarity(self.kept, unit.sum(1, keepdim=True), dim=-1)

    def keys(self) -> Tensor:
        return self.kept

    def values(self) -> Tensor:
        return -self.kept

    def queries(self) -> tuple[Tensor, Tensor]:
        return self.asked, torch.full(self.positions.shape[:1], self.asked.shape[2])

    def statistics(self, queries: int, which: str) -> Tensor:
        return self._weights(queries).new_ones(self.asked.shape[0], self.asked.shape[1], 3)


def seen_of(generator: torch.Generator, rows: int = 3, tokens: int = 50, queries: int = 16, sinks: int = 4) -> Seen:
    """Ragged rows of Full tokens in order, a tail of 16, and a reader over random keys and queries."""
    held = torch.randint(tokens // 2, tokens + 1, (rows,), generator=generator)
    held[0] = tokens
    columns = torch.arange(tokens, dtype=torch.int32).expand(rows, -1)
    positions = torch.where(columns < held.unsqueeze(1), columns, -1)
    positions = torch.where(positions >= 0, positions + (tokens - held).unsqueeze(1).int(), -1)  # all end together
    stored = positions >= 0
    keys = torch.randn(rows, tokens, 8, generator=generator) * stored.unsqueeze(-1)
    reader = FakeReader(positions, keys, torch.randn(rows, 2, queries, 8, generator=generator))
    state = torch.where(stored, FULL, EVICTED).to(torch.uint8)
    lengths = torch.full((rows,), tokens)
    return Seen(0, positions, lengths, positions >= tokens - 16, state, sinks, read=reader)


def row(state: list[int], score: list[float] | None = None, positions: list[int] | None = None) -> Seen:
    """One row without protected tokens."""
    place = list(range(len(state))) if positions is None else positions
    at = torch.tensor([place], dtype=torch.int32)
    return Seen(
        layer=0,
        positions=at,
        lengths=torch.tensor([len(state)]),
        open=torch.zeros_like(at, dtype=torch.bool),
        state=torch.tensor([state], dtype=torch.uint8),
        score=None if score is None else torch.tensor([score], dtype=torch.float32),
    )


def allowed(*budgets: int, share: list[float] | None = None, formats: Tensor | None = None) -> Allowance:
    """So many bytes for each row, at page bytes 400, 200, 100, 60."""
    full_share = None if share is None else torch.tensor(share)
    return Allowance(torch.tensor(budgets), PAGE_BYTES, full_share, formats)
