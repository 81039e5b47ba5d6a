"""The native core. Tensors cross as (pointer, shape, strides in elements, dtype, device): plain ints."""

from collections.abc import Sequence
from typing import TypedDict

Tensor = tuple[int, tuple[int, ...], tuple[int, ...], int, int]
Slab = tuple[int, int, int]  # pointer, pages, pointer to positions
Pool = tuple[int, int, int, Sequence[Slab]]  # format, head_dim, stride in bytes, slabs

class Invalid(ValueError): ...
class Unsupported(ValueError): ...
class MachineError(RuntimeError): ...

class Settings(TypedDict):
    isa: str
    check: bool
    log: str

class Supported(TypedDict):
    tuned_dims: list[int]
    max_head_dim: int
    max_group: int
    formats: list[str]
    quantized: list[str]
    min_quantized_dim: int

class AttendTensors(TypedDict):
    q: Tensor
    pages: Tensor
    visible: Tensor | None
    bias: Tensor | None
    centre: Tensor | None
    sinks: Tensor | None
    own: Tensor | None
    tree: Tensor | None
    q_pos: Tensor | None
    out: Tensor
    lse: Tensor | None
    want_logits: Tensor | None
    workspace: Tensor | None

class WindowTensors(TypedDict):
    q: Tensor
    pages: Tensor
    q_pos: Tensor | None
    queries: Tensor | None
    visible: Tensor | None
    centre: Tensor | None
    sinks: Tensor | None
    workspace: Tensor

class ScoreTensors(WindowTensors):
    score: Tensor
    lse: Tensor

class MeasureTensors(WindowTensors):
    out: Tensor

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
def attend_workspace_bytes(rows: int, queries: int, group: int, head_dim: int, entries: int, threads: int) -> int: ...
def attend(
    tensors: AttendTensors, pools: Sequence[Pool], scale: float, softcap: float, window: int, threads: int
) -> None: ...
def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor | None, threads: int) -> None: ...
def mass(logits: Tensor, lse: Tensor, out: Tensor, reduce: int, threads: int) -> None: ...
def pack(pages: Tensor, k: Tensor, v: Tensor, scales: Tensor | None, pools: Sequence[Pool], threads: int) -> None: ...
def unpack(pages: Tensor, k: Tensor, v: Tensor, scales: Tensor | None, pools: Sequence[Pool], threads: int) -> None: ...
def rotate(x: Tensor, out: Tensor, inverse: bool, threads: int) -> None: ...
def quantize(
    moves: Tensor, pools: Sequence[Pool], centre: Tensor | None, row_of: Tensor | None, threads: int
) -> None: ...
def dequantize(
    pages: Tensor,
    k: Tensor,
    v: Tensor,
    pools: Sequence[Pool],
    centre: Tensor | None,
    row_of: Tensor | None,
    threads: int,
) -> None: ...
def compact(moves: Tensor, pools: Sequence[Pool], threads: int) -> None: ...
def score_window_workspace_bytes(
    rows: int, queries: int, group: int, head_dim: int, entries: int, threads: int
) -> int: ...
def score_window(
    tensors: ScoreTensors,
    pools: Sequence[Pool],
    scale: float,
    softcap: float,
    window: int,
    spread: int,
    weight: float,
    threads: int,
) -> None: ...
def measure_workspace_bytes(rows: int, queries: int, group: int, head_dim: int, entries: int, threads: int) -> int: ...
def measure(
    tensors: MeasureTensors,
    pools: Sequence[Pool],
    scale: float,
    softcap: float,
    window: int,
    which: int,
    skip: int,
    threads: int,
) -> None: ...
def pool_workspace_bytes(entries: int, threads: int) -> int: ...
def pool(
    score: Tensor,
    pages: Tensor,
    visible: Tensor | None,
    out: Tensor,
    workspace: Tensor,
    pools: Sequence[Pool],
    kernel: int,
    kind: int,
    divide: int,
    threads: int,
) -> None: ...
def accumulate(score: Tensor, mass: Tensor, decay: float, combine: int, threads: int) -> None: ...
def score_keys_workspace_bytes(rows: int, head_dim: int, entries: int, kind: int, threads: int) -> int: ...
def score_keys(
    pages: Tensor,
    visible: Tensor | None,
    centre: Tensor | None,
    out: Tensor,
    workspace: Tensor,
    pools: Sequence[Pool],
    head_dim: int,
    kind: int,
    threads: int,
) -> None: ...
def summary_bytes(head_dim: int, kind: int) -> int: ...
def cluster_workspace_bytes(rows: int, tokens: int, head_dim: int, threads: int) -> int: ...
def cluster(
    keys: Tensor,
    live: Tensor | None,
    page_of: Tensor,
    pages: Tensor,
    workspace: Tensor,
    iters: int,
    threads: int,
) -> None: ...
def cluster_greedy_workspace_bytes(rows: int, tokens: int, head_dim: int, threads: int) -> int: ...
def cluster_greedy(
    keys: Tensor, live: Tensor | None, page_of: Tensor, pages: Tensor, workspace: Tensor, threads: int
) -> None: ...
def summarize(
    pages: Tensor,
    visible: Tensor | None,
    centre: Tensor | None,
    blocks: Tensor,
    pools: Sequence[Pool],
    head_dim: int,
    kind: int,
    threads: int,
) -> None: ...
def select_workspace_bytes(rows: int, group: int, head_dim: int, entries: int, threads: int) -> int: ...
def score_pages(
    q: Tensor,
    blocks: Tensor,
    visible: Tensor,
    x: Tensor,
    workspace: Tensor,
    scale: float,
    spread_weight: float,
    softcap: float,
    kind: int,
    threads: int,
) -> None: ...
def select(
    q: Tensor,
    blocks: Tensor,
    visible: Tensor,
    k: Tensor,
    lse_base: Tensor | None,
    entries: Tensor,
    count: Tensor,
    lse_rest: Tensor,
    zone: Tensor | None,
    workspace: Tensor,
    scale: float,
    spread_weight: float,
    softcap: float,
    kind: int,
    aggregate: int,
    mass: float,
    least: int,
    threads: int,
) -> None: ...
def estimate_workspace_bytes(rows: int, group: int, head_dim: int, zone: int, threads: int) -> int: ...
def estimate(
    q: Tensor,
    blocks: Tensor,
    visible: Tensor,
    zone: Tensor,
    out: Tensor,
    lse: Tensor,
    workspace: Tensor,
    scale: float,
    spread_weight: float,
    softcap: float,
    threads: int,
) -> None: ...
def choose_states_workspace_bytes(tokens: int, threads: int) -> int: ...
def choose_states(
    score: Tensor,
    now: Tensor,
    positions: Tensor,
    protect: Tensor,
    full_pages: Tensor,
    quant_pages: Tensor,
    out: Tensor,
    workspace: Tensor,
    quantized_state: int,
    threads: int,
) -> None: ...
def most_chunks(tokens: int) -> int: ...
def chunk_order_workspace_bytes(tokens: int, threads: int) -> int: ...
def chunk_order(
    value: Tensor, kind: Tensor, pos: Tensor, order: Tensor, w: Tensor, items: Tensor, workspace: Tensor, threads: int
) -> None: ...
def choose_chunks_workspace_bytes(items: int, steps: int, ladders: int) -> int: ...
def choose_chunks(
    w: Tensor, ladder: Tensor, cost: Tensor, fidelity: Tensor, budget: int, step: Tensor, workspace: Tensor
) -> tuple[float, int]: ...
def page_bytes(format: int, head_dim: int) -> int: ...
def hint_huge_pages(data: int, bytes: int) -> None: ...
def scale_groups(format: int, head_dim: int) -> int: ...
def supported() -> Supported: ...

# --- the store
_Recall = tuple[int, int, float, int, int, int, float, int, float, int, int]
_Strides = tuple[int, int, int, int]  # address, elements per sequence, per token, per head

class Store:
    def __init__(
        self,
        layers: list[tuple[int, int, int, int]],
        dtype: int,
        tail: int,
        hold: int,
        sinks: int,
        formats: list[int] = ...,
        queries: int = ...,
        scored: bool = ...,
        massed: bool = ...,
        recall: _Recall = ...,
        dense: list[int] = ...,
        far: list[int] = ...,
        ring: int = ...,
    ) -> None: ...
    @property
    def n_pools(self) -> int: ...
    @property
    def metadata_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def in_step(self) -> bool: ...
    @property
    def longest(self) -> int: ...
    def pool(self, pool: int) -> dict[str, int]: ...
    def pool_of(self, layer: int, state: int = ..., tier: int = ...) -> int: ...
    def slabs(self, pool: int) -> list[tuple[int, int, int]]: ...
    def lend(self, pool: int, payload: int, positions: int, n_pages: int) -> int: ...
    def lend_far(self, pool: int, file: int, offset: int, positions: int, n_pages: int) -> int: ...
    def ring_pages(self) -> list[int]: ...
    def hold_ring(self) -> None: ...
    def shrink_ring(self, pages: int) -> None: ...
    def shrink_near(self) -> bool: ...
    def set_recall(self, recall: _Recall) -> None: ...
    def set_mass_floor(self, floor: float) -> None: ...
    def audited(self) -> tuple[float, float, int]: ...
    def captured(self) -> tuple[float, float, int, int]: ...
    def fetched(self) -> tuple[int, int]: ...
    def waiting(self, layer: int, seqs: list[int]) -> tuple[int, int]: ...
    def cluster(
        self, layer: int, seqs: list[int], segment: int, group: int, columns: int, iters: int, threads: int
    ) -> None: ...
    def give_back(self, pool: int, slab: int) -> None: ...
    def empty_out(self, pool: int, slab: int) -> bool: ...
    def create(self, n: int) -> list[int]: ...
    def free(self, seqs: list[int]) -> None: ...
    def fork(self, parent: int, n: int) -> list[int]: ...
    def select(self, seqs: list[int], index: list[int]) -> list[int]: ...
    def crop(self, seq: int, length: int) -> None: ...
    def clear(self, seq: int) -> None: ...
    def confirm(self, seq: int) -> None: ...
    def refit(self, tail: int, queries: int) -> None: ...
    def set_recording(self, on: bool) -> None: ...
    def length(self, seq: int) -> int: ...
    def floor(self, seq: int) -> int: ...
    def stored(self, seq: int, layer: int, head: int) -> int: ...
    def columns(self, layer: int, seqs: list[int]) -> int: ...
    def look(self, layer: int, seqs: list[int], *where: int) -> None:
        """where: addresses of positions, open, state, scores, tier, grouped and entry, 0: none; last, columns."""

    def tally(self, layer: int, seqs: list[int]) -> tuple[list[int], int, int]: ...
    def row(self, seq: int, layer: int, head: int) -> tuple[list[int], list[int], list[int], int]: ...
    def positions(self, seq: int, layer: int, head: int, out: int) -> None: ...
    def read(self, seq: int, layer: int, head: int, k: int, v: int) -> None: ...
    def begin(self, seqs: list[int], starts: list[int], tokens: list[int]) -> None: ...
    def needed(self, first_layer: int, last_layer: int, first: int, last: int) -> list[int]: ...
    def missing(self, first_layer: int, last_layer: int, first: int, last: int) -> list[int]: ...
    def append(self, layer: int, k: _Strides, v: _Strides, first: int, last: int, threads: int) -> None: ...
    def attend(
        self,
        layer: int,
        q: _Strides,
        out: _Strides,
        lse: _Strides,
        sinks: int,
        out_dtype: int,
        scale: float,
        softcap: float,
        threads: int,
    ) -> None: ...
    def append_attend(
        self,
        layer: int,
        q: _Strides,
        k: _Strides,
        v: _Strides,
        out: _Strides,
        lse: _Strides,
        sinks: int,
        out_dtype: int,
        scale: float,
        softcap: float,
        threads: int,
    ) -> None: ...
    def stage_queries(self, layer: int, q: _Strides) -> None: ...
    def add_mass(
        self, layer: int, q: _Strides, first: int, last: int, scale: float, softcap: float, threads: int
    ) -> None: ...
    def settle(self, layer: int) -> None: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def set_scores(self, layer: int, seqs: list[int], scores: int, columns: int) -> None: ...
    def queries(self, layer: int, seq: int, out: int) -> int: ...
    def score_window(
        self,
        layer: int,
        seqs: list[int],
        queries: int,
        spread: int,
        weight: float,
        scale: float,
        softcap: float,
        out: int,
        columns: int,
    ) -> None: ...
    def measure(
        self, layer: int, seqs: list[int], queries: int, which: int, scale: float, softcap: float, out: int
    ) -> None: ...
    def score_pages(
        self, layer: int, seqs: list[int], queries: int, scale: float, softcap: float, out: int, columns: int
    ) -> None: ...
    def score_keys(self, layer: int, seqs: list[int], kind: int, out: int, columns: int) -> None: ...
    def pool_scores(
        self,
        layer: int,
        seqs: list[int],
        score: int,
        group: int,
        columns: int,
        kernel: int,
        kind: int,
        divide: int,
        out: int,
    ) -> None: ...
    def check_plan(
        self, layer: int, seqs: list[int], state: int, tier: int, group: int, columns: int, protect: bool
    ) -> None: ...
    def plan_piece(
        self, layer: int, seq: int, head: int, state: int, tier: int, group: int, cost: list[int], spare: int
    ) -> tuple[int, int, list[int]]: ...
    def apply_plan(self, layer: int, seq: int, head: int, state: int, tier: int, group: int, most: int) -> bool: ...

def arm_fault(point: str, nth: int) -> None: ...
def disarm_fault() -> None: ...
def fault_visits() -> int: ...
