"""libkvstrata_cuda.so loads anywhere and says clearly what it lacks."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

# cudaErrorNoDevice, cudaErrorInsufficientDriver (also: no driver at all), cudaErrorSystemNotReady, or success.
EXPECTED = {0, 35, 100, 802}

PROBE = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.kvstrata_cuda_error_string.restype = lib.kvstrata_cuda_last_error.restype = ctypes.c_char_p
count = ctypes.c_int(-1)
code = lib.kvstrata_cuda_device_count(ctypes.byref(count))
assert 'torch' not in sys.modules
print(code, count.value)
print(lib.kvstrata_cuda_error_string(code).decode())
print(lib.kvstrata_cuda_last_error().decode())
"""


def test_loads_in_a_plain_process_and_answers(library: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, str(library)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    numbers, text, last = done.stdout.rstrip("\n").split("\n", 2)
    code, count = map(int, numbers.split())
    assert code in EXPECTED, f"device_count answered {code}: {text}"
    assert text
    if code == 0:
        assert count >= 0 and last == ""
    else:
        assert count == 0
        assert f"({code})" in last and "cudaGetDeviceCount" in last and "csrc/cuda/api.cu:" in last


def test_versions_and_abi(cuda: ctypes.CDLL) -> None:
    runtime = ctypes.c_int(-1)
    assert cuda.kvstrata_cuda_runtime_version(ctypes.byref(runtime)) == 0
    assert runtime.value >= 12080
    assert cuda.kvstrata_cuda_abi_version() == 4


def test_exports_only_its_own_names_and_needs_no_driver(library: Path) -> None:
    defined = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    names = {line.split()[-1].split("@")[0] for line in defined.stdout.splitlines()}
    assert names and all(name.startswith("kvstrata_cuda_") for name in names), sorted(names)
    needed = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    libraries = [line.split()[1] for line in needed.splitlines() if line.strip().startswith("NEEDED")]
    assert not [name for name in libraries if name.startswith(("libcuda", "libpython", "libtorch"))], libraries


def test_library_is_small(library: Path) -> None:
    assert library.stat().st_size <= 40 * 2**20
