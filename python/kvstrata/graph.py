"""Decoding steps that do not change what they launch, so that a CUDA graph can hold them.

    graph = Graph(cache, seqs)
    held, epoch = None, None
    for _ in range(n):
        with graph.step() as step:
            positions.copy_(step.positions)            # tensors that the model reads stay where they are
            if epoch != step.epoch:                    # the first time, and when a list has outgrown its room
                held, epoch = torch.cuda.CUDAGraph(), step.epoch
                with torch.cuda.graph(held):
                    logits = model(ids, positions, step)
            step.replay(held, epoch)
        ids.copy_(logits.argmax(-1))

What changes from step to step - lists of pages, where tokens go, positions - goes up when a step opens, before the replay and
in the order of its stream. Launches name places and room alone, ask for no memory and wait for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Protocol

import torch

from kvstrata import _C
from kvstrata.config import DTYPES, SLOTS, Unsupported
from kvstrata.step import Step, arithmetic

if TYPE_CHECKING:
    from kvstrata.cache import Cache, Sequence


class Replayed(Protocol):
    """What :meth:`GraphStep.replay` takes: a ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...


class Graph:
    """Steps of one token of each of ``seqs``, in this order, on a cache of a CUDA device.

    tokens: that a sequence may have before its lists move; a list that outgrows its room gets twice as much, and launches that
    were captured hold no longer. Unsupported for a cache of the CPU.
    """

    def __init__(self, cache: Cache, seqs: Items[Sequence], *, tokens: int = 0) -> None:
        if not cache._slabs.loans.on_device:
            raise Unsupported("Graph: the cache is on the CPU, expected a CUDA device")
        if tokens < 0:
            raise ValueError(f"Graph: tokens is {tokens}, expected >= 0")
        self._cache = cache
        self._seqs = list(seqs)
        self._entries = -(-tokens // SLOTS) + 1 if tokens else 0
        self._layout = _C.make_layout(cache._store)

    @property
    def epoch(self) -> int:
        """Of what the latest step's launches name: another number, other places."""
        return self._layout.epoch

    def step(self) -> GraphStep:
        """The next step, to be used as a context manager; packed: q [B, Hq, D]."""
        return GraphStep(self._cache, self._seqs, self._layout, self._entries)


class GraphStep(Step):
    """One step of a :class:`Graph`. Its tokens stand in the books of all layers once it is open."""

    def __init__(self, cache: Cache, seqs: list[Sequence], layout: _C.Layout, entries: int) -> None:
        super().__init__(cache, seqs, list(range(len(seqs) + 1)), list(range(len(seqs))), None)
        self._layout = layout
        self._entries = entries

    @property
    def epoch(self) -> int:
        """Of what this step's launches name (:attr:`Graph.epoch`)."""
        return self._layout.epoch

    def open(self) -> GraphStep:
        """As of any step; lists are on their way then."""
        super().open()
        try:
            _C.lay_out(self._store, self._layout, self._entries)
        except BaseException:
            self.rollback()
            raise
        return self

    def replay(self, graph: Replayed, epoch: int) -> None:
        """Replays launches that were captured in a step of this epoch. ValueError for another: they name what has moved."""
        self._check_open("replay")
        if epoch != self.epoch:
            raise ValueError(f"replay: the graph is of epoch {epoch}, expected {self.epoch}: capture it anew")
        graph.replay()
        self._attended.update(range(len(self._cache.shape.layers)))

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
        """As :meth:`Step.attend`, any number of times: to warm up, and to be captured. Captured launches do nothing before
        they are replayed. sinks: f32 [Hq] on the cache's device, contiguous, as their place is captured."""
        self._check_open("attend")
        self._attended.discard(layer)
        spec = self._check("attend", layer, q, k, v, sinks)
        if sinks is not None and not (
            sinks.dtype is torch.float32 and sinks.is_contiguous() and sinks.device == self._cache.shape.device
        ):
            raise ValueError(
                f"attend: sinks is {sinks.dtype} on {sinks.device}, expected contiguous torch.float32 beside q"
            )
        scale, cap = arithmetic("attend", spec, scale, softcap)
        self._cache._plans.arithmetic[layer] = (scale, cap)
        self._cache._slabs.loans.join_stream()  # a capture has a stream of its own
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        q_, k_, v_, out_ = (self._strides(x) for x in (q, k, v, out))
        address = 0 if sinks is None else sinks.data_ptr()
        _C.attend_laid(self._store, self._layout, layer, q_, k_, v_, out_, address, DTYPES[out.dtype], scale, cap)
        if not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._attended.add(layer)
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
        """Unsupported: a step of a graph attends."""
        raise Unsupported("append: the step is of a graph, expected attend")

    def commit(self) -> None:
        """As of any step, once all layers have attended or were replayed."""
        self._cache._slabs.loans.join_stream()
        super().commit()

    def rollback(self) -> None:
        """As of any step."""
        self._cache._slabs.loans.join_stream()
        super().rollback()
