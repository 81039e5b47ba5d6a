"""The native core. Tensors cross as (pointer, shape, strides in elements, dtype, device): plain ints."""

from collections.abc import Sequence
from typing import TypedDict

Tensor = tuple[int, tuple[int, ...], tuple[int, ...], int, int]
Slab = tuple[int, int, int]  # pointer, pages, pointer to positions
Pool = tuple[int, int, int, Sequence[Slab]]  # format, head_dim, stride in bytes, slabs

class Invalid(ValueError): ...
class Unsupported(ValueError): ...

class Settings(TypedDict):
    isa: str
    check: bool
    log: str

class Supported(TypedDict):
    tuned_dims: list[int]
    max_head_dim: int
    max_group: int
    formats: list[str]

class AttendTensors(TypedDict):
    q: Tensor
    pages: Tensor
    visible: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    own: Tensor | None
    tree: Tensor | None
    q_pos: Tensor | None
    out: Tensor
    lse: Tensor | None
    want_logits: Tensor | None
    workspace: Tensor | None

# --- instruction sets, threads, settings
def isa() -> str: ...
def isa_levels() -> list[tuple[str, bool, str, str]]: ...
def set_isa(level: str) -> None: ...
def threads_source() -> str: ...
def prefer_own_pool(own: bool) -> None: ...
def settings() -> Settings: ...

# --- ops
def append(
    k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, pools: Sequence[Pool], position: Tensor, threads: int
) -> None: ...
def attend_workspace_bytes(
    rows: int, queries: int, group: int, head_dim: int, entries: int, threads: int
) -> int: ...
def attend(
    tensors: AttendTensors, pools: Sequence[Pool], scale: float, softcap: float, window: int, threads: int
) -> None: ...
def merge(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor | None, threads: int
) -> None: ...
def mass(logits: Tensor, lse: Tensor, out: Tensor, reduce: int, threads: int) -> None: ...
def pack(pages: Tensor, k: Tensor, v: Tensor, pools: Sequence[Pool], threads: int) -> None: ...
def unpack(pages: Tensor, k: Tensor, v: Tensor, pools: Sequence[Pool], threads: int) -> None: ...
def page_bytes(format: int, head_dim: int) -> int: ...
def supported() -> Supported: ...
