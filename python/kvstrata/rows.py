"""What the roles of a policy read of one layer, beyond where its tokens stand: attention, mass, keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvstrata._C import Store
from kvstrata.config import DTYPES, Shape
from kvstrata.scores import DIVIDE, KEYS, POOL, STATS

_SPREAD = {"mean": 0, "variance": 1, "std": 2}


@dataclass(frozen=True, eq=False)
class Spans:
    """Queries of a layer beside those of a sequence: E spans, one after another.

    q: [n, Hq, D] in the cache's dtype; lse: f32 [n, Hq], natural log, of all that each of them saw, its own span too; offsets:
    E + 1, where each span begins and the last ends.
    """

    q: Tensor
    lse: Tensor
    offsets: list[int]


class Rows:
    """The rows of some sequences in one layer, for :class:`kvstrata.policy.base.Reader`. Valid until the next plan.

    arithmetic: scale of q . k and softcap (0: none) of the layer. Results are [R, ...] in order of (sequence, head), places
    in table order.
    """

    def __init__(
        self,
        store: Store,
        shape: Shape,
        layer: int,
        ids: list[int],
        columns: int,
        arithmetic: tuple[float, float],
        spans: Spans | None = None,
    ) -> None:
        self._store = store
        self._shape = shape
        self._layer = layer
        self._spec = shape.layers[layer]
        self._ids = ids
        self._columns = columns
        self._arithmetic = arithmetic
        self._spans = spans
        self._patched: Tensor | None = None
        self._decoded: tuple[Tensor, Tensor] | None = None

    def keys(self) -> Tensor:
        return self._decode()[0]

    def values(self) -> Tensor:
        return self._decode()[1]

    def mass(self) -> Tensor:
        scores = torch.empty(self._rows, self._columns)
        self._store.look(self._layer, self._ids, 0, 0, 0, scores.data_ptr(), 0, 0, 0, self._columns)
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
        out = torch.empty(self._rows, self._group, self._columns)
        code = _SPREAD[spread]
        where = (out.data_ptr(), self._columns)
        self._store.score_window(self._layer, self._ids, queries, code, weight, *self._arithmetic, *where)
        return out

    def score_max(self, q: Tensor, lse: Tensor, spans: Sequence[int]) -> Tensor:
        """f32 [E, R, N]: the most that a query of each span, on any of its heads, saw of each token.

        q [R, G, W, D] f32, bf16 or f16 and lse f32 [R, G, W] of queries behind all that is stored; spans: E + 1 rising
        offsets into the W (:func:`kvstrata.ops.score_max`).
        """
        rows = (self._rows, self._group)
        shape = (*rows, q.shape[2] if q.dim() == 4 else "W", self._spec.head_dim)
        if q.dtype not in DTYPES or q.device.type != "cpu" or tuple(q.shape) != shape:
            raise ValueError(
                f"score_max: q is {q.dtype} {list(q.shape)} on {q.device}, expected f32, bf16 or f16 {list(shape)} on cpu"
            )
        if lse.dtype != torch.float32 or lse.device.type != "cpu" or lse.shape != q.shape[:3]:
            raise ValueError(
                f"score_max: lse is {lse.dtype} {list(lse.shape)} on {lse.device}, expected torch.float32"
                f" {list(q.shape[:3])} on cpu"
            )
        if len(spans) < 2:
            raise ValueError(f"score_max: spans has {len(spans)} offsets, expected at least 2")
        q, lse = q if q.stride(3) == 1 else q.contiguous(), lse.contiguous()
        row, head, token = q.stride()[:3]
        which = ((q.data_ptr(), row, head, token), DTYPES[q.dtype], lse.data_ptr(), q.shape[2], list(spans))
        out = torch.empty(len(spans) - 1, self._rows, self._columns)
        where = (out.data_ptr(), self._columns, torch.get_num_threads())
        self._store.score_max(self._layer, self._ids, which, *self._arithmetic, *where)
        return out

    def pool(
        self, score: Tensor, kernel: int, kind: Literal["avg", "max"], divide: Literal["present", "kernel"]
    ) -> Tensor:
        wide = score.unsqueeze(1) if score.dim() == 2 else score
        expected = (self._rows, wide.shape[1] if wide.dim() == 3 else self._group, self._columns)
        if score.dtype != torch.float32 or tuple(wide.shape) != expected:
            raise ValueError(
                f"pool: score is {score.dtype} {list(score.shape)}, expected torch.float32 {list(expected)}"
            )
        wide, out = wide.contiguous(), torch.empty(self._rows, self._columns)
        how = (wide.shape[1], self._columns, kernel, POOL[kind], DIVIDE[divide])
        self._store.pool_scores(self._layer, self._ids, wide.data_ptr(), *how, out.data_ptr())
        return out

    def key_scores(self, kind: Literal["norm", "diversity"]) -> Tensor:
        out = torch.empty(self._rows, self._columns)
        self._store.score_keys(self._layer, self._ids, KEYS[kind], out.data_ptr(), self._columns)
        return out

    def page_mass(self, queries: int) -> Tensor:
        out = torch.empty(self._rows, self._columns)
        how = (queries, *self._arithmetic, out.data_ptr(), self._columns)
        self._store.score_pages(self._layer, self._ids, *how)
        return out

    def cluster(self, segment: Tensor, iters: int | None) -> Tensor:
        if segment.dtype != torch.int32 or segment.shape != (self._rows, self._columns):
            raise ValueError(
                f"cluster: segment is {segment.dtype} {list(segment.shape)}, expected torch.int32"
                f" {[self._rows, self._columns]}"
            )
        segment, group = segment.contiguous(), torch.empty(self._rows, self._columns, dtype=torch.int32)
        where = (segment.data_ptr(), group.data_ptr(), self._columns)
        self._store.cluster(self._layer, self._ids, *where, -1 if iters is None else iters, torch.get_num_threads())
        return group

    def statistics(self, queries: int, which: Literal["sound", "code"]) -> Tensor:
        out = torch.empty(self._rows, self._group, 3)
        self._store.measure(self._layer, self._ids, queries, STATS[which], *self._arithmetic, out.data_ptr())
        return out

    def patched(self) -> Tensor:
        if self._spans is None:
            raise RuntimeError("patched: this plan has no spans, expected one of Cache.read")
        if self._patched is None:
            q, lse, offsets = self._spans.q, self._spans.lse, self._spans.offsets
            heads = self._spec.kv_heads, self._group
            by_row = q.view(len(q), *heads, -1).permute(1, 2, 0, 3), lse.view(len(lse), *heads).permute(1, 2, 0)
            self._patched = self.score_max(*by_row, offsets)
        return self._patched

    # --- parts ------------------------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        return len(self._ids) * self._spec.kv_heads

    @property
    def _group(self) -> int:
        return self._spec.q_heads // self._spec.kv_heads

    def _decode(self) -> tuple[Tensor, Tensor]:
        if self._decoded is None:
            k = torch.zeros(self._rows, self._columns, self._spec.head_dim)
            v = torch.zeros_like(k)
            for r in range(self._rows):
                seq, head = self._ids[r // self._spec.kv_heads], r % self._spec.kv_heads
                self._store.read(seq, self._layer, head, k[r].data_ptr(), v[r].data_ptr())
            self._decoded = k, v
        return self._decoded
