"""A user's own examples: one JSON object per line, ``{"context": ..., "questions": [...], "answers": [...]}``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvstrata.quality.tasks import Example


def read(path: Path) -> tuple[list[Example], list[str]]:
    """The examples of a file, and a complaint for each line that is none, by its number."""
    examples, complaints = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            examples.append(example(json.loads(line)))
        except ValueError as error:  # json's own error is one
            complaints.append(f"{path.name}:{number}: {error}")
    return examples, complaints


def example(value: Any) -> Example:
    """ValueError naming the field that is missing or of the wrong kind."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    if not isinstance(value.get("context"), str):
        raise ValueError(f"context: expected a string, got {type(value.get('context')).__name__}")
    for name in ("questions", "answers"):
        items = value.get(name)
        if not isinstance(items, list) or not items or not all(isinstance(i, str) for i in items):
            raise ValueError(f"{name}: expected a list of at least one string, got {items!r:.80}")
    if len(value["questions"]) != len(value["answers"]):
        raise ValueError(f"{len(value['questions'])} questions, but {len(value['answers'])} answers")
    return Example(value["context"], tuple(value["questions"]), tuple(value["answers"]))
