"""Random page lists with everything that may go wrong in them, and their canonical contents for the reference."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from kvstrata import ops, reference

SLOTS = 16
KEPT = 8
"""Cases of a maker that are kept for other levels."""
P, T = ParamSpec("P"), TypeVar("T")

POISON = 0xFF  # every byte of it: NaN in f32, bf16 and f16, and in the scales of quantized pages


@dataclass
class Case:
    """Rows of page lists over poisoned pools, and what the reference needs to know about them."""

    q: Tensor  # [R, T, G, D]
    pages: Tensor  # i32 [R, K]
    visible: Tensor  # u16 [R, K]
    pools: list[ops.Pool]
    k: Tensor  # f64 [R, K, 16, D]
    v: Tensor
    positions: Tensor  # i64 [R, K, 16]
    formats: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)  # more arguments of attend

    @property
    def rows(self) -> int:
        return self.pages.shape[0]

    def attend(self, **more: Any) -> tuple[Tensor, ...]:
        arguments = {"visible": self.visible, **self.extra, **more}
        q = arguments.pop("q", self.q)
        pages = arguments.pop("pages", self.pages)
        out = arguments.pop("out", None)
        if out is None:
            out = torch.full(q.shape, float("nan"))
        return ops.attend(q, pages, self.pools, out=out, **arguments)

    def row(self, r: int) -> Case:
        """One row alone; the pools are shared."""
        one = {n: t[r : r + 1] if isinstance(t, Tensor) else t for n, t in self.extra.items()}
        parts = (t[r : r + 1] for t in (self.q, self.pages, self.visible))
        return Case(
            *parts, self.pools, self.k[r : r + 1], self.v[r : r + 1], self.positions[r : r + 1], self.formats, one
        )

    def read(self) -> Tensor:
        return reference.readable(
            reference.visible_slots(self.pages, self.visible),
            self.q.shape[1],
            self.extra.get("own"),
            self.extra.get("tree"),
            self.extra.get("window", 0),
            self.extra.get("q_pos"),
            self.positions,
        )

    def reference(self) -> tuple[Tensor, Tensor]:
        e = self.extra
        bias = e["bias"].double() if "bias" in e else None
        return reference.attend(
            self.q.double(), self.k, self.v, self.read(), e.get("scale"), e.get("softcap", 0.0), bias, e.get("sinks")
        )


def slot_masks(pages: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """u16 [R, K]. full; tail1, tail15: that many slots in each row's last page; ragged: anything, empty ones too."""
    masks = torch.full(pages.shape, 0xFFFF, dtype=torch.int64)
    if kind == "ragged":
        masks = torch.randint(0, 1 << SLOTS, pages.shape, generator=generator)
        masks[torch.rand(pages.shape, generator=generator) < 0.2] = 0
        masks[torch.rand(pages.shape, generator=generator) < 0.2] = 0xFFFF
        if len(pages) > 1:
            masks[0] = 0  # a row whose every slot is hidden
    elif kind.startswith("tail") and pages.shape[1]:
        for r in range(pages.shape[0]):
            used = (pages[r] >= 0).nonzero()
            if len(used):
                masks[r, used[-1]] = (1 << int(kind[4:])) - 1
    return masks.to(torch.uint16)


def poisoned_pools(formats: tuple[str, ...], dim: int, pages: int, slabs: int) -> list[ops.Pool]:
    pools = [ops.Pool.allocate(f, dim, pages, slabs) for f in formats]
    for pool in pools:
        for slab in pool.slabs:
            slab.fill_(POISON)
    return pools


def write_pages(pool: ops.Pool, slab: int, index: Tensor, k: Tensor, v: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Puts k, v [P, 16, D] f32 into pages by the reference's layout, NaN in hidden slots and padding.

    index and masks are [P]. Returns what the pages hold as f64 k, v [P, 16, D].
    """
    dim, dp = k.shape[2], reference.padded(k.shape[2])
    kind = ops.FORMATS[pool.format]
    hidden = (masks.to(torch.int64).unsqueeze(-1) >> torch.arange(SLOTS)) & 1 == 0
    whole = torch.full((2, len(index), SLOTS, dp), float("nan"), dtype=kind)
    whole[0, ..., :dim], whole[1, ..., :dim] = k.to(kind), v.to(kind)
    whole[:, hidden] = float("nan")
    pool.payload(slab)[index] = reference.pack(whole[0], whole[1], pool.format)
    return whole[0, ..., :dim].double(), whole[1, ..., :dim].double()


def write_quantized(
    pool: ops.Pool, slab: int, index: Tensor, k: Tensor, v: Tensor, masks: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor]:
    """Likewise into quantized pages, keys less centre [P, D]; hidden slots hold NaN scales and codes of ones."""
    count, _, dim = k.shape
    whole = [reference.quantize(x.flatten(0, 1), pool.format) for x in (k - centre.unsqueeze(1), v)]
    codes = torch.stack([c.view(count, SLOTS, dim) for c, _ in whole])
    scales = torch.stack([s.view(count, SLOTS, -1) for _, s in whole])
    hidden = (masks.to(torch.int64).unsqueeze(-1) >> torch.arange(SLOTS)) & 1 == 0
    codes[:, hidden], scales[:, hidden] = -1, float("nan")
    payload = reference.pack(codes[0], codes[1], pool.format, scales.permute(1, 0, 3, 2))
    pool.payload(slab)[index] = payload
    held_k, held_v = reference.widen(payload, pool.format, dim)
    return held_k + centre.double().unsqueeze(1), held_v


def write_page(pool: ops.Pool, slab: int, index: int, k: Tensor, v: Tensor) -> None:
    """One page of k, v [16, D], all slots visible."""
    write_pages(pool, slab, torch.tensor([index]), k.unsqueeze(0), v.unsqueeze(0), torch.tensor([0xFFFF]))


def made_once(make: Callable[P, T]) -> Callable[P, T]:
    """A maker of cases that keeps its last ones: the levels of a case follow each other (conftest.py), each gets a copy."""
    made: dict[str, T] = {}

    @wraps(make)
    def copied(*args: P.args, **settings: P.kwargs) -> T:
        if any(isinstance(value, Tensor) for value in (*args, *settings.values())):
            return make(*args, **settings)
        key = repr((args, settings))
        if key not in made:
            if len(made) == KEPT:
                del made[next(iter(made))]
            made[key] = make(*args, **settings)
        return deepcopy(made[key])

    return copied


@made_once
def make_case(
    lengths: list[int],
    *,
    formats: tuple[str, ...] = ("bf16",),
    dim: int = 64,
    group: int = 4,
    queries: int = 1,
    masks: str = "full",
    holes: float = 0.0,
    slabs: int = 1,
    seed: int = 0,
    **extra: Any,
) -> Case:
    """A row per length; `holes` of the entries are -1 with full masks; pages lie scattered over pools and slabs.

    Where a format is quantized, keys have a mean that differs by channel and row, and `centre` is part of it.
    """
    g = torch.Generator().manual_seed(seed)
    rows, entries = len(lengths), max(lengths, default=0)
    per_slab = -(-rows * max(entries, 1) // (len(formats) * slabs)) + 1
    pools = poisoned_pools(formats, dim, per_slab, slabs)
    places = [(p, s, i) for i in range(per_slab) for s in range(slabs) for p in range(len(formats))]
    order = torch.randperm(len(places), generator=g).tolist()
    pages = torch.full((rows, entries), -1, dtype=torch.int32)
    for r, length in enumerate(lengths):
        for e in range(length):
            pages[r, e] = ops.make_page(*places[order[r * entries + e]])
    pages[torch.rand(pages.shape, generator=g) < holes] = -1
    visible = slot_masks(pages, masks, g)
    k = torch.randn(rows, entries, SLOTS, dim, generator=g)
    v = torch.randn(rows, entries, SLOTS, dim, generator=g)
    centre = None
    if any(f in ops.QUANTIZED for f in formats):
        mean = 3 * torch.randn(rows, dim, generator=g)
        centre = torch.where(mean.abs() > 2, mean, 0.0)
        k += mean.view(rows, 1, 1, dim)
        extra["centre"] = centre
    k64, v64 = k.double(), v.double()
    positions = torch.arange(entries * SLOTS).view(1, entries, SLOTS).expand(rows, -1, -1)
    for p, pool in enumerate(pools):
        for s in range(slabs):
            here = (pages >= 0) & (pages >> 16 == p << 12 | s)
            index = (pages[here] & 0xFFFF).long()
            data = (pool, s, index, k[here], v[here], visible[here])
            if pool.format in ops.QUANTIZED:
                assert centre is not None
                k64[here], v64[here] = write_quantized(*data, centre[here.nonzero()[:, 0]])
            else:
                k64[here], v64[here] = write_pages(*data)
            pool.positions(s)[index] = positions[here].to(torch.int32)
    q = torch.randn(rows, queries, group, dim, generator=g)
    return Case(q, pages, visible, pools, k64, v64, positions, formats, extra)
