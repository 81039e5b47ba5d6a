"""A step: tokens of some sequences go through the layers, then all of it stands or none."""

from __future__ import annotations

from math import inf, isfinite
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from kvstrata import dense, ops
from kvstrata.config import DTYPES, LayerSpec, Shape
from kvstrata.limit import TURN_ABOVE

if TYPE_CHECKING:
    from kvstrata.cache import Cache, Sequence

DENSE_ABOVE = 64
"""Steps that feed a sequence more tokens than this attend to their own keys and values densely, before they are stored."""

MASS_QUERIES = 64
"""Queries of a prompt whose attention mass is found at a time."""

_F32 = DTYPES[torch.float32]
_NO_LSE = (0, 0, 0, 0)
_ROWS = torch.contiguous_format


class Step:
    """One forward pass. Made by :meth:`Cache.step`; leaving its ``with`` block commits, an exception rolls back.

    Two layouts: packed, q [n_tokens, Hq, D] with each sequence's tokens side by side, and padded, q [B, T, Hq, D].
    """

    def __init__(
        self, cache: Cache, seqs: list[Sequence], starts: list[int], tokens: list[int], columns: int | None
    ) -> None:
        self._cache = cache
        self._store = cache._store
        self._seqs = seqs
        self._ids = [s.id for s in seqs]
        self._starts = starts
        self._tokens = tokens
        self._columns = columns
        self._lead = (len(tokens),) if columns is None else (len(seqs), columns)
        self._padding = columns is not None and len(tokens) < len(seqs) * columns
        self._is_open = False
        self._attended: set[int] = set()
        self.closed = False

    # --- life ---------------------------------------------------------------------------------------------------------

    def open(self) -> Step:
        """Reserves the step's pages. Raises BudgetExceeded or ValueError before a page is taken."""
        if self.closed or self._is_open:
            raise RuntimeError("step: it was opened before, a step is used once")
        self._cache._enter(self)
        try:
            self._cache._slabs.loans.join_stream()
            self._store.begin(self._ids, self._starts, self._tokens)
        except BaseException:
            self._cache._leave(self)
            raise
        try:
            counts = [last - first for first, last in zip(self._starts, self._starts[1:], strict=False)]
            self._ends = [self._store.length(i) + n for i, n in zip(self._ids, counts, strict=True)]
            self._cache._guard.admit(self._ids, self._ends)
            self._past = any(self._store.length(i) for i in self._ids)
            self._counts = dict(zip(self._ids, counts, strict=True))
            drops = self._cache.policy.planner is not None and not self._cache.policy.episodic
            self._cut = [i for i, n in self._counts.items() if drops and n > TURN_ABOVE]
            self._cache._charge(self._counts, self._cut)
            self._cache._plans.before(self._counts, self._cut)
            self._cache._guard.admit_queries(max(self._counts.values()) if self._past else 0)
            if not self._cut:
                self._cache._guard.reserve((0, len(self._cache.shape.layers)), (0, self._store.longest))
        except BaseException:
            self._store.rollback()
            self._cache._leave(self)
            self._cache._slabs.settle()
            self._cache._charges.finish()
            raise
        self._is_open = True
        return self

    def commit(self) -> None:
        """Makes the step's tokens part of their sequences, seals, plans. Every layer must have attended."""
        self._check_open("commit")
        if missing := sorted(set(range(len(self._cache.shape.layers))) - self._attended):
            self.rollback()
            raise ValueError(f"commit: layers {missing} did not attend in this step, expected all; it was rolled back")
        longest = self._store.longest
        before = {i: self._store.length(i) for i in self._ids}
        try:
            self._store.commit()
        except BaseException:
            self.rollback()
            raise
        self._close()
        try:
            self._cache._charges.commit()
            self._cache._after_commit(before, longest, self._cut)
        finally:
            self._cache._charges.finish()

    def rollback(self) -> None:
        """Withdraws the step's tokens. A layer that was cut inside the step keeps its older tokens as cut."""
        self._check_open("rollback")
        self._store.rollback()
        self._close()
        self._cache._slabs.settle()
        self._cache._charges.finish()

    def __enter__(self) -> Step:
        return self if self._is_open else self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.closed:
            return
        if kind is None:
            self.commit()
        else:
            self.rollback()

    def _check_open(self, verb: str) -> None:
        if not self._is_open:
            raise RuntimeError(f"{verb}: the step is {'closed' if self.closed else 'not open'}")

    def _close(self) -> None:
        self._is_open = False
        self.closed = True
        self._cache._leave(self)

    # --- what a model reads ---------------------------------------------------------------------------------------------

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token for RoPE: i64 [n_tokens], or [B, T] in the padded layout (padding: 0)."""
        flat = [
            self._store.length(i) + t
            for i, first, last in zip(self._ids, self._starts, self._starts[1:], strict=False)
            for t in range(last - first)
        ]
        positions = torch.tensor(flat, dtype=torch.int64)
        if self._columns is None:
            return positions.to(self._cache.shape.device)
        padded = torch.zeros(len(self._ids), self._columns, dtype=torch.int64)
        padded[self._sequence_index(), torch.tensor(self._tokens)] = positions
        return padded.to(self._cache.shape.device)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Stores the layer's keys and values, and attends with its queries over all that is stored.

        q: [n_tokens, Hq, D] or [B, T, Hq, D]; k, v the same with H heads; the shape's dtype, last dimension contiguous.
        scale: of q . k, D^-1/2 if None; softcap: of the scaled logits; sinks: f32-convertible [Hq] sink logits. Returns
        the attention output in q's layout, contiguous; zeros for padding. ValueError on a wrong shape, dtype or device,
        and if the layer was attended before in this step.
        """
        self._check_open("attend")
        spec = self._check("attend", layer, q, k, v, sinks)
        scale, cap = arithmetic("attend", spec, scale, softcap)
        self._attended.add(layer)
        self._cache._plans.arithmetic[layer] = (scale, cap)
        sink = None if sinks is None else sinks.detach().to(q.device, torch.float32).contiguous()
        if self._cut or self._store.longest > DENSE_ABOVE:
            return self._attend_chunk(layer, spec, q, k, v, scale, cap, sink)
        out = torch.zeros_like(q, memory_format=_ROWS) if self._padding else torch.empty_like(q, memory_format=_ROWS)
        self._store.append_attend(
            layer,
            self._strides(q),
            self._strides(k),
            self._strides(v),
            self._strides(out),
            _NO_LSE,
            0 if sink is None else sink.data_ptr(),
            DTYPES[out.dtype],
            scale,
            cap,
            torch.get_num_threads(),
        )
        return out

    def append(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        q: torch.Tensor | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        """Stores the layer's keys and values without attending: of a prompt that was computed elsewhere.

        k, v, scale, softcap: as in :meth:`attend`; q: the queries, for policies that score by them. ValueError as there, and
        without queries under such a policy.
        """
        self._check_open("append")
        policy = self._cache.policy
        if q is None and (policy.queries or policy.massed):
            raise ValueError(f"append: q is None, expected the queries: policy {policy.name} scores by them")
        spec = self._check("append", layer, q, k, v, None)
        if q is not None and policy.massed and not self._cut:  # mass that a failed step takes back comes with attention
            self.attend(layer, q, k, v, scale=scale, softcap=softcap)
            return
        self._cache._plans.arithmetic[layer] = arithmetic("append", spec, scale, softcap)
        self._attended.add(layer)
        self._append_chunk(layer, q, k, v)

    # --- prompt chunks --------------------------------------------------------------------------------------------------

    def _attend_chunk(
        self,
        layer: int,
        spec: LayerSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Dense attention of the chunk with itself, paged attention over what is stored, merged; then append and cut."""
        out, lse = self._attend_own(spec, q, k, v, scale, softcap)
        if self._past:
            past, past_lse = self._attend_past(layer, q, scale, softcap)
            out, lse = ops.merge([past, out], [past_lse, lse])
        if sinks is not None:
            out, lse = dense.join_sinks(out, lse, sinks)
        self._append_chunk(layer, q, k, v)
        return out.to(q.dtype)

    def _attend_own(
        self, spec: LayerSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._columns is not None and not self._padding:
            return dense.attend(q, k, v, scale, softcap, spec.window)
        out, lse = _nothing(q)
        for b, (first, last) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            if first == last:
                continue
            tokens = torch.tensor(self._tokens[first:last])
            pick = (tokens,) if self._columns is None else (b, tokens)
            own, own_lse = dense.attend(q[pick][None], k[pick][None], v[pick][None], scale, softcap, spec.window)
            out[pick], lse[pick] = own[0], own_lse[0]
        return out, lse

    def _attend_past(
        self, layer: int, q: torch.Tensor, scale: float, softcap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _nothing(q)
        self._store.attend(
            layer,
            self._strides(q),
            self._strides(out),
            self._strides(lse.unsqueeze(-1)),
            0,
            _F32,
            scale,
            softcap,
            torch.get_num_threads(),
        )
        return out, lse

    def _append_chunk(self, layer: int, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor) -> None:
        longest = self._store.longest
        if q is not None:
            self._store.stage_queries(layer, self._strides(q))
        piece = self._cache.policy.chunk if self._cut else longest
        for first in range(0, longest, piece):
            last = min(first + piece, longest)
            if self._cut:
                ends = {i: self._ends[b] for b, i in enumerate(self._ids) if i in self._cut}
                self._cache._guard.reserve((layer, layer + 1), (first, last), ends)
            self._append_piece(layer, q, k, v, first, last)
            if self._cut:
                self._store.settle(layer)
                self._cut_layer(layer, first)

    def _cut_layer(self, layer: int, first: int) -> None:
        """Plans a layer of the sequences with tokens from ``first`` on; one that ended before stays as its end left it."""
        ends = dict(zip(self._ids, self._ends, strict=True))
        now = [i for i in self._cut if self._counts[i] > first]
        if now:
            self._cache._plans.cut(layer, now, [ends[i] for i in now])

    def _append_piece(
        self, layer: int, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, first: int, last: int
    ) -> None:
        """Stores tokens first..last of each sequence; where the policy scores by mass, a few at a time, each with a pass of
        their queries over all that is stored by then."""
        threads = torch.get_num_threads()
        massed = q is not None and self._cache.policy.massed and self._cache.shape.layers[layer].window is None
        grain = MASS_QUERIES if massed else last - first
        for begin in range(first, last, grain):
            end = min(begin + grain, last)
            self._store.append(layer, self._strides(k), self._strides(v), begin, end, threads)
            if massed and q is not None:
                scale, cap = self._cache._plans.arithmetic[layer]
                self._store.add_mass(layer, self._strides(q), begin, end, scale, cap, threads)

    # --- checks -----------------------------------------------------------------------------------------------------------

    def _strides(self, x: torch.Tensor) -> tuple[int, int, int, int]:
        """(address, elements per sequence, token, head) of a [n, heads, D] or [B, T, heads, D] tensor."""
        if self._columns is None:
            return x.data_ptr(), 0, x.stride(0), x.stride(1)
        return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)

    def _sequence_index(self) -> torch.Tensor:
        counts = torch.tensor(self._starts).diff()
        return torch.repeat_interleave(torch.arange(len(self._ids)), counts)

    def _check(
        self,
        verb: str,
        layer: int,
        q: torch.Tensor | None,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> LayerSpec:
        layers = self._cache.shape.layers
        if not 0 <= layer < len(layers):
            raise ValueError(f"{verb}: layer is {layer}, expected 0..{len(layers) - 1}")
        if layer in self._attended:
            raise ValueError(f"{verb}: layer {layer} was attended already in this step, expected once")
        spec = layers[layer]
        for name, x, heads in (("q", q, spec.q_heads), ("k", k, spec.kv_heads), ("v", v, spec.kv_heads)):
            if x is None:
                continue
            good = x.shape == (*self._lead, heads, spec.head_dim) and x.dtype is self._cache.shape.dtype
            if not (good and x.stride(-1) == 1 and x.device == self._cache.shape.device):
                check_tensor(verb, name, x, (*self._lead, heads, spec.head_dim), self._cache.shape)
        if sinks is not None and sinks.shape != (spec.q_heads,):
            raise ValueError(f"attend: sinks is {list(sinks.shape)}, expected [{spec.q_heads}]")
        return spec


def _nothing(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention to nothing gives: f32 zeros like q, and their log-sum-exps."""
    out = torch.zeros_like(q, dtype=torch.float32, memory_format=_ROWS)
    return out, torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)


def packed(cache: Cache, seqs: list[Sequence], lengths: list[int]) -> Step:
    """A step of ``lengths`` tokens of each sequence, side by side."""
    if len(lengths) != len(seqs):
        raise ValueError(f"step: lengths has {len(lengths)} elements, expected {len(seqs)}")
    if any(n < 0 for n in lengths) or sum(lengths) == 0:
        raise ValueError(f"step: lengths is {lengths}, expected none negative and at least one token")
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    return Step(cache, seqs, starts, list(range(starts[-1])), None)


def padded(cache: Cache, seqs: list[Sequence], valid: torch.Tensor) -> Step:
    """A step of the tokens that ``valid`` bool [B, T] marks."""
    if valid.dtype != torch.bool or valid.dim() != 2 or valid.shape[0] != len(seqs):
        raise ValueError(f"step: valid is {valid.dtype} {list(valid.shape)}, expected torch.bool [{len(seqs)}, T]")
    if not bool(valid.any()):
        raise ValueError("step: valid marks no token, expected at least one")
    starts = [0, *valid.sum(1).cumsum(0).tolist()]
    return Step(cache, seqs, starts, valid.nonzero()[:, 1].tolist(), valid.shape[1])


def arithmetic(verb: str, spec: LayerSpec, scale: float | None, softcap: float | None) -> tuple[float, float]:
    """The scale and the softcap (0: none) of a layer's logits. ValueError for what is no number for that."""
    scale = spec.head_dim**-0.5 if scale is None else float(scale)
    cap = 0.0 if softcap is None else float(softcap)
    if not isfinite(scale):
        raise ValueError(f"{verb}: scale is {scale}, expected a finite number")
    if not 0.0 <= cap < inf:
        raise ValueError(f"{verb}: softcap is {cap}, expected None or a finite number >= 0")
    return scale, cap


def check_tensor(verb: str, name: str, x: torch.Tensor, size: tuple[int, ...], shape: Shape) -> None:
    """ValueError for another size, for a dtype or device that is not the shape's, and for gaps in the last dimension."""
    if x.shape != size:
        raise ValueError(f"{verb}: {name} is {list(x.shape)}, expected {list(size)}")
    if x.dtype != shape.dtype:
        raise ValueError(f"{verb}: {name} is {x.dtype}, expected {shape.dtype}")
    if x.device != shape.device:
        raise ValueError(f"{verb}: {name} is on {x.device}, expected {shape.device}")
    if x.stride(-1) != 1 and size[-1] > 1:
        raise ValueError(f"{verb}: {name} has stride {x.stride(-1)} in its last dimension, expected 1")
