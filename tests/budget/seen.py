"""Random sights for allocators, shared by the tests of this folder."""

from __future__ import annotations

import torch

from kvstrata.budget.allocate import RowsSeen


def rows_seen(
    generator: torch.Generator, layers: int, rows: int, most: int = 40, page_bytes: int = 16, sequences: int = 1
) -> RowsSeen:
    """Heavy-tailed scores over ragged rows; NaN where no token is."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    tokens = torch.randint(0, most + 1, (layers, rows), generator=generator)
    scores = draw(layers, rows, most).clamp_min(1e-6) ** -0.9
    scores[torch.arange(most) >= tokens.unsqueeze(-1)] = float("nan")
    return RowsSeen(
        tokens=tokens,
        page_bytes=torch.full((1, layers), page_bytes),
        scores=scores,
        oq=draw(layers, rows),
        sequence=torch.arange(rows) % sequences,
    )
