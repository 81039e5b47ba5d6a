"""The CUDA library as the CPU runs it (csrc/cuda/emulate): its kernels, thread by thread, where no device is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "build" / "emulated" / "libkvstrata_cuda_emulated.so"


def emulated_library() -> Path:
    """Its place; the test is skipped where it is not built."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.relative_to(ROOT)} is not built: `make {LIBRARY.relative_to(ROOT)}`")
    return LIBRARY
