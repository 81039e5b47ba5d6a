"""What the layers of a sequence show, and where the pages are that they do not.

Swap of episodes (EpiCache, arXiv 2509.17396). Pages out of sight have a Far page, so that they can leave without a write, and
stay Near as long as the cache's limit has room: the set that was named least lately gives way first. A cache without a limit
keeps none. What a view lacks is read layer by layer, at once, or beside the layers before.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kvstrata.config import BudgetExceeded, MachineError

if TYPE_CHECKING:
    from kvstrata.cache import Cache


class Views:
    """Brings the pages of one cache's sets Near where they are shown, and takes them Far where they are not."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._store = cache._store
        self._before: dict[int, tuple[bool, list[int], bool]] = {}  # views of sequences, whose next one is on its way

    def turn(self, seq: int, all_: bool, sets: list[int], halves: bool, ahead: bool = False) -> None:
        """Another view, layer by layer. An error leaves the view as it was; of what cannot be read again either, steps read
        the Far pages. ahead: what is lacking is only asked for, and waited for in the next step, layer by layer."""
        before = self._store.view(seq)
        self._store.end_ahead(seq)
        self._store.set_view(seq, all_, sets, halves)
        try:
            self._settle(seq, ahead)
        except BaseException:
            self._back(seq, before)
            raise
        self._before.pop(seq, None)
        if self._store.ahead(seq):
            self._before[seq] = before

    def _settle(self, seq: int, ahead: bool = False) -> None:
        for layer in range(len(self._cache.shape.layers)):
            self._move(layer, seq, ahead)
        self._cache._slabs.settle()

    def _back(self, seq: int, view: tuple[bool, list[int], bool]) -> None:
        self._store.end_ahead(seq)
        self._store.set_view(seq, *view)
        self._settle(seq)

    def after_step(self) -> None:
        """Sequences whose pages did not come, which the step said, have the view before."""
        for seq, before in list(self._before.items()):
            if self._store.ahead(seq):
                continue
            del self._before[seq]
            if seq in self._cache._live and self._lacks(seq):
                with suppress(
                    BudgetExceeded, MachineError
                ):  # the view is; steps read what stays Far, and say what fails
                    self._back(seq, before)

    def _lacks(self, seq: int) -> bool:
        """Whether pages that the view shows are Far."""
        far = self._cache._slabs.far_pools
        needed = (self._store.moving(layer, seq) for layer in range(len(self._cache.shape.layers)))
        return any(n > 0 for pages in needed for p, n in enumerate(pages) if p not in far)

    def open(self, layer: int, seq: int) -> None:
        """The layer shows every set."""
        self._store.show(layer, seq, True)
        self._move(layer, seq)

    def close(self, layer: int, seq: int) -> None:
        """The layer shows what the sequence's view does."""
        self._store.show(layer, seq, False)
        self._move(layer, seq)

    def _move(self, layer: int, seq: int, ahead: bool = False) -> None:
        """What leaves goes first: its pages can be free then. An error leaves each page whole, in one tier or the other."""
        slabs = self._cache._slabs
        if not slabs.has_far:
            return
        self._store.land(layer, seq)
        needed = self._store.moving(layer, seq)
        far = [n if p in slabs.far_pools else 0 for p, n in enumerate(needed)]
        slabs.make_room(lambda: far)
        self._store.put_aside(layer, seq, slabs.bound() is not None)
        slabs.make_room(lambda: [n - m for n, m in zip(needed, far, strict=True)])
        if ahead:
            self._store.bring_ahead(layer, seq)
        else:
            self._store.bring(layer, seq)
