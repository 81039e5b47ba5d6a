"""Near memory of a store: slabs of pages where its ops run, and on a device what its kernels read of the books besides."""

from __future__ import annotations

import weakref

import torch

from kvstrata import pools
from kvstrata._C import Store
from kvstrata.config import SLOTS
from kvstrata.memory import taken

TABLES = 0
"""Page lists of rows, which only grow; of other kinds of loans a new one takes the place of the one before."""

_POSITION_BYTES = SLOTS * 4


class Loans:
    """What a store on a device asks for by itself: lists of pages, workspace of kernels; and the positions of slots that its
    books keep on the CPU. Limits do not count it. On the CPU there is none of it."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._on_device = pools.device_code("Loans: device", device) > 0
        self._tables: list[torch.Tensor] = []
        self._others: dict[int, torch.Tensor] = {}
        self._positions: dict[tuple[int, int], torch.Tensor] = {}  # by slab: i32 [pages, 16]
        lend = weakref.WeakMethod(self._lend)  # the store does not keep its lender alive

        def lent(kind: int, nbytes: int) -> int:
            method = lend()
            assert method is not None, "a store does not outlive its slabs"
            return method(kind, nbytes)

        store.set_lend(lent)

    @property
    def nbytes(self) -> int:
        """As the allocator says."""
        held = (*self._tables, *self._others.values(), *self._positions.values())
        return sum(t.untyped_storage().nbytes() for t in held)

    @property
    def on_device(self) -> bool:
        """Whether ops run elsewhere than on the CPU."""
        return self._on_device

    def join_stream(self) -> None:
        """The store's ops join the caller's stream from now on."""
        if self._on_device:
            self._store.set_stream(pools.stream_of(self._device))

    def slab(self, pool: int, pages: int, memory: torch.Tensor) -> int:
        """Lends a slab of the Near tier, payload and then positions. Returns its index."""
        payload = memory.data_ptr()
        positions = payload + memory.numel() - pages * _POSITION_BYTES
        if not self._on_device:
            return self._store.lend(pool, payload, positions, pages)
        books = torch.empty(pages, SLOTS, dtype=torch.int32)
        index = self._store.lend(pool, payload, books.data_ptr(), pages, positions)
        self._positions[pool, index] = books
        return index

    def back(self, pool: int, slab: int) -> None:
        """A slab has been given back."""
        self._positions.pop((pool, slab), None)

    def _lend(self, kind: int, nbytes: int) -> int:
        memory = taken(nbytes, self._device)
        if kind == TABLES:
            self._tables.append(memory)
        else:
            self._others[kind] = memory
        return memory.data_ptr()
