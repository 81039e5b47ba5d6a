"""The gate and the model card: what they say of a model that knows nothing, and where the gate's bars are."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")
FILE = Path(__file__).resolve().parents[2] / "bench" / "quality" / "card.py"
TOLD = {"steps": 50, "tokens": None, "minutes": 0.0, "seed": 0, "device": "a machine", "threads": 1}
TOLD |= {"arithmetic": "f32", "torch": "2.13.0", "stages": None}


@pytest.fixture(scope="module")
def card() -> ModuleType:
    spec = importlib.util.spec_from_file_location("card", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_random_model_fails_and_its_card_says_so(
    card: ModuleType, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "training.json").write_text(json.dumps(TOLD))
    words = ["card.py", "--model", str(folder), "--lengths", "256", "--n", "1", "--out", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", words)
    assert card.main() == 1
    first = (folder / "README.md").read_text()
    assert "**The gate does not hold**" in first and "- needle has 0.0 %, needs 99 %" in first
    assert "50 steps, a machine" in first
    assert card.main() == 1  # resumes: nothing is left to measure
    assert (folder / "README.md").read_text() == first


@pytest.mark.parametrize(
    ("needle", "tracking", "below"), [(0.99, 0.95, []), (0.985, 0.95, ["needle"]), (1.0, 0.949, ["tracking"])]
)
def test_the_bars(card: ModuleType, needle: float, tracking: float, below: list[str]) -> None:
    accuracy = dict.fromkeys(card.GATE, 1.0) | {"needle": needle, "tracking": tracking}
    cells = {(task, 2048): {"accuracy": a} for task, a in accuracy.items()}
    assert [reason.split()[0] for reason in card.failures(cells, 2048)] == below
