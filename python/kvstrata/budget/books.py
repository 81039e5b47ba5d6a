"""What a cache holds beside its slabs, at the most: tables, scores, rings, centres, summaries, and what calls work in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstrata import _C
from kvstrata.budget.costs import FAR_PAGE, SCORES, group_block, keeps_scores, page_costs, summary
from kvstrata.budget.protect import ENTRY_BYTES, pages
from kvstrata.config import SLOTS, LayerSpec, Shape
from kvstrata.ops import summary_bytes
from kvstrata.policy.base import Policy, Reading

SLAB = 128
"""Bytes that the books of a slab take."""
_ROW, _ROW_SCORES = 280, 512
"""Bytes that the tables of a row, and its scores, take however few entries it has."""
_BLOCK, _NEAR_COPY = 136, 12
"""Bytes of a row's last block of summaries, beside them, with its place in a list; of a Near copy's place."""
_ATTEND_ROW, _SELECT_ROW, _PLAN_ROW = 160, 136, 32
"""Bytes of what a call says of a row: to attend, to select, and how its work is cut."""
_MATRIX_ROWS = 5
"""Query heads of a row from which on they read pages in matrix tiles (``kMatrixRows``)."""
_HOLD = 4
"""Pages by which the tail of a row may be longer while a step is recorded."""
_LINE, _MANY = 64, 1 << 16
"""Bytes to which the parts of a workspace are rounded; entries from which its bytes for each are found."""


@dataclass(frozen=True)
class Books:
    """What tables, scores, rings, centres and the workspace of decoding take at the most, in bytes. fixed: however few pages
    there are; page, slab: for each of these; work, work_page: of recall, what its calls work in, which else is in ``fixed``."""

    fixed: int = 0
    page: int = 0
    slab: int = 0
    work: int = 0
    work_page: int = 0

    @property
    def apart(self) -> bool:
        """Whether what calls work in is known for itself, and with it all that a step may take."""
        return self.work > 0

    def of(self, pages: int, slabs: int) -> int:
        """Bytes with so many pages and slabs in all."""
        return self.fixed + pages * self.page + slabs * self.slab + self.work + pages * self.work_page

    def most(self, pages: int, slabs: int, tables: int, workspace: int) -> int:
        """Bytes that may yet be with so many pages and slabs, where tables and workspace take so much now."""
        if not self.apart:
            return max(tables + workspace, self.of(pages, slabs))
        tables = max(tables, self.fixed + pages * self.page + slabs * self.slab)
        return tables + max(workspace, self.work + pages * self.work_page)

    @property
    def per_page(self) -> int:
        """Bytes with each page more."""
        return self.page + self.work_page


def books(policy: Policy, shape: Shape, limit: int, batch: int) -> Books:
    """The books of ``batch`` sequences that hold so many bytes at the most."""
    each = (_ROW + (_ROW_SCORES if keeps_scores(policy) else 0)) * shape.rows
    planned = [s for s in shape.layers if s.window is None]
    queries = 2 * policy.queries  # a step's own, too
    each += queries * sum(s.q_heads * s.head_dim * shape.dtype.itemsize for s in planned)
    each += sum(s.kv_heads * (4 * s.head_dim + 64) for s in planned) if policy.formats else 0
    beside = ENTRY_BYTES + (SCORES if keeps_scores(policy) else 0)
    indexed = [s for i, s in enumerate(shape.layers) if s.window is None and i not in policy.dense_layers]
    if not indexed or (policy.selector is None and not policy.archives):
        return Books(batch * each + workspace(policy, shape, limit, batch), beside, SLAB)
    reads = Reading(0, 0) if policy.selector is None else policy.selector.native(policy.sinks, policy.window or SLOTS)
    if policy.selector is not None:
        beside += max(summary(policy, s.head_dim) for s in indexed)
        each += sum(s.kv_heads * (_BLOCK + summary_bytes(s.head_dim, reads.kind)) for s in indexed)
        if limit // beside > reads.flat_pages:  # pages that one row might have
            each += sum(s.kv_heads * group_block(s.head_dim) for s in indexed)
    if policy.archives:
        beside += FAR_PAGE
        each += sum(s.kv_heads for s in indexed) * _NEAR_COPY * _doubled(reads.near_pages)
    work = max(_recalling(policy, s, batch, reads) for s in set(indexed))
    reads_all = reads.audit > 0 or reads.oracle > 0  # a row at a time, beside the parts
    if len(indexed) < len(shape.layers) or reads_all:
        work = (work if reads_all else 0) + max(work, workspace(policy, shape, limit, batch))
    return Books(batch * each, beside, SLAB, work, _recalling_page(policy, indexed, batch, reads))


class LastBooks:
    """The books of :func:`books` as they were last asked for, found anew where that has changed: every step asks."""

    def __init__(self) -> None:
        self.asked: tuple[int, Policy, Shape, int, int] | None = None
        self._found = Books()

    def of(self, policy: Policy, shape: Shape, limit: int, batch: int) -> Books:
        asked = limit, policy, shape, batch, torch.get_num_threads()
        if asked != self.asked:
            self._found, self.asked = books(policy, shape, limit, batch), asked
        return self._found


def _doubled(n: int) -> int:
    """Places of a list that has grown to n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


# --- what calls work in -----------------------------------------------------------------------------------------------------


def workspace(policy: Policy, shape: Shape, limit: int, batch: int) -> int:
    """Of decoding over all that a row holds: partial results of each row's chunks of 8 pages, as many pages as the limit may
    buy; by thread, queries, logits of a block of pages and half a decoded page (``csrc/cpu/attend_plan.cpp``)."""
    rows = batch * shape.rows
    most = 0
    for i, s in shape.kinds:
        entries = limit // (rows * min(page_costs(shape, i, policy).values())) + 1
        mass = _group(s) * (entries * SLOTS + 1) * 4 if policy.massed else 0
        most = max(most, _attending(s, batch, entries, mass))
    return most


def _attending(s: LayerSpec, batch: int, entries: int, more: int = 0) -> int:
    """Bytes in which a step of one token attends to so many entries of each row of a layer; more: of a row beside."""
    group, dim = _group(s), -(-s.head_dim // 16) * 16
    partial = max(-(-entries // 64), min(128, -(-entries // 8))) * (group * (dim + 1) * 4 + 64)
    scratch = (group * (4 * dim + 288) + SLOTS * dim) * 4 + 512 + _operands(group, dim)
    return batch * s.kv_heads * (_PLAN_ROW + partial + more) + torch.get_num_threads() * scratch


def _operands(group: int, dim: int) -> int:
    """Bytes by thread of what matrix tiles read, at a level that has them and with query heads enough (``operand_bytes``)."""
    if group < _MATRIX_ROWS or not _C.isa().startswith("amx"):
        return 0
    return group * (4 * (dim + 16) + 2 * dim + 1) + 256 * dim + 3 * _LINE


def _recalling(policy: Policy, s: LayerSpec, batch: int, reads: Reading) -> int:
    """Bytes in which a step of one token selects pages and attends in parts, however long its rows are: the largest of its
    workspaces, and the parts with their lists (``csrc/store/recall.cpp``, Parts)."""
    group, dim, rows, widest = _group(s), s.head_dim, batch * s.kv_heads, reads.widest
    grown = s.kv_heads * max(batch, 2 * (batch - 1))  # places of what was enlarged for more rows
    steady = pages(policy.sinks) + pages(policy.window or SLOTS) + 2 + _HOLD
    longest = max(widest, steady)
    parts = (3 if reads.estimate else 2) * group * (dim + 1) * 4 + group * 4 + _SELECT_ROW
    parts += widest * (4 + (4 * (group + 1) if reads.most else 0) + (8 if reads.estimate else 0))
    lists = _ATTEND_ROW * rows + (2 * 8 + 4) * _doubled(rows) + 8 * _doubled(rows + 1) + 6 * _doubled(rows * longest)
    lists += _doubled(rows) + (8 * _doubled(rows) * (widest + 1) if reads.reuse > 1 else 0)  # of what layers follow
    most = _attending(s, batch, longest)
    if policy.selector is not None:
        most = max(most, _scanning(s, batch, SLOTS, reads)[0], _scanning(s, batch, widest + SLOTS, reads)[1])
    return most + 2 * _LINE + grown * parts + lists + 12 * _doubled(widest)


def _recalling_page(policy: Policy, indexed: list[LayerSpec], batch: int, reads: Reading) -> int:
    """Bytes for each page of the cache, of which a row holds no more than its part: a thread's logits of the row's entries, the
    list of those that are read through the ring, and those of the rows of a layer that stand in by their means."""
    lists = (12 if policy.archives else 0) + (12 if reads.audit > 0 or reads.oracle > 0 else 0)
    entry = lists
    if policy.selector is not None:
        for i, share in enumerate((1.0, reads.estimate)):
            many, none = (max(_scanning(s, batch, n, reads)[i] for s in indexed) for n in (_MANY, 0))
            entry = max(entry, lists + int((many - none) / _MANY * share) + 1)
    each = -(-entry // sum(s.kv_heads for s in indexed))
    return each + int(8 * reads.estimate / len(indexed) + 1) if reads.estimate else each


def _scanning(s: LayerSpec, batch: int, entries: int, reads: Reading) -> tuple[int, int]:
    """Bytes in which pages are selected among so many entries of each row of a layer, and in which so many stand in."""
    rows, threads = batch * s.kv_heads, torch.get_num_threads()
    room = min(threads, rows) * 6 * _LINE
    select: int = _C.select_workspace_bytes(rows, _group(s), s.head_dim, entries, threads, 0)
    if not reads.estimate:
        return select + room, room
    estimate: int = _C.estimate_workspace_bytes(rows, _group(s), s.head_dim, entries, threads, 0)
    return select + room, estimate + room


def _group(s: LayerSpec) -> int:
    return s.q_heads // s.kv_heads
