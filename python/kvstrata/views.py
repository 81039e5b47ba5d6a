"""What the layers of a sequence show, and where the pages are that they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstrata.cache import Cache


class Views:
    """Brings the pages of one cache's sets Near where they are shown, and takes them Far where they are not."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._store = cache._store

    def turn(self, seq: int, all_: bool, sets: list[int], halves: bool) -> None:
        """Another view, layer by layer. An error leaves the view as it was; of what cannot be read again either, steps read
        the Far pages."""
        before = self._store.view(seq)
        self._store.set_view(seq, all_, sets, halves)
        try:
            self._settle(seq)
        except BaseException:
            self._store.set_view(seq, *before)
            self._settle(seq)
            raise

    def _settle(self, seq: int) -> None:
        for layer in range(len(self._cache.shape.layers)):
            self._move(layer, seq)
        self._cache._slabs.settle()

    def open(self, layer: int, seq: int) -> None:
        """The layer shows every set."""
        self._store.show(layer, seq, True)
        self._move(layer, seq)

    def close(self, layer: int, seq: int) -> None:
        """The layer shows what the sequence's view does."""
        self._store.show(layer, seq, False)
        self._move(layer, seq)

    def _move(self, layer: int, seq: int) -> None:
        """What leaves goes first: its pages are free then. An error leaves each page whole, in one tier or the other."""
        slabs = self._cache._slabs
        if not slabs.has_far or not any(needed := self._store.moving(layer, seq)):
            self._store.put_aside(layer, seq)
            return
        near, far = slabs.by_tier(needed)
        slabs.reserve_pages(far)
        self._store.put_aside(layer, seq)
        slabs.reserve_pages(near)
        self._store.bring(layer, seq)
