"""A step with spans: prompts that a sequence's layers are read with, to say what its tokens are worth, and that leave nothing.

EpiCache (arXiv 2509.17396) reads a prompt that guesses at future questions behind every block of history. Here those of all
episodes run in one pass, none of which sees another.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstrata import dense, ops
from kvstrata.budget.costs import keeps_scores
from kvstrata.config import DTYPES
from kvstrata.rows import Spans
from kvstrata.step import arithmetic, check_tensor

if TYPE_CHECKING:
    from kvstrata.cache import Cache, Sequence
    from kvstrata.step import Step


class SpanStep:
    """Tokens of one sequence, and behind them E spans of queries. Made by :meth:`Cache.read`; leaving its ``with`` block
    commits, an exception rolls back: the tokens go, layers that were compacted stay so.

    Tensors are packed: the tokens, then each span. Every layer shows all its sets, whatever the view is, and appends its
    tokens; the spans attend to all of that and, causally, to themselves; then, if it compacts, the layer is planned, or, if it
    scores, what they saw joins the scores of its tokens.
    """

    def __init__(
        self, cache: Cache, seq: Sequence, tokens: int, spans: list[int], compact: bool, score: int | None = None
    ) -> None:
        if not cache.policy.episodic:
            raise ValueError(
                f"read: policy {cache.policy.name!r} knows no episodes, expected one whose plans name sets"
            )
        if tokens < 0 or any(n < 1 for n in spans) or tokens + sum(spans) < 1:
            raise ValueError(
                f"read: tokens is {tokens}, spans {spans}, expected tokens >= 0, spans >= 1, and some of them"
            )
        if compact and not spans:
            raise ValueError("read: compact without spans, expected some: tokens are scored by them")
        if score is not None and (compact or not keeps_scores(cache.policy)):
            raise ValueError("read: score, expected compact=False and a policy that keeps scores")
        self._cache = cache
        self._store = cache._store
        self._seq = seq.id
        self._tokens = tokens
        self._offsets = [0, *accumulate(spans)]
        self._compact, self._score = compact, score
        self._step: Step | None = cache.step([seq], [tokens]) if tokens else None
        self.positions = self._placed(cache.logical_length(seq))
        """Position of each token and query for RoPE, i64 [tokens + all spans]: every span follows the tokens."""
        self._beside: list[int] = self.positions[tokens:].tolist()
        self._attended: set[int] = set()

    def _placed(self, length: int) -> Tensor:
        ahead = length + self._tokens
        spans = (torch.arange(ahead, ahead + b - a) for a, b in pairwise(self._offsets))
        return torch.cat([torch.arange(length, ahead), *spans])

    def __enter__(self) -> SpanStep:
        if self._step is not None:
            self._step.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._step is not None:
            self._step.__exit__(kind, error, trace)
        else:
            self._cache._views.after_step()
        self._cache._slabs.settle()
        if kind is None and self._step is None and (missing := self._missing()):
            raise ValueError(f"read: layers {missing} did not attend, expected all")

    def _missing(self) -> list[int]:
        return sorted(set(range(len(self._cache.shape.layers))) - self._attended)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Step.attend`, of tokens and spans: q [tokens + all spans, Hq, D], k and v the same with H heads."""
        self._check(layer, q, k, v)
        self._attended.add(layer)
        try:
            self._cache._views.open(layer, self._seq)
            return self._attend(layer, q, k, v, scale, softcap, sinks)
        finally:
            self._cache._views.close(layer, self._seq)

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        n, out = self._tokens, torch.empty(q.shape, dtype=q.dtype)
        if self._step is not None:
            self._cache._slabs.reserve(layer, layer + 1, 0, n)  # plans of the layers before may have taken what it had
            out[:n] = self._step.attend(layer, q[:n], k[:n], v[:n], scale=scale, softcap=softcap, sinks=sinks)
            if (self._compact or self._score is not None) and self._cache.shape.layers[layer].window is None:
                self._store.settle(layer)
        if self._offsets[-1]:
            how = arithmetic("attend", self._cache.shape.layers[layer], scale, softcap)
            out[n:] = self._spans(layer, q[n:], k[n:], v[n:], *how, sinks)
        return out

    def _spans(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        window = self._cache.shape.layers[layer].window
        past, past_lse = self._attend_stored(layer, q, scale, softcap)
        own, own_lse = torch.empty_like(past), torch.empty_like(past_lse)
        for a, b in pairwise(self._offsets):
            part, part_lse = dense.attend(q[None, a:b], k[None, a:b], v[None, a:b], scale, softcap, window)
            own[a:b], own_lse[a:b] = part[0], part_lse[0]
        out, lse = ops.merge([past, own], [past_lse, own_lse])
        if sinks is not None:
            out, lse = dense.join_sinks(out, lse, sinks.detach().to(torch.float32).contiguous())
        if self._compact:
            self._cache._plans.arithmetic[layer] = (scale, softcap)
            self._cache._plans.compact(layer, self._seq, Spans(q, lse, self._offsets))
        elif self._score is not None:
            self._cache._plans.arithmetic[layer] = (scale, softcap)
            self._cache._plans.score(layer, self._seq, Spans(q, lse, self._offsets), self._score)
        return out

    def _attend_stored(self, layer: int, q: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.zeros(q.shape, dtype=torch.float32), torch.full(q.shape[:-1], -torch.inf)
        strides = ((x.data_ptr(), 0, x.stride(0), x.stride(1)) for x in (q, out, lse.unsqueeze(-1)))
        where, how = tuple(strides), (DTYPES[torch.float32], scale, softcap, torch.get_num_threads())
        self._store.attend_beside(layer, self._seq, self._beside, where[0], where[1], where[2], *how)
        return out, lse

    def _check(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        layers = self._cache.shape.layers
        if not 0 <= layer < len(layers) or layer in self._attended:
            raise ValueError(f"attend: layer is {layer}, expected each of 0..{len(layers) - 1} once")
        spec, n = layers[layer], self._tokens + self._offsets[-1]
        for name, x, heads in (("q", q, spec.q_heads), ("k", k, spec.kv_heads), ("v", v, spec.kv_heads)):
            check_tensor("attend", name, x, (n, heads, spec.head_dim), self._cache.shape)
