"""Instruction-set levels: detection, choice, refusal, and what backends() says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ALL_LEVELS, LEVELS, SOFT
from kvstrata import _C
from kvstrata.backend import Absent, Backend, Cuda, _cuda, backends, set_isa

ORDER = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]
# The best level that is used unasked: amx has run on no CPU yet.
UNASKED = [level for level in LEVELS if level != "amx"][-1]
# What a CPU with everything says of itself: the bits that a level asks for, by word (leaf 1 ECX; leaf 7 EBX, ECX, EDX; leaf 7.1
# EAX), and the register states that its operating system saves.
BITS: list[tuple[int, ...]] = [(12, 29), (5, 16, 17, 30, 31), (11,), (22, 24, 25), (5,)]
STATES = (1, 2, 5, 6, 7, 17, 18)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


def test_levels_are_a_ladder_with_reasons() -> None:
    levels = [level for level in _C.isa_levels() if level[0] != SOFT]
    assert [name for name, *_ in levels] == ORDER
    available = [level[1] for level in levels]
    assert available == sorted(available, reverse=True), "a level above one that is missing"
    assert levels[0][1], "scalar is always there"
    for name, here, reason, kernels in levels:
        assert here == (reason == ""), name
        assert ORDER.index(kernels) <= ORDER.index(name)
    assert _C.isa() == UNASKED


def test_levels_are_those_of_the_machine() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("no /proc/cpuinfo")
    words = set(flags.read_text().split())
    assert ("avx2" in LEVELS) == ({"avx2", "fma", "f16c"} <= words)
    assert ("avx512" in LEVELS) == ({"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"} <= words)
    assert ("avx512_vnni" in LEVELS) == ("avx512" in LEVELS and "avx512_vnni" in words)
    assert ("avx512_bf16" in LEVELS) == ("avx512_vnni" in LEVELS and "avx512_bf16" in words)


def words(*without: tuple[int, int]) -> list[int]:
    """Words of cpuid with all bits but some (word, bit)."""
    return [sum(1 << bit for bit in bits if (i, bit) not in without) for i, bits in enumerate(BITS)]


def states(*without: int) -> int:
    return sum(1 << bit for bit in STATES if bit not in without)


def test_a_machine_that_has_everything_lacks_nothing() -> None:
    assert [_C.isa_obstacle(i, words(), states(), True) for i in range(len(ORDER))] == [""] * len(ORDER)


@pytest.mark.parametrize("missing", [22, 24, 25, "state 17", "state 18", "permission"])
def test_amx_needs_all_of_it(missing: int | str) -> None:
    """The three parts in the CPU, both states in the operating system, the permission for the process."""
    amx = ORDER.index("amx")
    if missing == "permission":
        assert _C.isa_obstacle(amx, words(), states(), False) == "the operating system refused the AMX tile permission"
    elif isinstance(missing, str):
        saved = states(int(missing.split()[1]))
        assert _C.isa_obstacle(amx, words(), saved, True) == "the operating system does not save AMX tiles"
    else:
        assert _C.isa_obstacle(amx, words((3, missing)), states(), True) == "the CPU has no AMX-TILE, -BF16 and -INT8"


@pytest.mark.parametrize("place", [(w, b) for w, bits in enumerate(BITS) for b in bits if w != 3], ids=str)
def test_each_bit_below_amx_is_asked_for(place: tuple[int, int]) -> None:
    reasons = [_C.isa_obstacle(i, words(place), states(), True) for i in range(len(ORDER))]
    assert sum(map(bool, reasons)) == 1 and not reasons[0]


def test_soft_tiles_are_used_only_where_they_are_asked_for() -> None:
    """A level for tests: no machine chooses it, whatever it has."""
    assert _C.isa() != SOFT
    if SOFT not in ALL_LEVELS:
        with pytest.raises(ValueError, match="set_isa: level is amx_soft"):
            set_isa(SOFT)
        return
    assert run("from kvstrata import _C; print(_C.isa())", KVSTRATA_ISA=SOFT).stdout.strip() == SOFT
    assert {level[0]: level[3] for level in _C.isa_levels()}[SOFT] == SOFT, "kernels of its own"


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_can_be_chosen(level: str) -> None:
    set_isa(level)
    assert _C.isa() == level
    set_isa("")
    assert _C.isa() == UNASKED


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="set_isa: level is doesnotexist, expected one of scalar, avx2, avx512"):
        set_isa("doesnotexist")
    assert _C.isa() == UNASKED


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
    assert [level.name for level in cpu.levels if level.available] == ALL_LEVELS
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
