"""Two levels of a selection: groups of 32 pages are scored as pages are, and only the best are looked into."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvstrata.reference.pages import SLOTS
from kvstrata.reference.parts import by_lanes
from kvstrata.reference.recall import counts, mean_codes, page_votes, score_pages, summary_codes

INF = float("inf")
GROUP_PAGES = 32
LEAST_GROUPS = 4  # that are looked into


def summarize_groups(blocks: Tensor, visible: Tensor, dim: int) -> Tensor:
    """Blocks u8 [R, ceil(M // 32 / 16), 16 D + 192] of kind mean, of the M // 32 whole groups of 32 pages: their means, each
    counted as its visible slots, of blocks u8 [R, >= ceil(M / 16), ...] of kind mean or mean_value and visible u16 [R, M]."""
    rows, groups = len(visible), visible.shape[1] // GROUP_PAGES
    codes, step, _, _ = summary_codes(blocks[..., : SLOTS * (dim + 12)], dim)
    n = counts(visible)[:, : groups * GROUP_PAGES].view(rows, groups, GROUP_PAGES, 1).double()
    mean = (step.double().unsqueeze(-1) * (codes.double() - 128))[:, : groups * GROUP_PAGES]
    mean = mean.reshape(rows, groups, GROUP_PAGES, dim).masked_fill(n == 0, 0.0)
    code, scale = mean_codes((n * mean).sum(2) / n.sum(2).clamp_min(1))
    lanes = by_lanes((code + 128).to(torch.uint8), 128)
    means = lanes.view(*lanes.shape[:3], dim // 4, 4).transpose(2, 3).flatten(2)
    facts = by_lanes(torch.stack([scale, 0 * scale.nan_to_num(), 0 * scale.nan_to_num()], -1), 0.0)
    return torch.cat([means, facts.transpose(2, 3).flatten(2).contiguous().view(torch.uint8)], -1)


def score_groups(
    q: Tensor, groups: Tensor, visible: Tensor, scale: float | None = None, softcap: float = 0.0
) -> Tensor:
    """x f64 [R, G, M // 32] of whole groups as `score_pages` has that of pages, w = 0; NaN where it is not finite."""
    rows, count = len(visible), visible.shape[1] // GROUP_PAGES
    some = torch.full((rows, count), 1).to(torch.uint16)
    x = score_pages(q, groups, some, scale, 0.0, softcap=softcap)
    n = counts(visible)[:, : count * GROUP_PAGES].view(rows, 1, count, GROUP_PAGES).sum(-1).double()
    x = torch.where(x.isfinite(), x, float("nan"))
    return torch.where(n == 0, -INF, x + torch.log(n))


def look_into(
    x: Tensor, x_groups: Tensor, expand: float, lse_base: Tensor | None = None, aggregate: str = "sum"
) -> tuple[Tensor, Tensor]:
    """x [R, G, M] of pages, -inf of those in groups that are not looked into, and x [R, G, n] of those groups, -inf of the
    others: the share `expand` of highest vote, at least 4, ties the lower one, is looked into, and what is NaN."""
    bad = x_groups.isnan().any(1)  # [R, n]
    fair = x_groups.masked_fill(bad.unsqueeze(1), -INF)
    vote = page_votes(fair, lse_base, aggregate)
    inside = bad.clone()
    for r in range(len(x)):
        may = (fair[r] != -INF).any(0).nonzero().flatten()
        most = max(LEAST_GROUPS, math.ceil(expand * x_groups.shape[2]))
        inside[r, may[torch.sort(vote[r, may], descending=True, stable=True).indices][:most]] = True
    hidden = torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool)
    hidden[:, : x_groups.shape[2] * GROUP_PAGES] = ~inside.repeat_interleave(GROUP_PAGES, 1)
    return x.masked_fill(hidden.unsqueeze(1), -INF), fair.masked_fill(inside.unsqueeze(1), -INF)
