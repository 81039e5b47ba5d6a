"""`kvstrata bench` at tiny sizes: what it prints, what it refuses. No time is asserted."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata import _C
from kvstrata.cli import main
from kvstrata.cli.bench import clock, common

SMALL = ("--tokens", "64", "--kv-rows", "2", "--dim", "32", "--reps", "2")

# specs/kernels.md section 5
RUN = {"backend", "isa", "device", "threads", "read_gbps", "copy_gbps", "torch", "commit", "seed"}
TIMED = {"kind", "format", "kv_rows", "head_dim", "tokens", "reps", "ms_p10", "ms_p50", "ms_p90", "gbps", "digest"}
ATTEND = TIMED | {
    "group", "queries", "slots", "arrangement", "order", "mass", "bytes_read", "share_read", "host_us", "err_rel",
    "baseline", "time_to_bf16", "speedup_vs_sdpa", "speedup_vs_flashinfer", "speedup_vs_flash_attn",
}  # fmt: skip
MOVED = TIMED | {"from", "bytes_in_and_out", "share_copy", "baseline", "speedup_vs_copy"}
FIELDS = {"attend": ATTEND, "prefill": ATTEND, "append": MOVED, "quantize": MOVED | {"order", "ns_per_token"}}

Bench = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few buffers, as for a machine with next to no cache; and the instruction-set level as it was."""
    monkeypatch.setattr(clock.Clock, "last_level_cache", lambda self: 1 << 12)
    yield
    _C.set_isa("")


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs a bench and gives the one object it prints."""

    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["bench", *arguments, *SMALL, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert isinstance(said, dict)
        return said

    return run


@pytest.mark.parametrize("name", FIELDS)
def test_json_is_one_object_with_every_field(bench: Bench, name: str) -> None:
    said = bench(name)
    assert set(said) == {"schema", "run", "rows"} and said["schema"] == 1
    assert set(said["run"]) >= RUN
    assert said["run"]["read_gbps"] > 0 and said["run"]["copy_gbps"] > 0
    assert said["rows"]
    for row in said["rows"]:
        assert set(row) == FIELDS[name]
        assert row["reps"] == 2 and row["head_dim"] == 32 and row["tokens"] in (64, 1)


@pytest.mark.parametrize(("name", "queries"), [("attend", 1), ("prefill", 512)])
def test_attention_is_near_f64_and_beside_sdpa(bench: Bench, name: str, queries: int) -> None:
    rows = bench(name)["rows"]
    assert [row["format"] for row in rows] == ["bf16", "int8", "int4", "int2"]
    for row in rows:
        assert row["kind"] == name and row["queries"] == queries
        assert 0 < row["err_rel"] < 1e-2  # rounding to bf16 is a part of it
        assert set(row["baseline"]) == {"name", "version", "dtype", "packed_gqa", "ms_p50"}
        assert row["baseline"]["dtype"] == "bfloat16" and row["baseline"]["packed_gqa"] is True


def test_the_seed_decides_the_digest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def digests(*arguments: str) -> dict[str, str]:
        return {row["format"]: row["digest"] for row in bench("attend", *arguments)["rows"]}

    first = digests()
    assert digests() == first
    assert len(set(first.values())) == len(first)
    assert not set(digests("--seed", "1").values()) & set(first.values())
    monkeypatch.setattr(clock.Clock, "last_level_cache", lambda self: 1 << 16)
    assert digests("--format", "int4") == {"int4": first["int4"]}


def test_options_of_attend(bench: Bench) -> None:
    (row,) = bench("attend", "--format", "f32", "--queries", "3", "--group", "2", "--order", "linear", "--mass")["rows"]
    asked = {"format": "f32", "queries": 3, "group": 2, "order": "linear", "mass": True}
    assert {name: row[name] for name in asked} == asked
    assert row["bytes_read"] == 2 * 4 * 16 * 2 * 32 * 4  # rows, pages, slots, K and V, dims, f32
    assert bench("attend", "--isa", "scalar", "--format", "bf16")["run"]["isa"] == "scalar"


@pytest.mark.parametrize("name", FIELDS)
def test_without_json_a_line_of_facts_and_a_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", name, *SMALL]) == 0
    said = capsys.readouterr().out
    facts, *table = said.splitlines()
    assert facts.startswith(f"{name}: isa {_C.isa()}") and "read" in facts and "copy" in facts and "GB/s" in facts
    assert any("ms_p50" in line for line in table)


@pytest.mark.parametrize(
    ("name", "format"),
    [("attend", "int3"), ("attend", "bf16,"), ("prefill", "fp8"), ("append", "int8"), ("quantize", "bf16")],
)
def test_a_format_that_a_bench_does_not_take_is_named(
    name: str, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["bench", name, "--format", format])
    assert usage.value.code == 2
    said = capsys.readouterr().err
    assert "--format" in said and repr(format.split(",")[-1]) in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--tokens", "100"), "tokens is 100"),
        (("--isa", "none-such"), "none-such"),
        (("--dim", "24", "--format", "int8"), "24"),
    ],
)
def test_what_cannot_run_exits_1_with_the_reason(
    arguments: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "attend", *SMALL, *arguments, "--json"]) == 1
    said = capsys.readouterr()
    assert reason in said.err and reason in json.loads(said.out)["error"]


@pytest.mark.parametrize("arguments", [[], ["none-such"], ["attend", "--reps", "0"], ["attend", "more"]])
def test_bad_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["bench", *arguments])
    assert usage.value.code == 2 and "usage: kvstrata" in capsys.readouterr().err


def test_json_may_stand_before_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json", "append", *SMALL, "--format", "f32"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


def test_the_commit_is_of_our_repository_or_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert common.commit() is None  # an installed wheel
    if shutil.which("git"):
        someone = ["git", "-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        subprocess.run([*someone, "commit", "-q", "--allow-empty", "-m", "theirs"], cwd=tmp_path, check=True)
        assert common.commit() is None  # installed in an environment within another repository
        (tmp_path / common.SOURCE).parent.mkdir(parents=True)
        (tmp_path / common.SOURCE).touch()
        assert common.commit()
    monkeypatch.setenv("PATH", "")
    assert common.commit() is None
