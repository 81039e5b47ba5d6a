"""merge on CUDA: time and share of the copy bandwidth measured in the same run.

python bench/cuda/merge.py [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import statistics
from pathlib import Path

import torch

CASES = [(4096, 2, 128), (4096, 8, 128), (32768, 8, 128)]  # results N, partials J, head dim D


class MergeParams(ctypes.Structure):
    """csrc/ops/merge.h, field by field."""

    _fields_ = (
        ("outs", ctypes.POINTER(ctypes.c_void_p)),
        ("lses", ctypes.POINTER(ctypes.c_void_p)),
        ("parts", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("head_dim", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_uint8),
        ("lse", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
    )


def open_library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("kvstrata")
    assert spec is not None and spec.submodule_search_locations, "kvstrata is not installed"
    return ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / "libkvstrata_cuda.so"))


def timed(call, reps: int = 50) -> list[float]:
    """Milliseconds per call by CUDA events, after a warm-up."""
    for _ in range(5):
        call()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in marks)


def copy_gbps() -> float:
    """Bytes read plus written per second by a device-to-device copy of 1 GiB."""
    a = torch.empty(2**28, device="cuda").normal_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / statistics.median(timed(lambda: b.copy_(a), 20)) / 1e6


def case(lib: ctypes.CDLL, n: int, parts: int, dim: int, peak: float) -> dict[str, object]:
    outs = torch.randn(parts, n, dim, device="cuda")
    lses = torch.randn(parts, n, device="cuda")
    out, lse = torch.empty(n, dim, device="cuda"), torch.empty(n, device="cuda")
    pointers = ctypes.c_void_p * parts
    call = MergeParams(
        pointers(*[o.data_ptr() for o in outs]),
        pointers(*[x.data_ptr() for x in lses]),
        parts,
        n,
        dim,
        out.data_ptr(),
        0,
        lse.data_ptr(),
        1,
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    ms = timed(lambda: lib.kvstrata_cuda_merge(ctypes.byref(call), stream))
    plain = timed(lambda: (outs * torch.softmax(lses, 0)[..., None]).sum(0))
    moved = outs.nbytes + lses.nbytes + out.nbytes + lse.nbytes
    gbps = moved / statistics.median(ms) / 1e6
    return {
        "kind": "merge",
        "n": n,
        "parts": parts,
        "head_dim": dim,
        "bytes": moved,
        "ms_p50": statistics.median(ms),
        "gbps": gbps,
        "share_copy": gbps / peak,
        "baseline": {"name": "torch softmax and sum", "ms_p50": statistics.median(plain)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    peak = copy_gbps()
    lib = open_library()
    rows = [case(lib, *shape, peak) for shape in CASES]
    for row in rows:
        print(f"N={row['n']} J={row['parts']} D={row['head_dim']}: {row['ms_p50']:.4f} ms", end=", ")
        print(f"{row['gbps']:.0f} GB/s, {row['share_copy']:.0%} of copy, torch {row['baseline']['ms_p50']:.4f} ms")
    run = {"device": torch.cuda.get_device_name(), "copy_gbps": peak, "torch": torch.__version__}
    if args.json:
        args.json.write_text(json.dumps({"schema": 1, "run": run, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
