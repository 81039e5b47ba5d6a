"""The CUDA library as a plain C library: ctypes, no torch, no module of ours."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from pathlib import Path

import pytest

from emulated import emulated_path

NAME = "libkvstrata_cuda.so"


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


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    return emulated_path()


@pytest.fixture(scope="session")
def emulated_cuda(emulated_library: Path) -> ctypes.CDLL:
    """The emulated library: its device memory is the host's."""
    return opened(emulated_library)
