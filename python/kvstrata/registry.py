"""The ops as torch.compile knows them: importing this module registers them with torch, as ``torch.ops.kvstrata.<op>``.

A compiled graph holds tensors and numbers. Pools and caches are neither: a :class:`Ref` names one by a number, and the ops
find it there when they run. The compiler cannot see what an op does to it, so every op that reads or writes one also
mutates ``order``, one element per layer: ops on the same element stay in their order, and none is dropped. An op on a device
uploads lists that change from call to call, and is never made a part of a CUDA graph by the compiler.

    append(k, v, pages, slots, position, order, ref)             as ops.append, into pools; order of `Ref.of_pools`
    attend(q, pages, order, ref, *, ...) -> (out, lse)           as ops.attend
    merge(outs, lses, *, out_dtype=None) -> (out, lse)           as ops.merge; sees nothing but its tensors
    step_append(k, v, q, order, ref, layer, *, scale, softcap)   Step.append of the cache's open step; `Ref.of_cache`
    step_attend(q, k, v, order, ref, layer, *, scale, softcap, sinks) -> out     Step.attend

``order`` is ``Ref.order[layer]`` and ``ref`` is ``Ref.number``. Gradients are not defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvstrata import ops
from kvstrata.cache import Cache

_NAMESPACE = "kvstrata"
_known: WeakValueDictionary[int, Ref] = WeakValueDictionary()
_numbers = count(1)


class Ref:
    """The number of pools or of a cache in compiled graphs, valid for as long as this object lives.

    number: i64; order: for each layer an i32 [1] on the device of the pages, whose contents mean nothing.
    """

    def __init__(self, target: Cache | tuple[ops.Pool, ...], layers: int, device: torch.device) -> None:
        self.target = target
        self.number = next(_numbers)
        self.order = [torch.zeros(1, dtype=torch.int32, device=device) for _ in range(layers)]
        _known[self.number] = self

    @classmethod
    def of_cache(cls, cache: Cache) -> Ref:
        """For ``step_append`` and ``step_attend``: the layers are the cache's."""
        return cls(cache, len(cache.shape.layers), cache.shape.device)

    @classmethod
    def of_pools(cls, pools: Sequence[ops.Pool], layers: int = 1) -> Ref:
        """For ``append`` and ``attend``: the layers are sets of pages that share none. ValueError for no pools or layers."""
        if not pools or layers < 1:
            raise ValueError(f"Ref.of_pools: {len(pools)} pools and {layers} layers, expected at least one of each")
        slabs = [slab for pool in pools for slab in pool.slabs]
        return cls(tuple(pools), layers, slabs[0].device if slabs else torch.device("cpu"))


def _target(op: str, number: int, kind: type) -> Any:
    ref = _known.get(number)
    if ref is None:
        raise ValueError(f"{op}: ref is {number}, expected the number of a Ref that is alive")
    if not isinstance(ref.target, kind):
        expected = "of_cache" if kind is Cache else "of_pools"
        raise ValueError(f"{op}: ref {number} is of {type(ref.target).__name__}, expected one made by Ref.{expected}")
    return ref.target


def _open_step(op: str, number: int) -> Any:
    step = _target(op, number, Cache)._step
    if step is None:
        raise RuntimeError(f"{op}: no step of the cache is open")
    return step


# --- what the ops do --------------------------------------------------------------------------------------------------


def _append(k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, position: Tensor, order: Tensor, ref: int) -> None:
    ops.append(k, v, pages, slots, _target("append", ref, tuple), position)


def _attend(
    q: Tensor, pages: Tensor, order: Tensor, ref: int, *, out_dtype: torch.dtype | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=out_dtype or q.dtype, device=q.device)
    found, lse = ops.attend(q, pages, _target("attend", ref, tuple), out=out, **options)
    return found, lse


def _merge(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    shape = outs[0].shape if outs else ()
    out = torch.empty(shape, dtype=out_dtype, device=outs[0].device) if outs and out_dtype else None
    return ops.merge([o.contiguous() for o in outs], [lse.contiguous() for lse in lses], out=out)


def _step_append(
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    order: Tensor,
    ref: int,
    layer: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> None:
    _open_step("step_append", ref).append(layer, k, v, q, scale=scale, softcap=softcap)


def _step_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    ref: int,
    layer: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    out: Tensor = _open_step("step_attend", ref).attend(layer, q, k, v, scale=scale, softcap=softcap, sinks=sinks)
    return out


# --- what they give, by shapes alone ----------------------------------------------------------------------------------


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _attended(
    q: Tensor, pages: Tensor, order: Tensor, ref: int, *, out_dtype: torch.dtype | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=out_dtype or q.dtype), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _merged(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    first = outs[0]
    return first.new_empty(first.shape, dtype=out_dtype or torch.float32), first.new_empty(first.shape[:-1])


def _like_q(q: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(q.shape)


# --- registration -----------------------------------------------------------------------------------------------------

ORDER = "Tensor(a!) order"
"""The mark of every op that reads or writes what the compiler cannot see."""

SCHEMAS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "append": (
        f"(Tensor k, Tensor v, Tensor pages, Tensor slots, Tensor position, {ORDER}, SymInt ref) -> ()",
        _append,
        _nothing,
    ),
    "attend": (
        f"(Tensor q, Tensor pages, {ORDER}, SymInt ref, *, float? scale=None, Tensor? visible=None, Tensor? bias=None,"
        " Tensor? centre=None, float softcap=0.0, Tensor? sinks=None, Tensor? own=None, Tensor? tree=None, int window=0,"
        " Tensor? q_pos=None, ScalarType? out_dtype=None) -> (Tensor, Tensor)",
        _attend,
        _attended,
    ),
    "merge": (
        "(Tensor[] outs, Tensor[] lses, *, ScalarType? out_dtype=None) -> (Tensor, Tensor)",
        _merge,
        _merged,
    ),
    "step_append": (
        f"(Tensor k, Tensor v, Tensor? q, {ORDER}, SymInt ref, int layer, *, float? scale=None, float? softcap=None) -> ()",
        _step_append,
        _nothing,
    ),
    "step_attend": (
        f"(Tensor q, Tensor k, Tensor v, {ORDER}, SymInt ref, int layer, *, float? scale=None, float? softcap=None,"
        " Tensor? sinks=None) -> Tensor",
        _step_attend,
        _like_q,
    ),
}


def register(namespace: str, *, mark: str = ORDER) -> torch.library.Library:
    """Registers the ops under a namespace, for as long as the result lives. mark: what stands in schemas for ``order``; tests
    show by another one that it is needed."""
    library = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    for name, (schema, op, shapes) in SCHEMAS.items():
        library.define(name + schema.replace(ORDER, mark), tags=tags)  # type: ignore[no-untyped-call]
        library.impl(name, op, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{namespace}::{name}", shapes, lib=library)
    return library


_library = register(_NAMESPACE)
