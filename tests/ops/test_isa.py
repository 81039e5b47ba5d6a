"""Instruction-set levels: detection, choice, refusal, and what backends() says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import LEVELS
from kvstrata import _C
from kvstrata.backend import Absent, Backend, Cuda, _cuda, backends, set_isa

ORDER = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


def test_levels_are_a_ladder_with_reasons() -> None:
    levels = _C.isa_levels()
    assert [name for name, *_ in levels] == ORDER
    available = [level[1] for level in levels]
    assert available == sorted(available, reverse=True), "a level above one that is missing"
    assert levels[0][1], "scalar is always there"
    for name, here, reason, kernels in levels:
        assert here == (reason == ""), name
        assert ORDER.index(kernels) <= ORDER.index(name)
    assert _C.isa() == LEVELS[-1]


def test_levels_are_those_of_the_machine() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("no /proc/cpuinfo")
    words = set(flags.read_text().split())
    assert ("avx2" in LEVELS) == ({"avx2", "fma", "f16c"} <= words)
    assert ("avx512" in LEVELS) == ({"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"} <= words)
    assert ("avx512_vnni" in LEVELS) == ("avx512" in LEVELS and "avx512_vnni" in words)
    assert ("avx512_bf16" in LEVELS) == ("avx512_vnni" in LEVELS and "avx512_bf16" in words)


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_can_be_chosen(level: str) -> None:
    set_isa(level)
    assert _C.isa() == level
    set_isa("")
    assert _C.isa() == LEVELS[-1]


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="set_isa: level is doesnotexist, expected one of scalar, avx2, avx512"):
        set_isa("doesnotexist")
    assert _C.isa() == LEVELS[-1]


def test_missing_level_is_refused() -> None:
    missing = [level for level in ORDER if level not in LEVELS]
    if not missing:
        pytest.skip("every level is available here")
    with pytest.raises(ValueError, match=f"{missing[0]}, which is not available here: "):
        set_isa(missing[0])


@pytest.mark.parametrize("level", LEVELS)
def test_environment_lowers_the_level(level: str) -> None:
    done = run("from kvstrata import _C; print(_C.isa(), _C.settings()['isa'])", KVSTRATA_ISA=level)
    assert done.stdout.split() == [level, level], done.stderr


def test_unknown_environment_level_fails_at_first_use() -> None:
    code = "from kvstrata import _C; print('imported'); _C.isa()"
    done = run(code, KVSTRATA_ISA="doesnotexist")
    assert done.stdout == "imported\n" and done.returncode == 1
    assert "KVSTRATA_ISA is doesnotexist, expected one of scalar" in done.stderr and "Invalid" in done.stderr


def test_op_fails_under_an_unknown_environment_level() -> None:
    code = "import torch\nfrom kvstrata import ops\nops.merge([torch.ones(1, 4)], [torch.ones(1)])"
    done = run(code, KVSTRATA_ISA="doesnotexist")
    assert done.returncode == 1 and "KVSTRATA_ISA is doesnotexist" in done.stderr


def test_settings_have_defaults() -> None:
    env = {"KVSTRATA_ISA": "", "KVSTRATA_CHECK": "", "KVSTRATA_LOG": ""}
    done = run("from kvstrata import _C; print(_C.settings())", **env)
    assert done.stdout.strip() == "{'isa': '', 'check': False, 'log': 'warn'}", done.stderr


def test_backends() -> None:
    found = backends()
    cpu = found["cpu"]
    assert isinstance(cpu, Backend) and cpu.isa == LEVELS[-1]
    assert [level.name for level in cpu.levels if level.available] == LEVELS
    assert cpu.threads == _C.threads_source()
    assert isinstance(found["cuda"], Cuda | Absent)


def test_cuda_library_that_is_not_there_or_not_one(tmp_path: Path) -> None:
    assert _cuda(tmp_path / "libkvstrata_cuda.so") == Absent("not built")
    broken = tmp_path / "libkvstrata_cuda.so"
    broken.write_text("not a library")
    found = _cuda(broken)
    assert isinstance(found, Absent) and "libkvstrata_cuda.so cannot be opened" in found.reason


def test_backends_is_a_function_whoever_imported_its_module_first() -> None:
    code = "import kvstrata.backend, kvstrata; print(sorted(kvstrata.backends()))"
    done = run(code)
    assert done.stdout.strip() == "['cpu', 'cuda']", done.stderr
