"""Budgets of layers that differ: what a row is fitted by, and schedules of equal area over what is decoded."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kvstrata.quality.contenders import POLICIES
from kvstrata.quality.tasks import TASKS

pytest.importorskip("transformers")
FOLDER = Path(__file__).resolve().parents[2] / "bench" / "quality"


@pytest.fixture(scope="module")
def depth() -> Iterator[ModuleType]:
    """Imported, and its names taken back from the registries afterwards."""
    before, held = set(sys.modules), [(d, dict(d)) for d in (POLICIES, TASKS)]
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("depth")
    finally:
        sys.path.remove(str(FOLDER))
        for registry, names in held:
            registry.clear()
            registry |= names
        for name in set(sys.modules) - before:
            if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def test_a_row_loses_the_attention_of_its_lowest_ranks(depth: ModuleType) -> None:
    """20 unprotected tokens between 4 and 4 others, ranks by position; the last token is no part of the context."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(1, 2, 29, generator=generator)
    asked = []

    def read(queries: int, spread: str, weight: float) -> torch.Tensor:
        asked.append((queries, spread, weight))
        return attention

    free = torch.zeros(1, 28, dtype=torch.bool)
    free[0, 4:24] = True
    now = SimpleNamespace(read=SimpleNamespace(attention=read))
    found = depth.laws.of_rows(free, torch.arange(28.0)[None], now, 7)
    assert asked == [(7, "mean", 0.0)]
    mass = attention[0].mean(0).double()
    kept = [2, 5, 10, 0]
    want = [[n, float(mass[4 : 24 - n].sum())] for n in kept]
    torch.testing.assert_close(found, torch.tensor([want], dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_task_decodes_what_schedules_are_equal_over(depth: ModuleType) -> None:
    world = depth.World(["filler of a few words\n"] * 400, lambda text: len(text) // 4 + 1)
    made = depth.many(2048, 5, world)
    assert len(made.questions) == len(set(made.questions)) == depth.ASKED
    subject, _ = depth.laws.subject(str(FOLDER / "model"), "auto")
    tokens = subject.tokens(made)
    assert tokens.total - len(tokens.context) == depth.DECODED
