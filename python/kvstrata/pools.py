"""Pages as tensors: formats, page ids, pools of pages, and how all of them cross into the native core.

A page has 16 slots. Quantized formats (int8, int4, int2) store codes and bf16
scales, and need a head dimension that is a multiple of 16 in 32..512.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvstrata import _C
from kvstrata.backend import open_cuda

SLOTS = 16
FORMATS: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
QUANTIZED = ("int8", "int4", "int2")

_POSITION_BYTES = SLOTS * 4
_FORMAT_CODE = {name: i for i, name in enumerate((*FORMATS, *QUANTIZED))}
_DTYPE_CODE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.uint16: 4,
    torch.int32: 5,
    torch.int64: 6,
    torch.uint64: 7,
    torch.int8: 8,
}


def make_page(pool: int, slab: int, index: int) -> int:
    """The i32 page id: 3 bits pool, 12 bits slab, 16 bits page in the slab. -1 means "skip"."""
    for name, value, limit in (("pool", pool, 8), ("slab", slab, 4096), ("index", index, 65536)):
        if not 0 <= value < limit:
            raise ValueError(f"make_page: {name} is {value}, expected 0 to {limit - 1}")
    return pool << 28 | slab << 16 | index


def page_bytes(format: str, head_dim: int) -> int:
    """Bytes of one page's payload. ValueError for an unknown format or a head_dim that it cannot hold."""
    return _C.page_bytes(_format_code("page_bytes", format), head_dim)


def scale_groups(format: str, head_dim: int) -> int:
    """Scales of one vector: how many groups of dimensions share one. 0 for full formats."""
    return _C.scale_groups(_format_code("scale_groups", format), head_dim)


def _format_code(op: str, format: str) -> int:
    if format not in _FORMAT_CODE:
        raise ValueError(f"{op}: format is {format!r}, expected one of {', '.join(_FORMAT_CODE)}")
    return _FORMAT_CODE[format]


@dataclass(frozen=True)
class Pool:
    """Pages of one format. Its place in the `pools` of a call is the pool number of its page ids.

    A slab is one uint8 tensor, 64-byte aligned: the payload of its pages, then their slots' positions (i32 [pages, 16]).
    """

    format: str
    head_dim: int
    slabs: tuple[Tensor, ...]
    pages: tuple[int, ...]  # of each slab

    @classmethod
    def allocate(
        cls, format: str, head_dim: int, pages: int, slabs: int = 1, device: torch.device | str = "cpu"
    ) -> Pool:
        """A pool of `slabs` slabs of `pages` pages each, contents undefined."""
        if not 0 <= pages <= 65536:
            raise ValueError(f"Pool.allocate: pages is {pages}, expected 0 to 65536")
        size = pages * (page_bytes(format, head_dim) + _POSITION_BYTES)
        memory = tuple(torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slabs))
        for slab in memory:
            if slab.device.type == "cpu":
                _C.hint_huge_pages(slab.data_ptr(), size)
        return cls(format, head_dim, memory, (pages,) * slabs)

    @property
    def stride(self) -> int:
        """Bytes from one page to the next."""
        return page_bytes(self.format, self.head_dim)

    def payload(self, slab: int = 0) -> Tensor:
        """The pages of a slab as bytes: uint8 [pages, stride], a view."""
        return self.slabs[slab][: self.pages[slab] * self.stride].view(self.pages[slab], self.stride)

    def positions(self, slab: int = 0) -> Tensor:
        """The positions of a slab's slots: i32 [pages, 16], a view."""
        return self.slabs[slab][self.pages[slab] * self.stride :].view(torch.int32).view(self.pages[slab], SLOTS)

    @cached_property
    def table(self) -> Tensor:
        """Where slabs and their positions begin, for kernels on the slabs' own device: i64 [2, slabs]."""
        starts = [slab.data_ptr() for slab in self.slabs]
        positions = [start + pages * self.stride for start, pages in zip(starts, self.pages, strict=True)]
        return torch.tensor([starts, positions], device=self.slabs[0].device)

    def native(self) -> _C.Pool:
        """This pool as the native core takes it."""
        stride = self.stride
        slabs = []
        for i, (memory, pages) in enumerate(zip(self.slabs, self.pages, strict=True)):
            needed = pages * (stride + _POSITION_BYTES)
            if memory.dtype != torch.uint8 or memory.numel() < needed or not memory.is_contiguous():
                raise ValueError(
                    f"Pool: slab {i} is {memory.dtype} {list(memory.shape)}, expected contiguous torch.uint8 of at least"
                    f" [{needed}] ({pages} pages)"
                )
            slabs.append((memory.data_ptr(), pages, memory.data_ptr() + pages * stride))
        on_host = not self.slabs or device_code("Pool: slab 0", self.slabs[0].device) == 0
        return _FORMAT_CODE[self.format], self.head_dim, stride, slabs, 0 if on_host else self.table.data_ptr()


def native_pools(op: str, pools: Sequence[Pool]) -> list[_C.Pool]:
    for i, pool in enumerate(pools):
        for slab in pool.slabs:
            device_code(f"{op}: pools[{i}]", slab.device)
    return [pool.native() for pool in pools]


def device_code(what: str, device: torch.device) -> int:
    """A device as the native core knows it: 0 the CPU, 1 + i CUDA's device i, whose library is opened."""
    if device.type == "cpu":
        return 0
    if device.type != "cuda":
        raise ValueError(f"{what} is on {device}, expected cpu or cuda")
    open_cuda()
    return 1 + (torch.cuda.current_device() if device.index is None else device.index)


def stream_of(device: torch.device) -> int:
    """The raw stream that work on a device joins; 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def view(op: str, name: str, t: Tensor) -> _C.Tensor:
    if not isinstance(t, Tensor):
        raise ValueError(f"{op}: {name} is a {type(t).__name__}, expected a tensor")
    if t.dtype not in _DTYPE_CODE:
        raise ValueError(f"{op}: {name} has dtype {t.dtype}, expected one of {', '.join(map(str, _DTYPE_CODE))}")
    where = device_code(f"{op}: {name}", t.device), stream_of(t.device)
    return t.data_ptr(), tuple(t.shape), t.stride(), _DTYPE_CODE[t.dtype], *where


def host_view(op: str, name: str, t: Tensor) -> _C.Tensor:
    """Of a tensor on the CPU that the native core reads itself, wherever the op runs."""
    pointer, shape, strides, dtype, *_ = view(op, name, t)
    if t.device.type != "cpu":
        raise ValueError(f"{op}: {name} is on {t.device}, expected cpu")
    return pointer, shape, strides, dtype, 0, 0


def device_number(op: str, name: str, t: Tensor) -> int:
    """Where an op with this tensor runs, as the native core knows it (`device_code`)."""
    return view(op, name, t)[4]


def on_host(op: str, name: str, t: Tensor) -> Tensor:
    """A tensor whose numbers travel by value, wherever the op runs: itself or its copy on the CPU, which is waited for."""
    view(op, name, t)  # refuses what is no tensor
    return t.cpu()


def maybe_view(op: str, name: str, t: Tensor | None) -> _C.Tensor | None:
    return None if t is None else view(op, name, t)


def thread_count(op: str, threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise ValueError(f"{op}: threads is {threads}, expected at least 1")
    return threads
