"""Vectors that are hard to quantize, and pages of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata import ops

SLOTS = 16
POISON = 0xFF
KINDS = ["gaussian", "constant", "spike", "zero", "subnormal", "huge", "nan", "edge", "integers"]


def vectors(kind: str, count: int, dim: int, seed: int = 0) -> Tensor:
    """f32 [count, dim]. nan: NaN and infinities among Gaussians; edge: groups about 2^-100, where codes become zeros."""
    g = torch.Generator().manual_seed(seed * 1000 + dim)
    x = torch.randn(count, dim, generator=g)
    if kind == "constant":
        x = x[:, :1].expand(count, dim).clone()
    elif kind == "spike":
        x[torch.arange(count), torch.randint(0, dim, (count,), generator=g)] += 1000.0
    elif kind == "zero":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "subnormal":
        x *= 2.0**-130
    elif kind == "huge":
        x *= 2.0 ** torch.randint(100, 128, (count, 1), generator=g)
    elif kind == "nan":
        for i, bad in enumerate((float("nan"), float("inf"), -float("inf"), 3e38)):
            x[i::5, torch.randint(0, dim, (1,), generator=g)] = bad
    elif kind == "edge":
        x = torch.zeros(count, dim)
        x[:, 0] = 2.0**-100 * dim**0.5 * (1 + torch.arange(count) * 2.0**-20 - count * 2.0**-21)
    elif kind == "integers":  # many ties of magnitude, of both signs
        x = torch.randint(-3, 4, (count, dim), generator=g).float()
    return x


def full_pages(pool: ops.Pool, number: int, k: Tensor, v: Tensor) -> None:
    """Fills the first pages of slab 0 with tokens k, v [N, D], sixteen to a page; positions 0, 1, ..."""
    pages = torch.arange(len(k) // SLOTS, dtype=torch.int32) + ops.make_page(number, 0, 0)
    kind = ops.FORMATS[pool.format]
    shape = (-1, SLOTS, pool.head_dim)
    ops.pack(k.to(kind).view(shape), v.to(kind).view(shape), pages, [pool] * (number + 1))
    pool.positions()[: len(pages)] = torch.arange(len(k), dtype=torch.int32).view(-1, SLOTS)


def in_order(source: int, target: int, count: int) -> Tensor:
    """Moves i32 [count, 4] of tokens to the same slots of the same pages of another pool."""
    at = torch.arange(count)
    first, second = ops.make_page(source, 0, 0), ops.make_page(target, 0, 0)
    return torch.stack([first + at // SLOTS, at % SLOTS, second + at // SLOTS, at % SLOTS], 1).to(torch.int32)


def ragged_moves(pages: int, tokens: int, seed: int) -> list[list[int]]:
    """Moves (page, slot, page, slot) by indices of pages: into 1 to 16 slots of each page in turn, in any order, from any
    of so many tokens; between them skipped ones, up to 70 in a row."""
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    moves = []
    for page in range(pages):
        for slot in torch.randperm(SLOTS, generator=g)[: number(1, SLOTS)].tolist():
            if number(0, 7) == 0:
                moves += [[-1, 99, 0, -7], [1 << 30, 16, -1, 1 << 30]] * number(1, 35)
            token = number(0, tokens - 1)
            moves.append([token // SLOTS, token % SLOTS, page, slot])
    return moves


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def quantized(k: Tensor, v: Tensor, fmt: str, centre: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes k, v int8 [N, D] and scales bf16 [N, 2, groups] of f32 tokens, by the ops; centre [D]."""
    count, dim = k.shape
    pools = [ops.Pool.allocate(f, dim, count // SLOTS) for f in ("f32", fmt)]
    full_pages(pools[0], 0, k, v)
    row_of = None if centre is None else torch.zeros(count, dtype=torch.int32)
    ops.quantize(in_order(0, 1, count), pools, None if centre is None else centre.unsqueeze(0), row_of)
    return token_codes(pools, 1, count)


def token_codes(pools: list[ops.Pool], number: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` tokens of a quantized pool: codes k, v [N, D], scales [N, 2, groups]."""
    pages = torch.arange(-(-count // SLOTS), dtype=torch.int32) + ops.make_page(number, 0, 0)
    k, v, scales = ops.unpack(pages, pools)
    return k.flatten(0, 1)[:count], v.flatten(0, 1)[:count], scales.permute(0, 3, 1, 2).flatten(0, 1)[:count]
