"""kvstrata eval episodes: the folder of a run, resuming, refusing, and that no text of the data is in it."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvstrata.cli import main
from kvstrata.quality import routing_report
from kvstrata.quality.routing import Cut
from kvstrata.quality.routing_run import RECORDS, Config, Run, counter

pytest.importorskip("sklearn")

SAME = ("metrics.json", "predictions.csv", "report.md")
TOPICS = ("violin concert melody", "rudder harbor anchor")
"""Words that no file of a run may hold."""
SECRETS = ("violin", "rudder", "Xanthippe", "Socrates", "whence")


def conversation(name: str) -> dict[str, Any]:
    """Two topics in two sessions of eight turns, and a question on each."""
    sessions = {
        f"session_{n}": [
            {"speaker": ("Xanthippe", "Socrates")[i % 2], "dia_id": f"D{n}:{i}", "text": f"{words}, line {i} of it."}
            for i in range(1, 9)
        ]
        for n, words in enumerate(TOPICS, 1)
    }
    asked = [
        {"question": f"whence the {TOPICS[n - 1]}?", "answer": n, "evidence": [f"D{n}:3"], "category": 3 + (n == 1)}
        for n in (1, 2)
    ]
    return {"sample_id": name, "conversation": sessions, "qa": [*asked, asked[0] | {"evidence": [], "category": 1}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps([conversation("conv-1"), conversation("conv-2")]), encoding="utf-8")
    return path


def command(data: Path, out: Path, *more: str) -> int:
    base = ["eval", "episodes", "--format", "locomo", "--embedder", "hashed", "--episodes", "2", "--seeds", "2"]
    return main([*base, "--data", str(data), "--out", str(out), *more])


def test_a_run_writes_ids_and_numbers_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert command(data, out) == 0
    printed = capsys.readouterr().out
    assert "4 questions with evidence on 2 conversations" in printed and "shipped" in printed
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"manifest.json", RECORDS, *SAME} <= {path.name for path in files}
    for path in files:
        text = path.read_bytes()
        assert not [word for word in (*SECRETS, data.name) if word.encode() in text], path.name
        assert not [word for word in SECRETS if word in printed]
    config = json.loads((out / "manifest.json").read_text())["config"]
    assert config["counts"]["questions"] == 6 and config["counts"]["usable"] == 4 and len(config["data"]) == 64


def test_numbers_of_two_topics(data: Path, tmp_path: Path) -> None:
    assert command(data, tmp_path / "run") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    cells = {(c["rule"], c["query"], c["category"]): c for c in metrics["cells"]}
    for rule in ("nearest_window", "centroid", "vote"):
        assert cells[rule, "raw", "all"]["recall"] == 1 and cells[rule, "raw", "macro"]["lift"] == 1
    assert cells["random", "-", "all"]["recall"] == 0.5 and cells["oracle", "-", "all"]["recall"] == 1
    assert cells["nearest_window", "raw", "all"]["tokens_share"] == pytest.approx(0.5, abs=0.05)
    assert {c[2] for c in cells} == {"all", "macro", "single-hop", "open-domain"}
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["dialogue"], r["seed"]) for r in rows} == {(d, s) for d in ("conv-1", "conv-2") for s in ("0", "1")}
    assert {r["question"] for r in rows} == {f"{d}/{i}" for d in ("conv-1", "conv-2") for i in (0, 1)}
    chosen = [r for r in rows if (r["rule"], r["query"], r["question"]) == ("nearest_window", "raw", "conv-1/1")]
    assert [r["episodes"] for r in chosen] == ["1", "1"] and all(r["recall"] == "1.0" for r in chosen)


def test_a_run_cut_short_goes_on_to_the_same_files(data: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(data, whole) == command(data, cut) == 0
    lines = (cut / RECORDS).read_text().splitlines(keepends=True)
    assert len(lines) == 4
    (cut / RECORDS).write_text("".join(lines[:1]) + lines[1][: len(lines[1]) // 2])
    assert command(data, cut) == 0
    for name in SAME:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_is_not_measured_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(data, tmp_path / "run") == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    (tmp_path / "run" / "metrics.json").unlink()
    monkeypatch.setattr("kvstrata.quality.routing_run.measured", None)
    assert command(data, tmp_path / "run") == 0
    assert main(["eval", "report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("change", [["--window", "2"], ["--seeds", "1"], ["--captions"], ["--pick", "closest"]])
def test_another_configuration_needs_another_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str]
) -> None:
    assert command(data, tmp_path / "run") == 0
    capsys.readouterr()
    assert command(data, tmp_path / "run", *change) == 1
    assert "another configuration" in capsys.readouterr().err


def test_other_data_under_the_same_name_is_noticed(data: Path, tmp_path: Path) -> None:
    assert command(data, tmp_path / "run") == 0
    data.write_text(json.dumps([conversation("conv-1"), conversation("conv-3")]), encoding="utf-8")
    assert command(data, tmp_path / "run") == 1


def test_json(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(data, tmp_path / "run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"]["dialogues"] == 2 and any(c["rule"] == "shipped" for c in said["cells"])


def test_input_embeddings_of_the_bundled_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """They send questions where their evidence is, though its words are pieces of two letters."""
    pytest.importorskip("transformers")
    model = Path(__file__).parents[2] / "bench" / "quality" / "model"
    base = [
        "eval",
        "episodes",
        "--embedder",
        "input",
        "--model",
        str(model),
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*base, "--json"]) == 0
    cells = {(c["rule"], c["query"], c["category"]): c for c in json.loads(capsys.readouterr().out)["cells"]}
    recall = {rule: cells[rule, query, "all"]["recall"] for rule, query in (("nearest_window", "raw"), ("random", "-"))}
    assert recall["nearest_window"] > recall["random"] + 0.4
    config = json.loads((tmp_path / "r" / "manifest.json").read_text())["config"]
    assert len(config["model"]) == 64 and str(tmp_path.anchor) not in config["model"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--format", "locomo"], "data: got '' for format locomo, expected the path of the user's file"),
        (["--format", "generated", "--data", "x"], "expected none, the set comes with kvstrata"),
        (["--format", "locomo", "--data", "none.json"], "none.json"),
        (["--format", "realtalk", "--data", "none"], "none"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(["eval", "episodes", *arguments, "--out", str(tmp_path / "run")]) == 1
    assert reason in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_data_that_asks_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([conversation("conv-1") | {"qa": []}]))
    assert command(path, tmp_path / "run") == 1
    assert "has no question with evidence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"format": "csv"}, "format: 'csv' is unknown"),
        ({"embedder": "none"}, "embedder: 'none' is unknown"),
        ({"seeds": ()}, r"seeds: got \(\)"),
        ({"seeds": (1, 1)}, "each once"),
    ],
)
def test_a_config_checks_its_names(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Config(**{"format": "generated", **wrong})


def test_the_generated_set_differs_by_seed(tmp_path: Path) -> None:
    run = Run(tmp_path, Config("generated", embedder="hashed", seeds=(3, 4)))
    ids = [(d.id, seed) for d, seed in run.units()]
    assert len(ids) == run.count() == 40 and all(d.startswith(f"s{seed}-") for d, seed in ids)


def test_tokens_are_counted_by_characters_or_by_a_tokenizer(tmp_path: Path) -> None:
    assert [counter("")(text) for text in ("", "four", "five!")] == [0, 1, 2]
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    assert counter(str(tmp_path / "tokenizer.json"))("a b c a") == 4
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        counter(str(tmp_path / "broken.json"))


def test_locomo_beats_the_shipped_rule(tmp_path: Path) -> None:
    """Routing on LoCoMo with MiniLM: at least 10 points of recall over the rule of the paper's code."""
    if not os.environ.get("KVSTRATA_LOCOMO"):
        pytest.skip("KVSTRATA_LOCOMO names no file")
    run = Run(tmp_path, Config("locomo", os.environ["KVSTRATA_LOCOMO"], "minilm", (0,), Cut()))
    run.work(lambda unit: None)
    _, numbers = routing_report.make(tmp_path)
    gains = {c["rule"]: c["gain"] for c in numbers["cells"] if (c["query"], c["category"]) == ("raw", "all")}
    assert gains["nearest_window, default"] >= 0.10


def test_the_command_offers_what_there_is() -> None:
    """Its help must not import torch, so the names stand there once more."""
    from kvstrata.cli import routing
    from kvstrata.quality.dialogues import FORMATS
    from kvstrata.quality.routing_run import EMBEDDERS, GENERATED, INPUT

    assert (*FORMATS, GENERATED) == routing.FORMATS and (*EMBEDDERS, INPUT) == routing.EMBEDDERS
