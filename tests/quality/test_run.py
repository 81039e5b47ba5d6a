"""Runs on a tiny random model: files, resuming, repeating, refusing. No accuracy is judged."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvstrata.quality import report
from kvstrata.quality.run import RECORDS, Config, Run

THREADS = {"OMP_NUM_THREADS": "1"}
SAME = ("metrics.json", "predictions.csv", "report.md")


@pytest.fixture(scope="module")
def config(model_folder: Path) -> Config:
    return Config(
        model=str(model_folder),
        tasks=("needle", "multi_query", "text"),
        policies=("full", "streaming", "random"),
        peers=("DynamicCache",),
        budgets=("50%",),
        lengths=(1024,),
        n=3,
    )


def finished(folder: Path, config: Config) -> Path:
    run = Run(folder, config)
    run.work(lambda unit: None)
    report.make(folder, run.complaints)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    return finished(tmp_path_factory.mktemp("run") / "whole", config)


def same(a: Path, b: Path) -> None:
    for name in SAME:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_run_writes_every_file(whole: Path, config: Config) -> None:
    for name in ("manifest.json", "metrics.json", "timings.json", "predictions.csv", "report.md"):
        assert (whole / name).stat().st_size > 0
    cells = json.loads((whole / "metrics.json").read_text())["cells"]
    assert {(c["task"], c["contender"]) for c in cells} == {
        (t, c) for t in config.tasks for c in ("DynamicCache", "full", "streaming", "random")
    }
    assert all(c["n"] == config.n and "refused" not in c for c in cells), cells


def test_full_is_the_dense_cache_token_for_token(whole: Path, config: Config) -> None:
    with (whole / "predictions.csv").open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    full, dense = ([(*x[:3], *x[5:]) for x in lines if x[3] == contender] for contender in ("full", "DynamicCache"))
    assert full == dense and len(full) > 2 * config.n
    cells = {(c["task"], c["contender"]): c for c in json.loads((whole / "metrics.json").read_text())["cells"]}
    assert cells["text", "full"]["top1"] == 1.0 and cells["text", "full"]["kl"] < 1e-6


def test_bytes_hold_and_dropping_shows_in_the_text(whole: Path) -> None:
    for c in json.loads((whole / "metrics.json").read_text())["cells"]:
        if c["budget"] == "50%":
            assert c["bytes_share"] <= 0.5 and c["peak_bytes_share"] <= 0.5
            if c["task"] == "text":
                assert c["kl"] > 1e-4 and max(c["attention_error"]) > 0.01


def test_the_same_again(whole: Path, tmp_path: Path, config: Config) -> None:
    same(whole, finished(tmp_path / "again", config))


def test_a_cut_line_is_measured_again(whole: Path, tmp_path: Path, config: Config) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "manifest.json").write_bytes((whole / "manifest.json").read_bytes())
    text = (whole / RECORDS).read_text()
    (cut / RECORDS).write_text(text[: len(text) // 2])
    run = Run(cut, config)
    assert 0 < len(run.units()) < len(run.examples())
    same(whole, finished(cut, config))


def running(pid: str) -> bool:
    """Whether a process is there and has not ended."""
    path = Path("/proc", pid, "stat")
    try:
        return path.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_killed_and_started_again(whole: Path, tmp_path: Path, config: Config) -> None:
    """Two workers, killed and started again, measure what one does in one go."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "kvstrata.cli", "eval", "--model", config.model, "--out", str(folder)]
    command += ["--tasks", ",".join(config.tasks), "--policies", ",".join(config.policies), "--budgets", "50%"]
    command += ["--length", "1024", "--n", "3", "--jobs", "2"]
    work = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | THREADS)
    deadline = time.monotonic() + 120
    while not ((folder / RECORDS).exists() and (folder / RECORDS).stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = Path(f"/proc/{work.pid}/task/{work.pid}/children").read_text().split()
    work.send_signal(signal.SIGKILL)
    work.wait()
    assert len(workers) >= 2
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(running, workers))
    assert not (folder / "metrics.json").exists()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | THREADS)
    same(whole, folder)


def test_another_configuration_is_refused(whole: Path, config: Config) -> None:
    with pytest.raises(ValueError, match="another configuration.*seed: 0, not 7"):
        Run(whole, replace(config, seed=7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("needles",)}, "tasks: 'needles'"),
        ({"policies": ("best",)}, "policies: 'best'"),
        ({"peers": ("worst",)}, "peers: 'worst'"),
        ({"budgets": ("lots",)}, "budget: 'lots'"),
        ({"mode": "blind"}, "mode: 'blind'"),
        ({"n": 0}, "n >= 1"),
        ({"lengths": (100,)}, "lengths >= 128"),
    ],
)
def test_bad_configurations(change: dict, message: str, config: Config) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_a_budget_that_cannot_be_kept_is_reported(tmp_path: Path, config: Config) -> None:
    tight = replace(config, tasks=("needle",), policies=("streaming",), peers=(), budgets=("1%",), n=1)
    folder = finished(tmp_path / "refused", tight)
    (cell,) = json.loads((folder / "metrics.json").read_text())["cells"]
    assert "expected at least" in cell["refused"]
    assert "refused" in (folder / "report.md").read_text()


def test_a_users_file(tmp_path: Path, config: Config) -> None:
    file = tmp_path / "mine.jsonl"
    good = {"context": "The code of the amber fox is 1234.\n" * 4, "questions": ["Q: code of the amber fox? A:"]}
    bad = ["{", '{"context": 1}', '{"context": "a", "questions": ["b"], "answers": ["c", "d"]}', "[]"]
    lines = [json.dumps(good | {"answers": ["1234"]}), *bad, "", json.dumps(good | {"answers": ["4321"]})]
    file.write_text("\n".join(lines))
    own = replace(config, tasks=(str(file),), policies=("full",), n=10)
    folder = finished(tmp_path / "out", own)
    text = (folder / "report.md").read_text()
    for number, reason in (
        (2, "Expecting property"),
        (3, "context: expected a string"),
        (4, "1 questions, but 2"),
        (5, "an object"),
    ):
        assert f"mine.jsonl:{number}: " in text and reason in text
    rows = (folder / "predictions.csv").read_text().splitlines()[1:]
    assert len(rows) == 4  # two examples, two contenders
