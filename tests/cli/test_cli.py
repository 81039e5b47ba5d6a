"""The command line on small random models: exit codes, --json, plain output off a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import Run, runner

from kvstrata.cli import demo

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture
def kvstrata(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(capsys, monkeypatch)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and no tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that kvstrata refuses: Bloom's attention cannot be set."""
    folder = tmp_path_factory.mktemp("bloom")
    config = transformers.BloomConfig(vocab_size=256, hidden_size=32, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["generate"],
        ["generate", "m"],
        ["generate", "m", "--prompt", "x", "--file", "y"],
        ["generate", "m", "--prompt", "x", "--policy", "none-such"],
        ["generate", "m", "--prompt", "x", "--budget", "0.25"],
        ["generate", "m", "--prompt", "x", "--max-new-tokens", "0"],
        ["doctor", "a", "b"],
    ],
)
def test_bad_usage_exits_2(kvstrata: Run, arguments: list[str]) -> None:
    done = kvstrata(*arguments)
    assert done.returncode == 2
    assert "usage: kvstrata" in done.stderr + done.stdout


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys, kvstrata.cli as c\nc.parser().format_help()\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("arguments", [["doctor"], ["generate", "--prompt", "x"]])
def test_a_missing_model_exits_1_with_the_reason(kvstrata: Run, arguments: list[str], tmp_path: Path) -> None:
    done = kvstrata(*arguments, tmp_path / "none", "--json")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("kvstrata: ")
    assert json.loads(done.stdout)["error"]


def test_generate_compares_with_the_dense_cache(kvstrata: Run, llama: Path) -> None:
    done = kvstrata(
        "generate", llama, "--prompt", "a long story " * 40, "--max-new-tokens", "12", "--compare", "--json"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["run"]["tokens"] == said["dense"]["tokens"]
    assert len(said["run"]["tokens"]) == 12
    assert said["report"]["nbytes"] == said["run"]["kv_bytes"] > 0


def test_generate_within_a_budget_from_a_file(kvstrata: Run, llama: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("once upon a time " * 60)
    options = ["--policy", "streaming", "--budget", "256tok", "--max-new-tokens", "8"]
    done = kvstrata("generate", llama, "--file", prompt, *options, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert max(n for layer in said["report"]["stored"] for n in layer) <= 256
    assert said["prompt_tokens"] == 17 * 60


def test_output_off_a_terminal_is_plain(llama: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "kvstrata.cli",
        "generate",
        str(llama),
        "--prompt",
        "hello",
        "--max-new-tokens",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert not set("─│━┃┌┏╭╮") & set(done.stdout)


def test_a_budget_that_is_too_small_exits_1(kvstrata: Run, llama: Path) -> None:
    done = kvstrata("generate", llama, "--prompt", "x" * 500, "--budget", "16tok", "--policy", "streaming")
    assert done.returncode == 1
    assert "16" in done.stderr


def test_doctor_without_a_model(kvstrata: Run) -> None:
    done = kvstrata("doctor", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["versions"]["kvstrata"] and said["versions"]["torch"]
    assert said["backends"]["cpu"]["isa"]
    assert said["bandwidth"]["copy_gbps"] > 0 and said["bandwidth"]["read_gbps"] > 0
    assert "reason" not in said["backends"]["cuda"]  # absent: under that name; present: a backend


def test_doctor_examines_a_model(kvstrata: Run, llama: Path) -> None:
    done = kvstrata("doctor", llama, "--json")
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert model["reasons"] == []
    assert [layer["kv_heads"] for layer in model["layers"]] == [2, 2]
    assert model["bytes_per_token"]["dense cache"] == 2 * 2 * 2 * 16 * 4
    assert model["logits"]["largest_difference"] <= model["logits"]["tolerance"]
    plain = kvstrata("doctor", llama)
    assert plain.returncode == 0 and "Largest logit difference" in plain.stdout


def test_doctor_on_a_refused_model_exits_1_with_the_reason(kvstrata: Run, refused: Path) -> None:
    done = kvstrata("doctor", refused, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["model"]["reasons"]
    assert "Refused: " in kvstrata("doctor", refused).stdout


def test_demo(kvstrata: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "LENGTH", 512)
    monkeypatch.setattr(demo, "CACHES", (("DynamicCache", None), ("full", None), ("streaming", "50%")))
    done = kvstrata("demo", "--model", model_folder, "--json", "--plot", tmp_path / "demo.png")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    dense, full, streaming = said["runs"]
    assert said["full_agrees"] and full["answers"] == dense["answers"] and len(said["questions"]) == 8
    assert streaming["bytes"] <= streaming["peak_bytes"] <= 0.5 * streaming["dense_bytes"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_without_the_trained_model(kvstrata: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "LENGTH", 700)
    monkeypatch.setattr(demo, "CACHES", (("DynamicCache", None), ("full", None), ("streaming", "50%")))
    done = kvstrata("demo")
    assert done.returncode == 0, done.stderr
    assert "RANDOM weights" in done.stdout and "no answer is right" in done.stdout


def test_demo_plot_without_matplotlib_fails_before_the_work(tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from kvstrata.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "demo", "--plot", str(tmp_path / "p.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "matplotlib" in done.stderr


def test_eval_and_its_report(kvstrata: Run, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = ("--tasks", "needle", "--policies", "full,streaming", "--budgets", "50%", "--length", "512", "--n", "2")
    done = kvstrata("eval", "--model", model_folder, *asked, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {c["contender"] for c in said["cells"]} == {"DynamicCache", "full", "streaming"}
    before = (out / "report.md").read_bytes()
    (out / "report.md").unlink()
    again = kvstrata("eval", "report", out)
    assert again.returncode == 0 and (out / "report.md").read_bytes() == before
    assert "Mean over the retrieval tasks" in again.stdout


def test_eval_refuses_what_it_does_not_know(kvstrata: Run, tmp_path: Path) -> None:
    for arguments, reason in (
        (("--tasks", "needles"), "tasks: 'needles'"),
        (("--policies", "best"), "policies: 'best'"),
        (("--length", "12"), "lengths >= 128"),
        (("report",), "expected: report RUN"),
        (("report", str(tmp_path)), "manifest.json"),
    ):
        done = kvstrata("eval", *arguments, "--out", tmp_path / "out")
        assert done.returncode == 1 and reason in done.stderr, done.stderr


def test_doctor_says_what_cuda_lacks(kvstrata: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvstrata.backend import Absent
    from kvstrata.cli import cuda_facts

    monkeypatch.setattr(cuda_facts, "backends", lambda: {"cuda": Absent("error 35: no driver")})
    monkeypatch.setattr(torch.version, "cuda", None)
    said = json.loads(kvstrata("doctor", "--json").stdout)["cuda"]
    library, of_torch = said["missing"]
    assert library.startswith("CUDA library: error 35: no driver; install the NVIDIA driver")
    assert "is built without CUDA" in of_torch
    assert said["devices"] == [] and said["runtime"] is None and "bandwidth" not in said
    assert "install the NVIDIA driver" in kvstrata("doctor").stdout
