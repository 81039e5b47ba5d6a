"""Per-ISA code stays in its box: what the object files of each instruction-set level define, need and contain.

The objects are taken as the wheel's build left them, or built here, with and without optimisation, because inlining
hides what a debug build would share. (One inline helper outside the namespace is enough for the linker to give the
scalar level an AVX-512 body.)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = re.findall(r"^\s*kvstrata_isa\((\w+)", (ROOT / "CMakeLists.txt").read_text(), flags=re.M)
BUILD_TYPES = ["Release", "Debug"]
MAY_NEED = {"memcpy", "memset", "memmove"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not list(ROOT.glob("csrc/cpu/kernels/*.cpp")), reason="no kernels yet"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are missing"),
]


def tool(name: str) -> str:
    """cmake or ninja: the wheel's beside this interpreter, else the machine's."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing")
    return found


def run(*command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in {"LD_PRELOAD", "CXXFLAGS"}}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def objects_in(folder: Path) -> dict[str, list[Path]]:
    found = {level: sorted(folder.glob(f"CMakeFiles/kernels_{level}.dir/**/*.o")) for level in LEVELS}
    return found | {"core": sorted(folder.glob("CMakeFiles/kvstrata_core.dir/**/*.o"))}


def already_built(build_type: str) -> dict[str, list[Path]] | None:
    """Objects of a plain build of this type (that of the wheel, say) that no source is newer than."""
    sources = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "CMakeLists.txt"]
    for cache in ROOT.glob("build/*/CMakeCache.txt"):
        plain = re.search(r"^KVSTRATA_SANITIZE:\w+=$", cache.read_text(), flags=re.M)
        if not plain or f"CMAKE_BUILD_TYPE:STRING={build_type}\n" not in cache.read_text():
            continue
        found = objects_in(cache.parent)
        built = [path.stat().st_mtime for paths in found.values() for path in paths]
        wanted = len(LEVELS) * len(list(ROOT.glob("csrc/cpu/kernels/*.cpp")))
        kernels = sum(len(found[level]) for level in LEVELS)
        if kernels == wanted and found["core"] and min(built) >= max(path.stat().st_mtime for path in sources):
            return found
    return None


@pytest.fixture(scope="module", params=BUILD_TYPES)
def objects(request: pytest.FixtureRequest) -> dict[str, list[Path]]:
    """Level -> its object files, and "core": everything else that runs on any machine."""
    import pybind11

    if found := already_built(request.param):
        return found
    folder = ROOT / "build" / "symbols" / request.param
    run(
        tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_BUILD_TYPE={request.param}",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}", "-DKVSTRATA_CUDA=off",
        "-DKVSTRATA_SOFT_TILES=ON", "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )  # fmt: skip
    # Without optimisation levels alone are looked at: what they share is the question, and the core is most of the build.
    core = ["kvstrata_core"] if request.param == "Release" else []
    run(tool("cmake"), "--build", str(folder), "--target", *(f"kernels_{level}" for level in LEVELS), *core)
    found = objects_in(folder)
    assert all(found[level] for level in LEVELS) and (found["core"] or not core), found
    return found


def symbols(path: Path) -> list[tuple[str, str]]:
    """(type, demangled name) of every symbol of an object file."""
    lines = run("nm", "-C", str(path)).splitlines()
    return [(m[1], m[2]) for line in lines if (m := re.match(r"(?:[0-9a-f]+)?\s+(\w) (.*)", line))]


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_outside_the_namespace(objects: dict[str, list[Path]], level: str) -> None:
    box = f"kvstrata::cpu::{level}::"
    for path in objects[level]:
        # Weak, unique and global symbols meet those of other levels in the linker; local ones (lower case) do not.
        shared = [name for kind, name in symbols(path) if kind in "VWuvwTDBRCi" and box not in name]
        assert not shared, f"{path.name} at {level} shares {shared[:5]}"


@pytest.mark.parametrize("level", LEVELS)
def test_needs_only_memory_functions(objects: dict[str, list[Path]], level: str) -> None:
    box = f"kvstrata::cpu::{level}::"
    for path in objects[level]:
        needed = {name for kind, name in symbols(path) if kind == "U" and not name.startswith(box)}
        assert needed <= MAY_NEED | {"_GLOBAL_OFFSET_TABLE_"}, f"{path.name} at {level} needs {sorted(needed)}"


@pytest.mark.parametrize("level", LEVELS)
def test_no_code_before_main(objects: dict[str, list[Path]], level: str) -> None:
    for path in objects[level]:
        sections = run("objdump", "-h", str(path))
        assert ".init_array" not in sections and ".ctors" not in sections, f"{path.name} at {level} runs at load"


def test_baseline_holds_no_wide_instruction(objects: dict[str, list[Path]]) -> None:
    for path in [*objects["core"], *objects["scalar"]]:
        code = run("objdump", "-d", "--no-show-raw-insn", str(path))
        wide = re.findall(r".*%[yz]mm\d+.*", code)
        assert not wide, f"{path.name} would die on an old machine: {wide[0].strip()}"


def test_tile_instructions_are_in_the_amx_level_alone(objects: dict[str, list[Path]]) -> None:
    tiles = r"ldtilecfg|tile(?:release|zero|loadd|stored)|tdp\w+"
    for level, paths in objects.items():
        wanted = {"attend_matrix_pairs": "tdpbf16ps", "attend_matrix_codes": "tdpbssd"} if level == "amx" else {}
        for path in paths:
            found = set(re.findall(rf"\b(?:{tiles})\b", run("objdump", "-d", "--no-show-raw-insn", str(path))))
            common = {"ldtilecfg", "tileloadd", "tilestored", "tilezero", "tilerelease"}
            product = wanted.get(path.name.split(".")[0])
            assert found == (common | {product} if product else set()), f"{path.name} at {level}"
