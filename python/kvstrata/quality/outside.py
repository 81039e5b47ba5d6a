"""Peers in an environment of their own: kvpress, which needs an older transformers. Prompts and answers go as JSONL."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstrata.budget import Budget
from kvstrata.quality.contenders import PREFIX, Contender, dense_bytes
from kvstrata.quality.measure import Record, Subject, allowance, judged, size
from kvstrata.quality.tasks import Example

HOME = Path("bench/quality/peers")
"""In a checkout, from its root."""
Prompt = dict[str, Any]


def python() -> Path:
    return HOME / ".venv" / "bin" / "python"


def missing() -> str | None:
    """Why the peers cannot run here; None if they can."""
    if (HOME / "kvpress_run.py").exists() and python().exists():
        return None
    return f"kvpress is not installed: bash {HOME}/setup.sh, in a checkout of kvstrata"


def refusal(contender: Contender, example: Example) -> str | None:
    """Why this peer cannot meet this example."""
    budget = Budget.parse(contender.budget)
    if example.continuation:
        return "kvpress answers questions here, it scores no text"
    if budget is None or budget.unit != "share":
        return f"kvpress takes a share, not {contender.budget}"
    return None


def prompt(asked: Subject, name: str, example: Example, mode: str) -> Prompt:
    """What the other side needs of one example, in token ids."""
    return {
        "id": name,
        "context": asked.encode(example.context, first=True),
        "questions": [asked.encode(q) for q in example.questions],
        "most": [allowance(asked, a) for a in example.answers],
        "stop": sorted(asked.stops),
        "aware": mode == "query-aware",
    }


def answered(
    contender: Contender, model: str, dtype: str, prompts: list[Prompt], folder: Path
) -> Iterator[tuple[str, Record]]:
    """(name, row) of each prompt, from one process of the other environment. It resumes from what the folder holds.

    RuntimeError with the other side's words where it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    budget = Budget.parse(contender.budget)
    assert budget is not None
    stem = contender.label.replace(":", "-").replace(" ", "-")
    asked, out = folder / f"{stem}.prompts.jsonl", folder / f"{stem}.jsonl"
    asked.write_text("".join(json.dumps(p) + "\n" for p in prompts), encoding="utf-8")
    command = [str(python()), str(HOME / "kvpress_run.py"), "--model", model, "--prompts", str(asked)]
    command += ["--out", str(out), "--press", contender.name.removeprefix(PREFIX), "--dtype", dtype]
    command += ["--ratio", str(round(1.0 - budget.value, 6))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender.label}: {done.stderr.strip()[-400:]}")
    wanted = {p["id"] for p in prompts}
    for line in out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["id"] in wanted:
            yield row["id"], row


def record(asked: Subject, example: Example, row: Record) -> Record:
    """A row as one of our records."""
    total = size(asked, example)
    found = judged(asked, row["answers"], example)
    found |= {"decoded": row["decoded"], "ms": row["ms"], "bytes": row["bytes"], "peak_bytes": row["peak_bytes"]}
    return found | {"dense_bytes": dense_bytes(asked.model, total), "tokens": total}
