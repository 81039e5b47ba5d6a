"""What can run here: the CPU's instruction-set levels, whose threads are used, and the CUDA library."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

from kvstrata import _C

_CUDA_LIBRARY = "libkvstrata_cuda.so"


@dataclass(frozen=True)
class Level:
    """One instruction-set level of the CPU backend."""

    name: str
    available: bool
    reason: str  # why it is not available, or empty
    kernels: str  # the level whose kernels run at this one: its own, or the next lower one's that has them


@dataclass(frozen=True)
class Backend:
    """The CPU backend."""

    isa: str  # the level in use
    levels: list[Level]  # all levels, lowest first
    threads: str  # whose threads do the work, such as "libgomp.so.1 (torch)" or "own pool"


@dataclass(frozen=True)
class Cuda:
    """The CUDA backend. Versions of CUDA: of the runtime in the library, and the newest one that the driver takes."""

    devices: int
    runtime: str
    driver: str


@dataclass(frozen=True)
class Absent:
    """A backend that cannot be used, and why."""

    reason: str


def backends() -> dict[str, Backend | Cuda | Absent]:
    """The backends by name: {"cpu": Backend(...), "cuda": Cuda(...) or Absent(reason)}. Opens the CUDA library if it is here.

    Raises ValueError if KVSTRATA_ISA names an instruction-set level that is unknown or not available on this machine.
    """
    levels = [Level(*level) for level in _C.isa_levels()]
    return {"cpu": Backend(_C.isa(), levels, _C.threads_source()), "cuda": _cuda(cuda_library())}


def cuda_library() -> Path:
    """Where the CUDA library is, or would be."""
    return Path(__file__).parent / _CUDA_LIBRARY


def open_cuda() -> None:
    """Opens the CUDA library for the ops, once. RuntimeError with the reason where that cannot be."""
    if _C.cuda_is_open():
        return
    path = cuda_library()
    found = _cuda(path)
    if isinstance(found, Absent):
        raise RuntimeError(f"CUDA: {found.reason}")
    _C.open_cuda(str(path))


def set_isa(level: str) -> None:
    """Uses an instruction-set level from now on; "" goes back to the best one, or to KVSTRATA_ISA.

    For tests and diagnosis: other threads see it too. Raises ValueError if the level is unknown or not available here.
    """
    _C.set_isa(level)


def _cuda(path: Path) -> Cuda | Absent:
    if not path.exists():
        return Absent("not built")
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        return Absent(f"{path.name} cannot be opened: {error}")
    count = ctypes.c_int(0)
    code = library.kvstrata_cuda_device_count(ctypes.byref(count))
    if code != 0:
        library.kvstrata_cuda_error_string.restype = ctypes.c_char_p
        return Absent(f"error {code}: {library.kvstrata_cuda_error_string(ctypes.c_int(code)).decode()}")
    if count.value <= 0:
        return Absent("no device")
    return Cuda(count.value, _version(library, "runtime"), _version(library, "driver"))


def _version(library: ctypes.CDLL, of: str) -> str:
    """13000 -> "13.0"."""
    number = ctypes.c_int(0)
    library[f"kvstrata_cuda_{of}_version"](ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def processor() -> str:
    """The processor's name, as the system says it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
