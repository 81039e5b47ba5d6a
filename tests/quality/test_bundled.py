"""The model that ships with the code, on contexts that training never saw. The gate itself: bench/quality/card.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstrata.quality.contenders import Contender
from kvstrata.quality.measure import Record
from kvstrata.quality.run import Config, Unit, measured

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "quality" / "model"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(),
    reason="bench/quality/model holds no weights: python bench/quality/train.py makes them",
)
pytest.importorskip("transformers")
DENSE, FULL = Contender("DynamicCache", None), Contender("full", None)
LENGTH = 1024
TASKS = ("multi_key", "multi_value", "multi_query", "tracking", "conversation", "frequent", "recent")


def ask(task: str, index: int, *contenders: Contender, dtype: str = "auto") -> list[Record]:
    config = Config(str(FOLDER), (task,), ("full",), (), (), (LENGTH,), index + 1, dtype=dtype)
    return measured(config, Unit(task, LENGTH, index, contenders))


@pytest.mark.parametrize("task", TASKS)
def test_full_says_what_the_dense_cache_says(task: str) -> None:
    dense, full = ask(task, 0, DENSE, FULL)
    assert full["answers"] == dense["answers"]


def test_full_gives_the_text_the_same_likelihood() -> None:
    """In f32: in bf16 sums in another order turn one next token in fifty."""
    dense, full = ask("text", 0, DENSE, FULL, dtype="float32")
    assert full["captured_mass"] == [1.0] * 4
    assert full["kl"] < 1e-6 and full["top1"] == 1.0
    assert full["nll"] == pytest.approx(dense["nll"], abs=1e-4)


def test_a_needle_is_found() -> None:
    found = [ask("needle", i, FULL)[0]["scores"][0] for i in range(10)]
    assert sum(found) >= 9, found


def test_a_plan_near_the_limit_finds_its_pages() -> None:
    """A piece of a plan that needs pages of both formats, with as many bytes left as they cost: no slab takes another's."""
    config = Config(str(FOLDER), ("multi_query",), ("arkv",), (), ("25%",), (2048,), 153)
    (record,) = measured(config, Unit("multi_query", 2048, 152, (Contender("arkv", "25%"),)))
    assert "refused" not in record
    assert record["peak_bytes"] <= 0.25 * record["dense_bytes"]
