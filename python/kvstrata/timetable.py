"""When the layers of a cache's sequences are planned, and when they were."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstrata.config import SLOTS

if TYPE_CHECKING:
    from kvstrata.cache import Cache


class Timetable:
    """What is due. Each sequence by itself: its batch mates decide nothing."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._store = cache._store
        self._planned: dict[int, int] = {}  # by sequence: its length when all its layers were planned last
        self._among: dict[int, int] = {}  # by sequence: how many shared the limit then

    # --- what is due ------------------------------------------------------------------------------------------------------

    def after(self, before: dict[int, int]) -> list[int]:
        """Sequences that a step brought over the end of an interval, by their lengths before it."""
        return [i for i, n in before.items() if self._ends_interval(n, self._store.length(i))]

    def after_of(self, before: dict[int, int]) -> list[tuple[int, list[int]]]:
        """Likewise, layer by layer, for what archives: it plans each layer for itself, and not all in one step, as their
        intervals end one after another."""
        now = {i: self._store.length(i) for i in before}
        due = [(layer, [i for i in before if self._crosses(j, before[i], now[i])]) for j, layer in self._layers()]
        return [(layer, ids) for layer, ids in due if ids]

    def is_waiting(self, layer: int, seq: int, new: int = 0) -> bool:
        """Whether a layer of a sequence has what a planner that archives would move, with ``new`` tokens more: asked natively,
        a look at all tokens costs more."""
        tokens, fresh = self._store.waiting(layer, [seq])
        length = self._store.length(seq)
        more = self._sealed(length + new) - self._sealed(length)
        least = int(getattr(self._cache.policy.planner, "segment_min", 1))
        return tokens + more >= least or fresh + more >= SLOTS

    def _sealed(self, length: int) -> int:
        """Tokens of a row of so many that have left the tail, sinks excepted."""
        policy = self._cache.policy
        assert policy.window is not None
        return max(0, (length - policy.window) // SLOTS * SLOTS - policy.sinks)

    def coming(self, counts: dict[int, int], cut: list[int]) -> int:
        """Plans of a layer that a step makes which brings so many tokens to its sequences; cut: those cut inside it, of which
        nothing is left to archive afterwards."""
        policy = self._cache.policy
        if policy.planner is None:
            return 0
        now = {i: self._store.length(i) for i in counts}
        pieces = max((-(-counts[i] // policy.chunk) for i in cut), default=0)
        layers = self._layers()
        if policy.archives:
            left = [(i, now[i], n) for i, n in counts.items() if i not in cut]
            whole = sum(
                any(self._crosses(j, at, at + n) and self.is_waiting(layer, i, n) for i, at, n in left)
                for j, layer in layers
            )
        else:
            whole = len(layers) * any(self._ends_interval(now[i], now[i] + n) for i, n in counts.items())
        return whole + len(layers) * pieces

    def crowded(self) -> list[int]:
        """Sequences that were planned last when fewer shared the limit."""
        live = self._cache._live
        return [i for i in live if self._among.get(i, len(live)) < len(live)]

    def too_many(self, seq: int, new: int, cut: bool) -> bool:
        """Whether a sequence's room for unplanned tokens does not hold those it has and so many new ones."""
        waiting = self._store.length(seq) - self._planned.get(seq, 0)
        return new > 1 and waiting > (0 if cut else max(0, self._cache.policy.interval - new))

    def _layers(self) -> list[tuple[int, int]]:
        """The layers that are planned, numbered."""
        return list(enumerate(self._cache._plans.layers))

    def _crosses(self, number: int, first: int, last: int) -> bool:
        """Whether a sequence passes the end of an interval of a layer, which begins the earlier the higher its number is;
        layers that read one selection have one interval."""
        number -= number % getattr(self._cache.policy.selector, "reuse", 1)
        shift = number * self._cache.policy.interval // len(self._cache._plans.layers)
        return self._ends_interval(first + shift, last + shift)

    def _ends_interval(self, first: int, last: int) -> bool:
        """Whether a sequence passes the end of an interval between two lengths."""
        interval = self._cache.policy.interval
        return first // interval != last // interval

    # --- what was done ----------------------------------------------------------------------------------------------------

    def note(self, ids: list[int], among: int) -> None:
        """All layers of the sequences were planned at their present lengths, for a limit that so many share."""
        self._planned |= {i: self._store.length(i) for i in ids}
        self._among |= dict.fromkeys(ids, among)

    def cropped(self, seq: int, length: int) -> None:
        """The sequence was shortened."""
        self._planned[seq] = min(self._planned.get(seq, 0), length)

    def follow(self, seq: int, source: int) -> None:
        """What is known of ``source`` holds for ``seq`` that continues it."""
        self._planned[seq] = self._planned.get(source, 0)
        if source in self._among:
            self._among[seq] = self._among[source]

    def forget(self, gone: set[int]) -> None:
        """Drops what is known of sequences that ended."""
        self._planned = {i: n for i, n in self._planned.items() if i not in gone}
        self._among = {i: n for i, n in self._among.items() if i not in gone}
