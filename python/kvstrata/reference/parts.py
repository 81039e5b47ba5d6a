"""Parts of a page: two or four sets of its keys that resemble each other more than the page's do (``csrc/ops/summarize.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstrata.reference.pages import SLOTS, rotate

PARTS = {"halves": 2, "quarters": 4}
ROUNDS = 4  # that the keys of two parts are assigned anew
LEVELS = 7  # of a part's mean, above and below 0


def mean_of(k: Tensor, slots: Tensor) -> Tensor:
    """[..., D]: mean of the keys k [..., S, D] of slots [..., S]; 0 of none."""
    seen = torch.where(slots.unsqueeze(-1), k, torch.zeros((), dtype=k.dtype))
    return seen.sum(-2) / slots.sum(-1).clamp_min(1).unsqueeze(-1)


def squares(k: Tensor, x: Tensor) -> Tensor:
    """|k - x|^2 [..., S] of k [..., S, D] and x [..., D]."""
    return ((k - x.unsqueeze(-2)) ** 2).sum(-1)


def farthest(k: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """[..., D]: of the keys k [..., S, D] of slots [..., S] the one farthest from x [..., D], the first of equals."""
    best = squares(k, x).masked_fill(~slots, -1.0).max(-1).indices
    return torch.take_along_dim(k, best[..., None, None], -2).squeeze(-2)


def second_part(k: Tensor, slots: Tensor) -> Tensor:
    """bool [..., S]: of the slots [..., S] of keys k [..., S, D] those nearer to the second of two means, not the lowest."""
    first = farthest(k, slots, mean_of(k, slots))
    other = farthest(k, slots, first)
    second = torch.zeros_like(slots)
    going = torch.ones_like(slots[..., :1])
    for _ in range(ROUNDS + 1):
        nearer = slots & (squares(k, other) < squares(k, first))
        moved = (nearer != second).any(-1, keepdim=True)
        going = going & moved & nearer.any(-1, keepdim=True) & (nearer != slots).any(-1, keepdim=True)
        second = torch.where(going, nearer, second)
        first, other = mean_of(k, slots & ~second), mean_of(k, second)
    lowest = slots & (slots.cumsum(-1) == 1)
    return torch.where((second & lowest).any(-1, keepdim=True), slots & ~second, second)


def part_slots(k: Tensor, slots: Tensor, parts: int) -> Tensor:
    """bool [..., P, S]: the two or four parts of the slots [..., S] of keys k [..., S, D]."""
    high = second_part(k, slots)
    if parts == 2:
        return torch.stack([slots & ~high, high], -2)
    halves = []
    for half in (slots & ~high, high):
        second = second_part(k, half)
        halves += [half & ~second, second]
    return torch.stack(halves, -2)


def up(x: Tensor) -> Tensor:
    """The bf16 at or above x."""
    near = x.float().to(torch.bfloat16)
    return torch.where(near.to(x.dtype) < x, torch.nextafter(near, torch.full_like(near, float("inf"))), near)


def part_codes(mean: Tensor) -> tuple[Tensor, Tensor]:
    """codes [..., D] in -7..7 of means [..., D], and their scale bf16 [...], rounded up."""
    scale = up((mean.abs().amax(-1) / LEVELS).float())
    step = scale.to(mean.dtype).unsqueeze(-1)
    return torch.round(mean / step).clamp(-LEVELS, LEVELS).masked_fill(step == 0, 0.0), scale


def part_facts(k: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes [R, M, P, D] in -7..7, scale and spread bf16 [R, M, P] of the parts bool [R, M, P, 16] of keys k [R, M, 16, D]."""
    codes, scale = part_codes(rotate(mean_of(k.unsqueeze(2), parts)))
    own = scale.to(k.dtype).unsqueeze(-1) * codes
    away = ((rotate(k).unsqueeze(2) - own.unsqueeze(3)) ** 2).sum(-1).masked_fill(~parts, 0.0)
    return codes, scale, up((away.sum(-1) / (parts.sum(-1).clamp_min(1) * k.shape[-1])).float())


def split_blocks(k: Tensor, slots: Tensor, kind: str) -> Tensor:
    """Blocks of kind halves or quarters, as `summarize` has them."""
    seen = torch.where(slots.unsqueeze(-1), k, torch.zeros((), dtype=k.dtype))
    bad = ~seen.isfinite().all(-1).all(-1)
    parts = part_slots(seen.masked_fill(bad[..., None, None], 0.0), slots, PARTS[kind]) & ~bad[..., None, None]
    codes, scale, spread = part_facts(seen, parts)
    nibbles = (
        (codes + 8).to(torch.uint8).view(*codes.shape[:2], PARTS[kind] // 2, 2, codes.shape[-1])
    )  # [R, M, pairs, 2, D]
    both = by_lanes(nibbles[..., 0, :] | nibbles[..., 1, :] << 4, 0x88)  # [R, B, 16, pairs, D]
    means = both.view(*both.shape[:-1], both.shape[-1] // 4, 4).permute(0, 1, 3, 4, 2, 5).flatten(2)
    facts = torch.stack([scale.masked_fill(bad.unsqueeze(-1), float("nan")), spread], 2).view(
        *codes.shape[:2], 2, PARTS[kind] // 2, 2
    )
    lanes = by_lanes(facts, 0.0).permute(0, 1, 3, 4, 2, 5).flatten(2)  # [R, B, scale and spread, pair, 16, 2]
    second, high = parts[:, :, 1::2].any(2), parts[:, :, 2:].any(2)
    bits = torch.cat([second, high], -1).long() << torch.arange(2 * SLOTS)
    where = by_lanes(bits.sum(-1), 0).to(torch.uint32).flatten(2)
    return torch.cat([means, lanes.contiguous().view(torch.uint8), where.view(torch.uint8)], -1)


def summary_split(blocks: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes f32 [R, 16 B, P, D] in -7..7, scale and spread f32 [R, 16 B, P], and the slots bool [R, 16 B, P, 16] that each part
    would have of all, of blocks u8 [R, B, bytes] of kind halves or quarters."""
    rows, count, size = blocks.shape
    pairs = (size // SLOTS - 4) // (dim + 8)
    means = blocks[..., : pairs * SLOTS * dim].reshape(rows, count, pairs, dim // 4, SLOTS, 4)
    lines = means.permute(0, 1, 4, 2, 3, 5).flatten(4)  # [R, B, 16, pairs, D]
    codes = torch.stack([lines & 15, lines >> 4], 4).reshape(rows, count * SLOTS, 2 * pairs, dim).float() - 8
    facts = blocks[..., pairs * SLOTS * dim : size - 4 * SLOTS].contiguous().view(torch.bfloat16)
    lanes = (
        facts.view(rows, count, 2, pairs, SLOTS, 2)
        .permute(2, 0, 1, 4, 3, 5)
        .reshape(2, rows, count * SLOTS, 2 * pairs)
        .float()
    )
    where = blocks[..., size - 4 * SLOTS :].contiguous().view(torch.int32).flatten(1).long().unsqueeze(-1)
    second = (where >> torch.arange(SLOTS)) & 1 == 1
    high = (where >> torch.arange(SLOTS, 2 * SLOTS)) & 1 == 1
    parts = [~high & ~second, ~high & second, high & ~second, high & second][: 2 * pairs]
    return codes, lanes[0], lanes[1], torch.stack(parts, 2)


def by_lanes(x: Tensor, empty: float) -> Tensor:
    """x [R, M, ...] as lanes [R, B, 16, ...], `empty` in those beyond M."""
    rows, entries, *rest = x.shape
    count = -(-entries // SLOTS)
    lanes = torch.full((rows, count * SLOTS, *rest), empty, dtype=x.dtype)
    lanes[:, :entries] = x
    return lanes.view(rows, count, SLOTS, *rest)
