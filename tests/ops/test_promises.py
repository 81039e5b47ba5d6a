"""What summaries promise of a page they promise of every page and query, and how near the captured mass is to the true one: the
acceptance of specs/recall.md."""

from __future__ import annotations

import pytest
import torch
from rotary import rotary_pages, summaries_of
from torch import Tensor
from vectors import full_pages

from kvstrata import ops, reference

PAGES, HEADS = 1024, 16
SLACK = 2e-6
"""Relative to the mass or 1: f32 sums of the bounds themselves."""


def many_pages(dim: int) -> tuple[Tensor, Tensor, ops.Pool]:
    """Keys [M, 16, D] of pages wide, narrow and of one key, the slots that are visible bool [M, 16], and their pool."""
    g = torch.Generator().manual_seed(6)
    width = torch.tensor([0.0, 0.05, 0.5, 3.0]).repeat(PAGES // 4).view(-1, 1, 1)
    k = 2 * torch.randn(PAGES, 1, dim, generator=g) + width * torch.randn(PAGES, 16, dim, generator=g)
    k[:, :, 5] += 12  # an outlier channel
    masks = torch.randint(1, 1 << 16, (PAGES,), generator=g)
    masks[::2] = 0xFFFF
    pool = ops.Pool.allocate("f32", dim, PAGES)
    full_pages(pool, 0, k.flatten(0, 1), k.flatten(0, 1))
    return k, (masks.unsqueeze(1) >> torch.arange(16)) & 1 == 1, pool


def test_a_million_pages_keep_what_their_summaries_promise() -> None:
    """6: bounds and the ball are at least the largest logit, and the exact mean's mass at most the page's."""
    dim, rows = 64, 64
    k, slots, pool = many_pages(dim)
    masks = (slots.int() << torch.arange(16)).sum(1).to(torch.uint16).unsqueeze(0)
    ids = torch.arange(PAGES, dtype=torch.int32).unsqueeze(0)
    q = 3 * torch.randn(rows, HEADS, dim, generator=torch.Generator().manual_seed(7))
    bounds = ops.summarize(ids, [pool], visible=masks, kind="bounds").expand(rows, -1, -1).contiguous()
    above = ops.score_pages(q, bounds, masks.expand(rows, -1).contiguous(), kind="bounds")
    mean, _, radius = (
        part[0, :PAGES].double() for part in reference.summary_parts(ops.summarize(ids, [pool], visible=masks), dim)
    )
    turned, n = reference.rotate(q.double()), slots.sum(1).double()
    true_mean = (k.double() * slots.unsqueeze(-1)).sum(1) / n.unsqueeze(1)
    pairs = 0
    for r in range(rows):
        z = (q[r].double() @ k.flatten(0, 1).double().T * dim**-0.5).view(HEADS, PAGES, 16)
        z = z.masked_fill(~slots, -torch.inf)
        most, mass = z.amax(-1), torch.logsumexp(z, -1)
        slack = SLACK * mass.abs().clamp_min(1)
        assert torch.all(above[r].double() >= mass - slack)
        assert torch.all(above[r].double() - n.log() >= most - slack)
        ball = dim**-0.5 * (turned[r] @ mean.T + turned[r].norm(dim=-1, keepdim=True) * radius)
        assert torch.all(ball >= most - slack)
        assert torch.all(dim**-0.5 * (q[r].double() @ true_mean.T) + n.log() <= mass + 1e-12 * mass.abs())
        pairs += z[..., 0].numel()
    assert pairs >= 1_000_000


def shares(seed: int, weight: float, k: int = 48) -> tuple[Tensor, Tensor]:
    """The share of the mass [Q] that the k best pages are estimated to hold, and that which they do."""
    pages, q = rotary_pages(seed)
    dim = q.shape[1]
    entries, _, rest = ops.select(q.unsqueeze(1), *summaries_of(pages, len(q)), k, spread_weight=weight)
    z = (q @ pages.flatten(0, 1).T * dim**-0.5).double().view(len(q), len(pages), -1)
    mass = torch.logsumexp(z, -1)
    read = torch.logsumexp(mass.gather(1, entries.long()), 1)
    return torch.sigmoid(read - rest[:, 0].double()), torch.exp(read - torch.logsumexp(mass, 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_captured_is_near_the_truth_with_spread(seed: int) -> None:
    """17: 48 pages, mean absolute error at most 0.15 with w = 1, and at most 0.6 of that with w = 0."""
    errors = {}
    for weight in (0.0, 1.0):
        estimate, true = shares(seed, weight)
        errors[weight] = float((estimate - true).abs().mean())
    assert errors[1.0] <= 0.15 and errors[1.0] <= 0.6 * errors[0.0], errors
