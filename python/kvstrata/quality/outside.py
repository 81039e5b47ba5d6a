"""Peers in an environment of their own: kvpress, which needs an older transformers. Prompts and answers go as JSONL."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstrata.budget import Budget
from kvstrata.quality.contenders import PREFIX, Contender
from kvstrata.quality.measure import Record, Subject, Tokens, judged, whole
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


def prompt(asked: Subject, name: str, tokens: Tokens, mode: str) -> Prompt:
    """What the other side needs of one example."""
    return {
        "id": name,
        "context": tokens.context,
        "questions": tokens.questions,
        "most": tokens.most,
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


def record(asked: Subject, tokens: Tokens, row: Record) -> Record:
    """A row as one of our records."""
    taken = {field: row[field] for field in ("decoded", "ms", "bytes", "peak_bytes", "kept_bytes")}
    return judged(asked, row["answers"], tokens.example) | taken | whole(asked, tokens)
