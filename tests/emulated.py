"""The CUDA library as the CPU runs it (csrc/cuda/emulate): its kernels, thread by thread, where no device is at hand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAME = "libkvstrata_cuda_emulated.so"


def emulated_path() -> Path:
    """The newest one under build/ (`make emulated`); the test is skipped where it cannot be built."""
    built = sorted((ROOT / "build").rglob(NAME), key=lambda p: p.stat().st_mtime)
    if not built and (lacking := emulation_lacks()):
        pytest.skip(f"{NAME} is not built: {lacking} is missing")
    assert built, f"{NAME} is not under build/, though g++ and the toolkit's headers are there: make emulated"
    return built[-1]


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
