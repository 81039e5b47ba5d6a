"""What `kvstrata doctor` says of CUDA: the library, the driver, the devices, and what is missing, with the way to it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from kvstrata import ops
from kvstrata.backend import Absent, Cuda, backends, cuda_library
from kvstrata.cli.bench.clock import clock_of

Row = tuple[str, str, str]
DRIVER = Path("/proc/driver/nvidia/version")
WAYS = {
    "not built": "install from source with nvcc 12.8 or newer on PATH: pip install -C cmake.define.KVSTRATA_CUDA=on .",
    "cannot be opened": "install again: the library does not go with this system",
    "error 35": "install the NVIDIA driver, of release 580 or newer",
    "error 100": "no NVIDIA device is visible here: look at CUDA_VISIBLE_DEVICES and nvidia-smi",
    "no device": "no NVIDIA device is visible here: look at CUDA_VISIBLE_DEVICES and nvidia-smi",
}
"""What to do about why the backend is absent, by a part of the reason."""


def examine() -> dict[str, Any]:
    """As plain data. `missing`: sentences, empty where all is here."""
    path, found = cuda_library(), backends()["cuda"]
    with_torch = torch.cuda.is_available()
    seen: dict[str, Any] = {
        "library": str(path) if path.exists() else None,
        "library_bytes": path.stat().st_size if path.exists() else None,
        "runtime": found.runtime if isinstance(found, Cuda) else None,
        "driver": found.driver if isinstance(found, Cuda) else None,
        "kernel_module": DRIVER.read_text().splitlines()[0].strip() if DRIVER.exists() else None,
        "torch_cuda": torch.version.cuda,
        "devices": [device(i) for i in range(torch.cuda.device_count())] if with_torch else [],
        "lacking_ops": [] if isinstance(found, Absent) else lacking_ops(path),
        "missing": list(missing(found, with_torch)),
    }
    if not seen["missing"]:
        seen["bandwidth"] = {k: round(v, 1) for k, v in clock_of("cuda").bandwidth().items()}
    return seen


def missing(found: Any, with_torch: bool) -> list[str]:
    """What keeps CUDA from being used, and what to do about it."""
    said = []
    if isinstance(found, Absent):
        ways = [way for part, way in WAYS.items() if part in found.reason]
        said.append(f"CUDA library: {found.reason}" + (f"; {ways[0]}" if ways else ""))
    if torch.version.cuda is None:
        said.append(f"torch {torch.__version__} is built without CUDA; install a build of torch for CUDA")
    elif not with_torch:
        said.append(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no device")
    return said


def device(index: int) -> dict[str, Any]:
    """As torch sees it. free_bytes: now, on the whole device."""
    facts = torch.cuda.get_device_properties(index)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "cache_bytes": facts.L2_cache_size,
        "memory_bytes": facts.total_memory,
        "free_bytes": torch.cuda.mem_get_info(index)[0],
    }


def lacking_ops(path: Path) -> list[str]:
    """Ops that this library does not have."""
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    names = [n for n in ops.__all__ if callable(getattr(ops, n)) and n.islower() and not n.endswith("_bytes")]
    no_ops = {"make_page", "scale_groups"}
    return [n for n in names if n not in no_ops and not hasattr(library, f"kvstrata_cuda_{n}")]


def rows(seen: dict[str, Any]) -> list[Row]:
    """For people."""
    from kvstrata.cli.output import bytes_text

    found: list[Row] = [
        ("cuda", k.replace("_", " "), str(seen[k])) for k in ("library", "driver", "torch_cuda") if seen[k]
    ]
    if seen["runtime"]:
        found.append(("cuda", "runtime of the library", seen["runtime"]))
    if seen["kernel_module"]:
        found.append(("cuda", "kernel module", seen["kernel_module"]))
    for i, d in enumerate(seen["devices"]):
        memory = f"{bytes_text(d['free_bytes'])} of {bytes_text(d['memory_bytes'])} free"
        text = f"{d['name']}, capability {d['capability']}, {d['multiprocessors']} multiprocessors, {memory}"
        found.append(("cuda", f"device {i}", text))
    if seen["lacking_ops"]:
        found.append(("cuda", "ops not in the library", ", ".join(seen["lacking_ops"])))
    if "bandwidth" in seen:
        speed = seen["bandwidth"]
        found.append(("cuda", "memory", f"copy {speed['copy_gbps']} GB/s, read {speed['read_gbps']} GB/s"))
    return found + [("cuda", "missing", sentence) for sentence in seen["missing"]]
