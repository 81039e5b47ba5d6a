"""Pages of the Far tier that stay in a file of others until they are read: a conversation's, on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstrata import _C
from kvstrata.config import SLOTS
from kvstrata.slabs import Slabs

_SLAB_BITS, _INDEX_BITS = 12, 16


@dataclass(frozen=True, eq=False)
class PageFile:
    """Pages of one kind that lie one behind the other in a file that is open for reading.

    name: of the file, for errors; offset: bytes before the first page; positions: i32 [n, 16]; sums: i64 [n], :func:`checksums`
    of the pages as they were written.
    """

    name: str
    descriptor: int
    offset: int
    positions: Tensor
    sums: Tensor


def checksums(payload: Tensor) -> Tensor:
    """Of pages u8 [n, page bytes]: i64 [n], by which a read of the Far tier is checked."""
    payload, out = payload.contiguous(), torch.empty(len(payload), dtype=torch.int64)
    _C.checksums(payload.data_ptr(), payload.shape[1], len(payload), out.data_ptr())
    return out


def lend(slabs: Slabs, pool: int, file: PageFile, places: Sequence[int]) -> list[int]:
    """A slab of pages of a Far pool, those at ``places`` of a file: their ids. The file is read, never written, and its bytes
    are no tier's; positions are in memory. BudgetExceeded without room for these."""
    at, n = torch.tensor(places), len(places)
    slabs._fit(pool, n, n, [0] * slabs._store.n_pools)
    positions, sums = file.positions[at].contiguous(), file.sums[at].numpy().view("uint64").tolist()
    assert positions.shape == (n, SLOTS)
    hold = slabs._charges.lend(positions.nbytes, 0)
    descriptor = os.dup(file.descriptor)
    try:
        where = positions.data_ptr(), list(places), sums, file.name
        ids = slabs._store.lend_named(pool, descriptor, file.offset, *where)
    except BaseException:
        os.close(descriptor)
        if hold is not None:
            hold.rollback()
        raise
    slabs._charges.lent(hold, positions.nbytes)
    key = pool, ids[0] >> _INDEX_BITS & (1 << _SLAB_BITS) - 1
    slabs._tensors[key], slabs._files[key] = positions, (descriptor, 0)
    slabs.held += positions.untyped_storage().nbytes()
    slabs.note_peak()
    return ids
