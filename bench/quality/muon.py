"""Muon: the optimizer of the small model's matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Muon; scaled as in arXiv 2502.16982), for the matrices of the layers.

    Half as many steps to the key lookup as AdamW here. torch's own works in bf16, which costs dear on older CPUs.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, members in shapes.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in members])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, update in zip(members, orthogonal(updates), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(rate * update)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        assert p.grad is not None
        held = self.state[p].setdefault("momentum", torch.zeros_like(p))
        held.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(held, momentum)


def orthogonal(x: Tensor) -> Tensor:
    """Nearly the nearest matrices with orthonormal rows or columns: five Newton-Schulz steps. x [n, a, b]."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    flat = x.shape[1] > x.shape[2]
    x = x.mT if flat else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if flat else x
