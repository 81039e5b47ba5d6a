"""Keys as a model with rotary positions makes them: the synthetic data of recall's acceptance."""

from __future__ import annotations

import torch
from cases import made_once
from torch import Tensor
from vectors import full_pages

from kvstrata import ops


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """x [N, D] turned by positions [N], base 500,000, halves paired."""
    half = x.shape[1] // 2
    angle = positions.double().unsqueeze(1) * 500_000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], 1)


def rotary(
    seed: int = 0, tokens: int = 16_384, topics: int = 400, queries: int = 100, dim: int = 128
) -> tuple[Tensor, Tensor]:
    """keys [T, D] of topics with two outlier channels, and queries [Q, D] that each seek one."""
    g = torch.Generator().manual_seed(seed)
    topic = torch.randn(topics, dim, generator=g)
    bias = 1.5 * torch.randn(dim, generator=g)
    bias[[5, 40]] += 12
    label = torch.randint(topics, (tokens,), generator=g)
    keys = rope(topic[label] + torch.randn(tokens, dim, generator=g) + bias, torch.arange(tokens))
    sought = topic[torch.randint(topics, (queries,), generator=g)]
    q = 1.5 * sought + 0.5 * torch.randn(queries, dim, generator=g) + 5.5 * bias / bias.norm()
    return keys, rope(q, torch.full((queries,), tokens + 5))


@made_once
def rotary_pages(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clustered keys [M, 16, D], in segments of 4,096, and queries [Q, D]."""
    keys, q = rotary(seed)
    page_of, pages = ops.cluster(keys.view(4, 4096, -1))
    assert pages.tolist() == [256] * 4
    whole = page_of.long() + 256 * torch.arange(4).unsqueeze(1)
    return keys[whole.flatten().argsort(stable=True)].view(-1, 16, keys.shape[1]), q


def summaries_of(k: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Blocks of kind mean of pages k [M, 16, D], and masks u16 [rows, M] of all their slots, the same for each row."""
    count, dim = len(k), k.shape[2]
    pool = ops.Pool.allocate("f32", dim, count)
    full_pages(pool, 0, k.flatten(0, 1), k.flatten(0, 1))
    blocks = ops.summarize(torch.arange(count, dtype=torch.int32).unsqueeze(0), [pool])
    return blocks.expand(rows, -1, -1).contiguous(), torch.full((rows, count), 0xFFFF).to(torch.uint16)
