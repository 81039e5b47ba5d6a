"""Where a bench runs: what takes the times of calls there, and how fast that device's memory is.

On the CPU a call is done when it returns. On CUDA events stand before and behind each call; a kernel that waits is put
ahead of them, so that the host has handed in the whole call before the first event: short calls are timed as the device
works, not as the host hands in. What a call takes of the host is `host`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvstrata import _C
from kvstrata.backend import Absent, backends
from kvstrata.config import Unsupported

DEVICES = ("cpu", "cuda")
WARM = 2
"""Rounds before the measured ones."""
READS: tuple[tuple[torch.dtype, Callable[[Tensor], Tensor]], ...] = (
    (torch.int64, torch.max),
    (torch.float32, torch.sum),
    (torch.int32, torch.amax),
    (torch.uint8, torch.max),
)
"""Reductions that read memory about as fast as the machine does."""
Call = Callable[[int], object]  # given the number of the repetition, to choose a buffer by


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Times:
        at = sorted(milliseconds)
        return cls(*(at[min(len(at) - 1, int(share * len(at)))] for share in (0.1, 0.5, 0.9)))

    def row(self) -> dict[str, float]:
        return {"ms_p10": self.p10, "ms_p50": self.p50, "ms_p90": self.p90}


class Clock:
    """The CPU's."""

    device = torch.device("cpu")
    least_bytes, largest = 64 << 20, 1 << 30
    """Of the memory that bandwidth is measured over: its size, and what stands in it."""
    reads = READS

    def reps(self, on_cpu: int) -> int:
        """Repetitions where the user names none, and so many are enough on the CPU."""
        return on_cpu

    def measure(self, calls: Sequence[Call], reps: int) -> list[Times]:
        """Times of each call; they alternate, so that all meet the same machine."""
        return [Times.of(taken) for taken in self._milliseconds(calls, reps)]

    def _milliseconds(self, calls: Sequence[Call], reps: int) -> list[list[float]]:
        taken: list[list[float]] = [[] for _ in calls]
        for rep in range(-WARM, reps):
            for call, into in zip(calls, taken, strict=True):
                start = time.perf_counter()
                call(rep)
                if rep >= 0:
                    into.append(1e3 * (time.perf_counter() - start))
        return taken

    def whole(self, call: Callable[[], object]) -> float:
        """Milliseconds from the call until all of its work is done, as its caller sees it."""
        start = time.perf_counter()
        call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def host(self, call: Callable[[], object], reps: int) -> Times:
        """Of a call until it returns, with nothing before it left to be done."""
        taken = []
        for rep in range(-WARM, reps):
            self.wait()
            start = time.perf_counter()
            call()
            if rep >= 0:
                taken.append(1e3 * (time.perf_counter() - start))
        return Times.of(taken)

    def wait(self) -> None:
        """Until nothing is left to be done."""

    def last_level_cache(self) -> int:
        """Bytes; 32 MiB where the system does not say."""
        sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max((int(s[:-1]) * {"K": 1024, "M": 1 << 20}[s[-1]] for s in sizes), default=32 << 20)

    def buffers(self, bytes_each: int) -> int:
        """How many buffers of this size make four times the last-level cache."""
        return max(2, math.ceil(4 * self.last_level_cache() / max(bytes_each, 1)))

    def bandwidth(self, reps: int = 9) -> dict[str, float]:
        """GB/s of reading and of copying (read plus written), medians, over memory of twice the last-level cache.

        Reading is the best of `reads`. On a Zen 4 of two cores all four read 26 to 27 GB/s; other sums and maxima (f64, 16
        bit) 22 to 26, a sum of int32 1. Which one is fastest depends on what torch vectorizes for the processor.
        """
        size = max(self.least_bytes, 2 * self.last_level_cache())
        source = [torch.randint(0, self.largest, (size // 8,), device=self.device) for _ in range(2)]
        target = torch.empty_like(source[0])
        reads = [_reading([s.view(dtype) for s in source], reduction) for dtype, reduction in self.reads]
        *read, copy = self.measure([*reads, lambda i: target.copy_(source[i % 2])], self.reps(reps))
        return {"read_gbps": size / min(t.p50 for t in read) / 1e6, "copy_gbps": 2 * size / copy.p50 / 1e6}

    def free_bytes(self) -> int:
        """Memory that is free now."""
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
        return 8 << 30

    def facts(self) -> dict[str, Any]:
        """What a run says of its device."""
        return {
            "backend": "cpu",
            "isa": _C.isa(),
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "threads_source": _C.threads_source(),
        }


class CudaClock(Clock):
    """Of CUDA's current device."""

    least_bytes, largest = 1 << 30, 1 << 62
    reads = (*READS, (torch.bfloat16, lambda x: torch.mv(x.view(-1, 8192), x[:8192])))
    AHEAD_CYCLES_PER_MS = 2_000_000
    """Of a multiprocessor, at the most: a slower one waits longer."""
    AHEAD_MS = (0.02, 5.0)

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def reps(self, on_cpu: int) -> int:
        return max(on_cpu, 100)

    def _milliseconds(self, calls: Sequence[Call], reps: int) -> list[list[float]]:
        ahead = [self._ahead(call) for call in calls]
        marks: list[list[tuple[Any, Any]]] = [[] for _ in calls]
        for rep in range(reps):
            for call, cycles, into in zip(calls, ahead, marks, strict=True):
                begin, end = _event(), _event()
                _sleep(cycles)
                begin.record()
                call(rep)
                end.record()
                into.append((begin, end))
        self.wait()
        return [[begin.elapsed_time(end) for begin, end in pairs] for pairs in marks]

    def _ahead(self, call: Call) -> int:
        """Warms a call up. Cycles in which the host hands it in, twice over."""
        taken = 0.0
        for rep in range(-WARM, 0):
            self.wait()
            start = time.perf_counter()
            call(rep)
            taken = 1e3 * (time.perf_counter() - start)  # the first one loads the kernels
        low, high = self.AHEAD_MS
        return int(min(max(2 * taken, low), high) * self.AHEAD_CYCLES_PER_MS)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def last_level_cache(self) -> int:
        return int(self._properties().L2_cache_size)

    def free_bytes(self) -> int:
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + kept  # what torch keeps is free too

    def facts(self) -> dict[str, Any]:
        found = self._properties()
        return {
            "backend": "cuda",
            "isa": f"sm_{found.major}{found.minor}",
            "device": "cuda",
            "threads": torch.get_num_threads(),
            "name": found.name,
            "multiprocessors": found.multi_processor_count,
            "cache_bytes": self.last_level_cache(),
            "memory_bytes": found.total_memory,
            "torch_cuda": torch.version.cuda,
        }

    def _properties(self) -> Any:
        return torch.cuda.get_device_properties(self.device)


def clock_of(device: str) -> Clock:
    """Of "cpu" or "cuda". Unsupported, with the reason, where there is no CUDA device, or no library for it."""
    if device == "cpu":
        return Clock()
    found = backends()["cuda"]
    if isinstance(found, Absent):
        raise Unsupported(f"bench: device is 'cuda', expected a CUDA library that runs here: {found.reason}")
    if not torch.cuda.is_available():
        raise Unsupported(
            f"bench: device is 'cuda', expected a torch that sees it: torch {torch.__version__}, built for CUDA"
            f" {torch.version.cuda}, says that none is available"
        )
    return CudaClock()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _sleep(cycles: int) -> None:
    """A kernel that does nothing for so long; torch times itself with it."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def _reading(source: Sequence[Tensor], reduction: Callable[[Tensor], Tensor]) -> Call:
    return lambda i: reduction(source[i % len(source)])
