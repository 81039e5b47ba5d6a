"""The CUDA library as a plain C library: ctypes, no torch, no module of ours."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

NAME = "libkvstrata_cuda.so"
EMULATED = "libkvstrata_cuda_emulated.so"
ROOT = Path(__file__).resolve().parents[2]


def library_path() -> Path | None:
    """The library beside the installed package (found without importing it), or None."""
    spec = importlib.util.find_spec("kvstrata")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / NAME).exists():
            return Path(folder) / NAME
    return None


def opened(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    lib.kvstrata_cuda_error_string.restype = ctypes.c_char_p
    lib.kvstrata_cuda_last_error.restype = ctypes.c_char_p
    return lib


@pytest.fixture(scope="session")
def library() -> Path:
    path = library_path()
    if path is None and shutil.which("nvcc") is None:
        pytest.skip(f"{NAME} is not built: no nvcc on PATH")
    assert path is not None, f"nvcc is on PATH, but {NAME} is not beside the installed package"
    return path


@pytest.fixture(scope="session")
def cuda(library: Path) -> ctypes.CDLL:
    """The library, opened as the package opens it."""
    return opened(library)


def emulation_lacks() -> str:
    """What this machine lacks to build the emulated library: the compiler, the toolkit's headers, or nothing ("")."""
    if shutil.which("g++") is None:
        return "g++"
    folders = [Path(p) for p in ("/usr/local/cuda/include", *map(str, Path("/usr/local").glob("cuda-*/include")))]
    if (nvcc := shutil.which("nvcc")) is not None:
        text = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        tops = [line.removeprefix("#$ TOP=") for line in text.splitlines() if line.startswith("#$ TOP=")]
        folders += [Path(top) / "include" for top in tops]
    return "" if any((folder / "cuda_runtime.h").exists() for folder in folders) else "the CUDA toolkit's headers"


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    """The newest emulated library under build/ (`make emulated`)."""
    built = sorted((ROOT / "build").rglob(EMULATED), key=lambda p: p.stat().st_mtime)
    if not built and (lacking := emulation_lacks()):
        pytest.skip(f"{EMULATED} is not built: {lacking} is missing")
    assert built, f"{EMULATED} is not under build/, though g++ and the toolkit's headers are there: make emulated"
    return built[-1]


@pytest.fixture(scope="session")
def emulated_cuda(emulated_library: Path) -> ctypes.CDLL:
    """The emulated library: its device memory is the host's."""
    return opened(emulated_library)
