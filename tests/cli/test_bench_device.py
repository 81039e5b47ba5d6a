"""`kvstrata bench --device cuda`: what it refuses where there is no device, and the whole of it on emulated kernels."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emulated import emulated_path
from kvstrata import _C, pools
from kvstrata.backend import Absent, Cuda
from kvstrata.cli import main
from kvstrata.cli.bench import attend, clock, common
from kvstrata.cli.bench.clock import Clock, CudaClock, Times
from kvstrata.hf import shapes

SMALL = ("--tokens", "32", "--kv-rows", "2", "--group", "2", "--dim", "32", "--reps", "1")
BENCHES = ("attend", "prefill", "append", "quantize", "select", "decode", "memory")
CUDA = Cuda(1, "13.0", "13.0")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one object that a bench prints."""
    capsys.readouterr()
    assert main(["bench", *arguments, "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


# --- Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHES)
def test_without_a_device_it_says_why(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "backends", lambda: {"cuda": Absent("error 35: no driver")})
    assert main(["bench", name, "--device", "cuda", "--json"]) == 1
    reason = json.loads(capsys.readouterr().out)["error"]
    assert reason == (
        "Unsupported: bench: device is 'cuda', expected a CUDA library that runs here: error 35: no driver"
    )


def test_a_torch_that_sees_no_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "backends", lambda: {"cuda": CUDA})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(clock.Unsupported, match="says that none is available"):
        clock.clock_of("cuda")


def test_levels_are_the_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attend", "--device", "cuda", "--isa", "scalar", "--json"]) == 1
    assert "isa is 'scalar', expected none" in json.loads(capsys.readouterr().out)["error"]


# --- Clocks ---------------------------------------------------------------------------------------------------------------


def test_times_are_of_sorted_calls() -> None:
    assert Times.of([3.0, 1.0, 2.0]) == Times(1.0, 2.0, 3.0)
    assert Times.of(list(range(100, 0, -1))) == Times(11, 51, 91)


def test_calls_alternate_and_warm_up(device: CudaClock, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (Clock(), device):
        seen: list[tuple[str, int]] = []
        times = each.measure(
            [lambda i, seen=seen: seen.append(("a", i)), lambda i, seen=seen: seen.append(("b", i))], 3
        )
        assert seen[-6:] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
        assert sorted(seen[:-6]) == [("a", -2), ("a", -1), ("b", -2), ("b", -1)]
        assert all(0 <= t.p10 <= t.p50 <= t.p90 < 1e3 for t in times)


def test_each_clock_times_what_it_is_given(device: CudaClock) -> None:
    for each in (Clock(), device):
        (slow,) = each.measure([lambda _: time.sleep(2e-3)], 3)
        assert slow.p10 >= 2.0
        assert each.whole(lambda: time.sleep(2e-3)) >= 2.0 and each.host(lambda: time.sleep(2e-3), 3).p10 >= 2.0


def test_buffers_fill_the_cache_four_times(device: CudaClock) -> None:
    for each in (Clock(), device):
        for size in (1 << 10, 1 << 14, 1 << 30):
            count = each.buffers(size)
            assert count >= 2 and count * size >= 4 * each.last_level_cache()
            assert count == 2 or (count - 1) * size < 4 * each.last_level_cache()


def test_the_host_gets_ahead_of_the_device(device: CudaClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each measured call the device waits at least as long as the host needs to hand it in."""
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    device.measure([lambda _: time.sleep(1e-3), lambda _: None], 2)
    assert len(waits) == 4 and waits[::2] == [waits[0]] * 2 and waits[1::2] == [waits[1]] * 2
    assert waits[0] >= 2 * device.AHEAD_CYCLES_PER_MS > waits[1] >= device.AHEAD_MS[0] * device.AHEAD_CYCLES_PER_MS


# --- On emulated kernels --------------------------------------------------------------------------------------------------


class Event:
    """Of CUDA, on the CPU's clock."""

    at = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaClock:
    """CUDA's clock on a device that is the CPU, of next to no cache."""
    facts = SimpleNamespace(
        name="emulated", major=9, minor=0, multi_processor_count=1, L2_cache_size=1 << 10, total_memory=1 << 30
    )
    pretended = {
        "Event": Event,
        "_sleep": lambda cycles: None,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: facts,
        "mem_get_info": lambda device: (1 << 30, 1 << 30),
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
        "is_available": lambda: True,
    }
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(CudaClock, "__init__", lambda self: setattr(self, "device", torch.device("cpu")))
    monkeypatch.setattr(CudaClock, "least_bytes", 1 << 16)
    return CudaClock()


@pytest.fixture
def emulated(device: CudaClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benches that are asked for CUDA run on the emulated library."""
    _C.open_cuda(str(emulated_path()))
    monkeypatch.setattr(pools, "device_code", lambda what, device: 1)
    monkeypatch.setattr(clock, "backends", lambda: {"cuda": CUDA})
    monkeypatch.setattr(attend, "HOST_REPS", 1)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attend", ("--format", "bf16,int4", "--mass")),
        ("prefill", ("--format", "int8", "--queries", "20")),
        (
            "append",
            (
                "--format",
                "bf16",
            ),
        ),
        (
            "quantize",
            (
                "--format",
                "int4",
            ),
        ),
        ("select", ("--most", "1")),
    ],
)
def test_ops_on_emulated_kernels(name: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, name, "--device", "cuda", *SMALL, *options)
    run, rows = found["run"], found["rows"]
    assert (run["backend"], run["isa"], run["device"], run["name"]) == ("cuda", "sm_90", "cuda", "emulated")
    assert run["read_gbps"] > 0 and run["copy_gbps"] > 0
    assert rows and all(row["reps"] == 1 and row["ms_p50"] > 0 and row["digest"] for row in rows)
    if name in ("attend", "prefill"):
        assert all(0 < row["err_rel"] < 1e-2 and row["speedup_vs_sdpa"] > 0 for row in rows)
        assert all(row["speedup_vs_flashinfer"] is row["speedup_vs_flash_attn"] is None for row in rows)


@pytest.mark.usefixtures("emulated")
def test_the_facts_head_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "append", "--device", "cuda", *SMALL, "--format", "f16"]) == 0
    assert capsys.readouterr().out.startswith("append: isa sm_90, emulated, read ")


@pytest.mark.usefixtures("emulated")
def test_a_model_on_emulated_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.ModelShape("qwen3", 64, 96, 2, 4, 2, 64, 128, True))
    asked = ("--shape", "tiny", "--context", "100", "--policies", "full,kivi", "--budgets", "4MiB", "--steps", "2")
    found = said(capsys, "decode", "--device", "cuda", *asked)
    assert found["run"]["device"]["name"] == "emulated"
    assert [row["cache"] for row in found["rows"]] == ["DynamicCache", "full", "kivi"]
    assert all(row["ms_p50"] > 0 and row["speedup"] > 0 for row in found["rows"])


def test_reps_are_more_on_a_device(device: CudaClock) -> None:
    assert Clock().reps(5) == 5 and device.reps(5) == 100 and device.reps(300) == 300


def test_a_bench_of_the_cpu_alone_does_not_take_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        common.parser("").parse_args(["--device", "cuda"])
    assert usage.value.code == 2 and "'cuda'" in capsys.readouterr().err
