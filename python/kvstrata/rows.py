"""What the roles of a policy read of one layer, beyond where its tokens stand: attention, mass, keys."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvstrata._C import Store
from kvstrata.config import Shape


class Rows:
    """The rows of some sequences in one layer, for :class:`kvstrata.policy.base.Reader`. Valid until the next plan.

    ends: one past the newest query's position, by sequence; arithmetic: scale of q . k and softcap (0: none) of the layer.
    Results are [R, ...] in order of (sequence, head), places in table order.
    """

    def __init__(
        self,
        store: Store,
        shape: Shape,
        layer: int,
        ids: list[int],
        columns: int,
        ends: list[int],
        arithmetic: tuple[float, float],
    ) -> None:
        self._store = store
        self._shape = shape
        self._layer = layer
        self._spec = shape.layers[layer]
        self._ids = ids
        self._columns = columns
        self._ends = ends
        self._scale, self._softcap = arithmetic
        self._decoded: tuple[Tensor, Tensor] | None = None

    def keys(self) -> Tensor:
        return self._decode()[0]

    def values(self) -> Tensor:
        return self._decode()[1]

    def mass(self) -> Tensor:
        scores = torch.empty(self._rows, self._columns)
        self._store.look(self._layer, self._ids, 0, 0, 0, scores.data_ptr(), self._columns)
        return scores

    def queries(self) -> tuple[Tensor, Tensor]:
        spec, found = self._spec, []
        for i in self._ids:
            room = self._store.queries(self._layer, i, 0)
            out = torch.empty(spec.q_heads * room * spec.head_dim, dtype=self._shape.dtype)
            n = self._store.queries(self._layer, i, out.data_ptr())
            q = out[: spec.q_heads * n * spec.head_dim].view(spec.kv_heads, -1, n, spec.head_dim)
            found.append(q.float())
        most = max(q.shape[2] for q in found)
        whole = torch.zeros(len(found), *found[0].shape[:2], most, spec.head_dim)
        for b, q in enumerate(found):
            whole[b, :, :, most - q.shape[2] :] = q
        counts = torch.tensor([q.shape[2] for q in found]).repeat_interleave(spec.kv_heads)
        return whole.flatten(0, 1), counts

    def attention(self, queries: int, spread: Literal["mean", "std", "variance"], weight: float) -> Tensor:
        shares, present = self._shares(queries)
        n = present.sum(-1).clamp_min(1).view(-1, 1, 1)
        mean = shares.sum(2) / n
        if spread == "mean":
            return mean
        away = torch.where(present[:, None, :, None], shares - mean.unsqueeze(2), 0.0)
        variance = away.square().sum(2) / (n - 1).clamp_min(1)
        return mean + weight * (variance.sqrt() if spread == "std" else variance)

    def pool(
        self, score: Tensor, kernel: int, kind: Literal["avg", "max"], divide: Literal["present", "kernel"]
    ) -> Tensor:
        positions = self._positions()
        length = int(positions.max()) + 1 + kernel
        rows, group, columns = score.shape
        at = torch.where(positions >= 0, positions + kernel // 2, length).long()  # [R, N]; padding goes beyond the end
        empty = -torch.inf if kind == "max" else 0.0
        line = torch.full((rows, group, length + 1), empty)
        line.scatter_(2, at.unsqueeze(1).expand(-1, group, -1), score.float())
        there = torch.zeros(rows, length + 1).scatter_(1, at, 1.0)
        line[..., -1], there[..., -1] = empty, 0.0
        windows = line[..., :-1].unfold(2, kernel, 1)
        if kind == "max":
            pooled = windows.amax(-1)
        else:
            counted = there[:, :-1].unfold(1, kernel, 1).sum(-1).unsqueeze(1) if divide == "present" else kernel
            pooled = windows.sum(-1) / counted
        back = (at - kernel // 2).clamp_max(pooled.shape[-1] - 1).unsqueeze(1).expand(-1, group, -1)
        return torch.where(positions >= 0, pooled.gather(2, back).mean(1), 0.0)

    def key_scores(self, kind: Literal["norm", "diversity"]) -> Tensor:
        keys, stored = self.keys(), self._positions() >= 0
        if kind == "norm":
            norm: Tensor = keys.norm(dim=-1)
            return -norm
        direction = torch.nn.functional.normalize(keys, dim=-1)
        anchor = direction.sum(1, keepdim=True) / stored.sum(1).clamp_min(1).view(-1, 1, 1)
        similarity: Tensor = torch.nn.functional.cosine_similarity(keys, anchor, dim=-1)
        return torch.where(stored, -similarity, 0.0)

    def statistics(self, queries: int, which: Literal["sound", "code"]) -> Tensor:
        raise NotImplementedError

    def _shares(self, queries: int) -> tuple[Tensor, Tensor]:
        """Softmax of each query over the tokens not later than it, f32 [R, G, W, N], and which queries there are [R, W]."""
        q, counts = self.queries()
        q = q[:, :, max(0, q.shape[2] - queries) :]
        window = q.shape[2]
        present = torch.arange(window) >= window - counts.unsqueeze(1)
        ends = torch.tensor(self._ends).repeat_interleave(self._spec.kv_heads)
        at = ends.unsqueeze(1) - window + torch.arange(window)  # [R, W]
        positions = self._positions()
        read = (positions >= 0).unsqueeze(1) & (positions.unsqueeze(1) <= at.unsqueeze(2)) & present.unsqueeze(2)
        z = self._scale * torch.einsum("rgwd,rnd->rgwn", q, self.keys())
        if self._softcap > 0:
            z = self._softcap * torch.tanh(z / self._softcap)
        z = z.masked_fill(~read.unsqueeze(1), -torch.inf)
        return z.softmax(-1).nan_to_num(0.0).masked_fill(~read.unsqueeze(1), 0.0), present

    # --- parts ------------------------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        return len(self._ids) * self._spec.kv_heads

    def _positions(self) -> Tensor:
        positions = torch.empty(self._rows, self._columns, dtype=torch.int32)
        self._store.look(self._layer, self._ids, positions.data_ptr(), 0, 0, 0, self._columns)
        return positions

    def _decode(self) -> tuple[Tensor, Tensor]:
        if self._decoded is None:
            k = torch.zeros(self._rows, self._columns, self._spec.head_dim)
            v = torch.zeros_like(k)
            for r in range(self._rows):
                seq, head = self._ids[r // self._spec.kv_heads], r % self._spec.kv_heads
                self._store.read(seq, self._layer, head, k[r].data_ptr(), v[r].data_ptr())
            self._decoded = k, v
        return self._decoded
