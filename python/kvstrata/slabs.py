"""Memory that Python lends to the store: slabs of pages as torch tensors, so that torch's counters see every byte."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch

from kvstrata._C import Store
from kvstrata.budget.books import Books, LastBooks, books
from kvstrata.budget.protect import ENTRY_BYTES, least_limit
from kvstrata.budget.room import PIECE
from kvstrata.charges import Charges
from kvstrata.config import SLOTS, BudgetExceeded, Shape
from kvstrata.loans import Loans
from kvstrata.memory import close, taken
from kvstrata.policy import Policy
from kvstrata.recall import Far
from kvstrata.testing import fault_point

log = logging.getLogger("kvstrata")

MAX_SLAB_BYTES = 32 << 20
MIN_SLAB_BYTES = 64 << 10
MAX_FAR_BYTES = 256 << 20
MAX_PAGES_PER_SLAB = 1 << 16
_POSITION_BYTES = SLOTS * 4
_SLAB_BYTES = 1024
"""What the books of a new slab may take, and of a few more that room is made for."""
_UNLIMITED = 1 << 62
_QUERY_BYTES = 8
"""What the longest list of queries that read Far pages keeps of each, with its part of room to grow."""


class Slabs:
    """The slabs of one store. ``held`` never passes ``limit`` (bytes, with the store's metadata; None: no limit), nor what a
    ledger leaves. A Far slab is a file, and in memory the positions of its slots."""

    def __init__(
        self,
        store: Store,
        device: torch.device,
        limit: int | None,
        expected: int | None,
        charges: Charges,
        far: Far | None = None,
    ) -> None:
        self._store = store
        self._device = device
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self._expected = expected
        self._charges = charges
        self._far = far
        self.far_pools = frozenset(p for p in range(store.n_pools) if store.pool(p)["far"])
        self._files: dict[tuple[int, int], tuple[int, int]] = {}  # of Far slabs: descriptor, bytes
        weakref.finalize(self, close, store, self._files)
        self.limit = limit
        self.books = Books()
        self.loans = Loans(store, device)
        self._queries = 0  # of one sequence in a step that read Far pages, at the most
        self._bound, self._grown = LastBooks(), LastBooks()
        self.held = 0
        self.peak = 0

    def reserve(self, first_layer: int, last_layer: int, first: int, last: int) -> None:
        """Makes sure of free pages for tokens first..last of the open step in a range of layers; or as reserve_pages."""
        step = (first_layer, last_layer, first, last)
        if not any(self._store.missing(*step)):
            return
        self.make_room(lambda: self._store.needed(*step))

    def make_room(self, needed: Callable[[], list[int]]) -> None:
        """As reserve_pages; pages of sets out of sight, and Near copies, give way before it is refused."""
        while True:
            try:
                return self.reserve_pages(needed())
            except BudgetExceeded:
                if not (self._store.give_way() or self._store.shrink_near()):
                    raise

    def admit(self, queries: int) -> None:
        """Before a step of recall, in which each sequence reads what it holds with so many queries at the most: its books are
        within the limit, of more queries for good. BudgetExceeded with nothing changed."""
        if self.bound() is None or not self.books.apart:
            return
        queries = queries if self.has_far and queries > 1 else 0

        def short() -> int:
            return -self._left(self.bound() or 0, queries) - _SLAB_BYTES

        if short() > 0:
            self.trim()
        while short() > 0 and (self._store.give_way() or self._store.shrink_near()):
            self.trim()
        if (more := short()) > 0:
            raise self._exceeded(self.bound() or 0, more)
        self._queries = max(self._queries, queries)

    def reserve_pages(self, needed: list[int]) -> None:
        """Makes sure of so many free pages in each pool. BudgetExceeded with nothing changed."""
        lent: list[tuple[int, int]] = []
        try:
            for pool, pages in enumerate(needed):
                while (short := pages - self._store.pool(pool)["free"]) > 0:
                    self._lend(pool, short, needed, lent)
        except BaseException:
            for key in lent:
                self._return(key)
            raise

    def reserve_plan(self, layer: int, seq: int, head: int, columns: tuple[int, int, int, int]) -> int:
        """Makes sure of the free pages for a piece of a row's plan, as large as the limits have room for.

        columns: addresses of the row's planned states, tiers, groups and sets, 0: none; of sets the whole row is tried first.
        Returns the piece's changing pages. BudgetExceeded with nothing changed where not even one of them can be rewritten.
        """
        costs, sequences = self._costs(), self._charges.sequences
        left = _UNLIMITED if sequences is None or (n := sequences.left(seq)) is None else n
        row = (layer, seq, head, *columns[:3], costs)
        if columns[3]:
            entries, _, needed = self._store.plan_piece(*row, _UNLIMITED, columns[3], left)
            with suppress(BudgetExceeded):
                return self._reserve_piece(seq, entries, needed)
        entries, changing, needed = self._store.plan_piece(*row, self._spare(costs), columns[3], left)
        if entries < changing:
            self.trim(keep=needed)
            entries, changing, needed = self._store.plan_piece(*row, self._spare(costs), columns[3], left)
        return self._reserve_piece(seq, entries, needed)

    def _reserve_piece(self, seq: int, entries: int, needed: list[int]) -> int:
        if self._charges.sequences is not None:
            self._charges.sequences.reserve_pages({seq: needed})
        self.make_room(lambda: needed)
        return entries

    def piece(self) -> int:
        """Bytes that the least piece of a plan may need."""
        return 2 * sum(self._costs()) + 2 * _SLAB_BYTES

    def _costs(self) -> list[int]:
        """Bytes of a new page of each pool, with its entry and its part of a slab's books."""
        grain = self._grain()
        sizes = [self._near_bytes(p) for p in range(self._store.n_pools)]
        entry = self.books.per_page or ENTRY_BYTES
        return [size + entry + -(-self.books.slab // max(1, grain // size)) for size in sizes]

    def page_bytes(self, pool: int) -> tuple[int, int]:
        """Near and Far bytes that a page of a pool takes: of a slab, its positions with it, and of a file."""
        size = int(self._store.pool(pool)["page_bytes"])
        return (_POSITION_BYTES, size) if pool in self.far_pools else (size + _POSITION_BYTES, 0)

    def _near_bytes(self, pool: int) -> int:
        """Bytes of memory that a page of a pool takes in its slab: of a Far one, the positions and the checksum."""
        return self.page_bytes(pool)[0] + (8 if pool in self.far_pools else 0)

    def spare(self, parts: int = 1) -> int:
        """Bytes of pages that a plan may have lent before it frees any; of a limit that is so many limits, by one of them."""
        return max(0, self._spare(self._costs(), parts))

    def _spare(self, costs: list[int], parts: int = 1) -> int:
        """Bytes of pages that a plan may have lent: no more than is kept free for it, other parts of the limit still grow."""
        bound = self.bound()
        if bound is None:
            return _UNLIMITED
        left = self._left(bound) - len(costs) * self.books.slab  # the last slab of each pool may be a small one
        return min(left, max(bound // parts // PIECE, 2 * sum(costs)))

    def bound(self) -> int | None:
        """Bytes that may be held: the limit, or what a ledger leaves where that is less."""
        if self._charges.scope is None:
            return self.limit
        now = self.nbytes()
        left = self._charges.left(now)
        if left is None:
            return self.limit
        return now + left if self.limit is None else min(self.limit, now + left)

    def _left(self, bound: int, queries: int = 0) -> int:
        """Bytes that pages of a new slab may take: books may yet grow to the most that they take, and with so many queries."""
        tables, workspace = self._store.metadata_bytes, self._store.workspace_bytes
        beside = _QUERY_BYTES * max(self._queries, queries)
        most = self.books.most(self._pages(), len(self._tensors), tables, max(0, workspace - beside))
        return bound - self.held - most - beside - _SLAB_BYTES

    def _pages(self) -> int:
        return sum(self._store.pool(p)["total"] for p in range(self._store.n_pools))

    def trim(self, keep: list[int] | None = None) -> int:
        """Packs pages into fewer slabs and returns those that run empty: bytes. keep: free pages that must remain, by pool."""
        before = self.held
        for pool in sorted(self.far_pools):  # moving pages from file to file gains no memory
            for index, pages, free in self._store.slabs(pool):
                if pages == free and not (keep and keep[pool]):
                    self._return((pool, index))
        for pool in range(self._store.n_pools):
            while pool not in self.far_pools and self._empty_sparsest(pool, keep[pool] if keep else 0):
                pass
        return before - self.held

    def allocator_bytes(self) -> int:
        """What the allocator says: bytes of the storages behind all slabs."""
        return sum(t.untyped_storage().nbytes() for t in self._tensors.values())

    def _empty_sparsest(self, pool: int, keep: int) -> bool:
        slabs = self._store.slabs(pool)
        if not slabs:
            return False
        index, pages, _ = max(slabs, key=lambda s: (s[2] / s[1], s[0]))
        if sum(free for _, _, free in slabs) - pages < keep:
            return False
        if not self._store.empty_out(pool, index):
            return False
        self._return((pool, index))
        return True

    def _lend(self, pool: int, short: int, needed: list[int], lent: list[tuple[int, int]]) -> None:
        fault_point("slab.lend")
        is_far = pool in self.far_pools
        per_page = _POSITION_BYTES if is_far else self._store.pool(pool)["page_bytes"] + _POSITION_BYTES
        grain = self._far_grain(pool) if is_far else self._grain() // per_page
        pages = self._fit(pool, max(short, grain), short, needed)
        if self.limit is not None and not is_far:
            pages = min(pages, max(grain, 1))  # small slabs run empty sooner, and may serve another format then
        pages = min(pages, MAX_PAGES_PER_SLAB)
        if is_far:
            pages = self._far_room(pool, pages, short)
        hold = self._charges.lend(pages * per_page, pages * self._store.pool(pool)["page_bytes"] if is_far else 0)
        try:
            tensor = taken(pages * per_page, self._device)
            index = self._lend_far(pool, pages, tensor) if is_far else self.loans.slab(pool, pages, tensor)
        except BaseException:
            if hold is not None:
                hold.rollback()
            raise
        self._charges.lent(hold, pages * per_page)
        self._tensors[pool, index] = tensor
        lent.append((pool, index))
        self.held += tensor.untyped_storage().nbytes()
        self.note_peak()
        log.debug("lent slab %d of pool %d: %d pages, %d bytes held", index, pool, pages, self.held)

    def _fit(self, pool: int, wanted: int, short: int, needed: list[int]) -> int:
        """Pages of a pool's next slab: as wanted, or fewer where the limit is near; raises where even ``short`` is too many
        beside what other pools still need."""
        bound = self.bound()
        if bound is None:
            return wanted
        room = self._room(pool, bound, needed)
        if room < short:
            self.trim(keep=needed)
            bound = self.bound() or 0
            room = self._room(pool, bound, needed)
        if room < short:
            raise self._exceeded(bound, self._missing(needed))
        return min(wanted, room)

    def _exceeded(self, bound: int, more: int) -> BudgetExceeded:
        whose = "limit is" if bound == self.limit else "the ledger leaves a limit of"
        return BudgetExceeded(f"budget: {whose} {bound} bytes, {self.nbytes()} are in use, {more} more are needed")

    def _room(self, pool: int, bound: int, needed: list[int]) -> int:
        """Pages that a new slab of a pool may have, so that other pools find what they still need."""
        others = [0 if p == pool else n for p, n in enumerate(needed)]
        return (self._left(bound) - self._missing(others) - self.books.slab) // self._costs()[pool]

    def _missing(self, needed: list[int]) -> int:
        """Bytes of so many pages of each pool, beyond those that are free. The last slab of a pool may be a small one."""
        short = [max(0, n - self._store.pool(p)["free"]) for p, n in enumerate(needed)]
        return sum(n * cost + (self.books.slab if n else 0) for n, cost in zip(short, self._costs(), strict=True))

    # --- the Far tier -------------------------------------------------------------------------------------------------------

    @property
    def has_far(self) -> bool:
        """Whether there is a Far tier."""
        return bool(self.far_pools)

    @property
    def far_bytes(self) -> int:
        """Bytes of the Far tier's files."""
        return sum(size for _, size in self._files.values())

    def open_far(self) -> None:
        """Takes the Near pages through which Far pages go, if there is a Far tier. BudgetExceeded where there is no room, with
        the least limit that has it."""
        if self.has_far:
            ring = self._store.ring_pages()
            try:
                self.reserve_pages(ring)
            except BudgetExceeded as error:
                least = "" if self.limit != self.bound() else f"; expected at least {self._least_for(ring)} bytes"
                raise BudgetExceeded(f"{error}, for the ring of {sum(ring)} pages of a Far tier{least}") from error
            self._store.hold_ring()
        self.settle()

    def _least_for(self, needed: list[int]) -> int:
        """The least limit under which a cache that holds nothing may take so many pages of each pool."""
        now = self.limit, self.books, self._expected
        assert now[0] is not None and self._bound.asked is not None
        _, policy, shape, batch, _ = self._bound.asked

        def fits(limit: int) -> bool:
            self.limit, self.books, self._expected = limit, books(policy, shape, limit, batch), limit
            return self._left(limit) >= self._missing(needed)

        try:
            return least_limit(fits, now[0])
        finally:
            self.limit, self.books, self._expected = now

    def _far_grain(self, pool: int) -> int:
        """Pages of a Far slab beyond what is asked: an eighth of what the tier holds so far."""
        return min(MAX_FAR_BYTES, max(MIN_SLAB_BYTES, self.far_bytes // 8)) // self._store.pool(pool)["page_bytes"]

    def _far_room(self, pool: int, wanted: int, short: int) -> int:
        """Pages of a new Far slab: as wanted, or fewer near the tier's limit, or what a ledger leaves. BudgetExceeded where
        ``short`` are too many."""
        assert self._far is not None
        limit, left, size = self._far.bytes, self._charges.far_left(), self._store.pool(pool)["page_bytes"]
        if left is not None and left // size < wanted:
            wanted = max(short, left // size)  # too many: the ledger refuses them
        if limit is None:
            return wanted
        room = (limit - self.far_bytes) // size
        if room < short:
            raise BudgetExceeded(
                f"budget: far limit is {limit} bytes, {self.far_bytes} are in use, {short * size} more are needed"
            )
        return min(wanted, room)

    def _lend_far(self, pool: int, pages: int, positions: torch.Tensor) -> int:
        assert self._far is not None
        size = pages * self._store.pool(pool)["page_bytes"]
        file = self._far.open(size)
        index = self._store.lend_far(pool, file, 0, positions.data_ptr(), pages)
        self._files[pool, index] = file, size
        return index

    # --- bytes ----------------------------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Slabs as lent, page tables and refcounts, kernel workspace."""
        return self.held + self._store.metadata_bytes + self._store.workspace_bytes

    def settle(self) -> None:
        """After books and workspace may have grown: where they did so past the limit, free pages go."""
        bound = self.bound()
        while bound is not None and self.nbytes() > bound and (self.trim() or self._store.give_way()):
            pass
        now = self.nbytes()
        self.peak = max(self.peak, now)
        self._charges.settle(now)

    def check(self) -> None:
        """BudgetExceeded where tables that were copied have passed the limit, or what calls on them work in would."""
        self.admit(0)
        if self.limit is not None and (now := self.nbytes()) > self.limit:
            raise BudgetExceeded(f"budget: limit is {self.limit} bytes, {now} would be in use")

    def note_peak(self) -> int:
        """Takes the present size into ``peak``, and returns it."""
        self.peak = max(self.peak, self.nbytes())
        return self.peak

    def growth(self, policy: Policy, shape: Shape, batch: int, needed: list[int]) -> int:
        """Bytes by which tables and workspace may grow in a step of ``batch`` sequences that takes so many pages."""
        bound, new = self.bound(), sum(needed)
        smallest = min(self._store.pool(p)["page_bytes"] for p in range(self._store.n_pools))
        if bound is not None:
            new = min(new, max(0, bound - self.held) // smallest)
        pages = self._pages() + new
        most = self._grown.of(policy, shape, pages * smallest * batch, batch).of(pages, len(self._tensors) + new)
        return max(0, most + self.held - self.nbytes())

    def bind(self, limit: int, policy: Policy, shape: Shape, batch: int) -> None:
        """The limit of a cache of ``batch`` sequences from now on; what their books may take of it is no slab's."""
        self.limit, self.books = limit, self._bound.of(policy, shape, limit, batch)

    def _grain(self) -> int:
        """Bytes of a slab beyond what is asked: a 64th of what the cache will hold, else of its limit, or of what it holds so
        far a 32nd."""
        most = self._expected or self.limit
        return min(MAX_SLAB_BYTES, most // 64 if most else max(self.held // 32, MIN_SLAB_BYTES))

    def _return(self, key: tuple[int, int]) -> None:
        self._store.give_back(*key)
        self.loans.back(*key)
        gone = self._tensors.pop(key).untyped_storage().nbytes()
        file, far_bytes = self._files.pop(key, (None, 0))
        if file is not None:
            os.close(file)
        self.held -= gone
        self._charges.returned(gone, far_bytes)
