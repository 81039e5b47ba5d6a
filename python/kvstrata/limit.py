"""What a cache may hold now: its budget in bytes for the sequences it has, along a schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvstrata.budget import Budget, Schedule
from kvstrata.budget.protect import limit_bytes, page_bytes, pages
from kvstrata.budget.room import fit, limit_now, room
from kvstrata.config import SLOTS, BudgetExceeded, Shape
from kvstrata.policy import Policy
from kvstrata.policy.base import Selector

TURN_ABOVE = 16
"""A step that brings a sequence more tokens than this brings it a prompt, cut layer by layer under a policy that drops tokens;
up to this, decoded tokens."""


class Limit:
    """The limit of one cache, and the policy as it fits.

    Where the budget has a schedule, the limit is that at t decoded tokens, t of the sequence that has decoded most. Decoded
    are the tokens of steps that bring a sequence at most TURN_ABOVE; forks inherit them, a crop takes them back.
    """

    def __init__(self, shape: Shape, budget: Budget | None, policy: Policy) -> None:
        self.budget = budget
        self._shape = shape
        self._asked = policy
        self._decoded: dict[int, int] = {}
        """By sequence."""

    # --- the policy -------------------------------------------------------------------------------------------------------

    def fit(self, lengths: Sequence[int]) -> Policy:
        """The policy as it runs with sequences of so many tokens. ValueError where the budget, or the end of its schedule, is
        too small; Unsupported for what cannot follow a schedule."""
        if self.each:
            lengths = lengths[:1]
        return fit(self._asked, self._shape, self.budget, lengths, self._falls(len(lengths)))

    @property
    def each(self) -> bool:
        """Whether every sequence has a limit of its own."""
        return self.budget is not None and self.budget.per == "sequence"

    @property
    def schedule(self) -> Schedule | None:
        """None where the limit does not fall."""
        if self.budget is None or self.budget.schedule is None or self.budget.schedule.constant:
            return None
        return self.budget.schedule

    def select(self, selector: Selector) -> None:
        """Another selector from now on."""
        self._asked = replace(self._asked, selector=selector)

    # --- bytes ------------------------------------------------------------------------------------------------------------

    def fixed(self) -> int | None:
        """Bytes, where the budget says them and nothing else changes them."""
        return int(self.budget.value) if self.budget is not None and self.budget.unit == "bytes" else None

    def expected(self, policy: Policy) -> int | None:
        """Bytes that one sequence will settle at, if the policy says so."""
        if self.schedule is not None:
            assert isinstance(self.schedule.end, int)
            return self.schedule.end
        if self.fixed() is not None:
            return self.fixed()
        if policy.planner is None or policy.allocator is not None:
            return None
        assert policy.window is not None
        per_row = pages(policy.sinks) + pages(policy.window) + 1
        return sum(per_row * s.kv_heads * page_bytes(self._shape, i) for i, s in enumerate(self._shape.layers))

    def now(self, policy: Policy, lengths: Sequence[int]) -> int:
        """Bytes that sequences of so many tokens may hold together."""
        return self._at(policy, lengths, self.decoded)

    def _at(self, policy: Policy, lengths: Sequence[int], decoded: int | None) -> int:
        """Bytes at so many decoded tokens; None: at the end of the schedule."""
        assert self.budget is not None
        limit, schedule = limit_now(policy, self._shape, self.budget, lengths), self.schedule
        if schedule is None:
            return limit
        return schedule.limit(limit, _last(schedule) if decoded is None else decoded)

    def content(self, policy: Policy, limit: int, batch: int) -> int:
        """Bytes that a limit leaves for the unprotected tokens of so many sequences; may be negative."""
        if self.each:
            return batch * room(policy, self._shape, limit // batch, 1).content
        return room(policy, self._shape, limit, batch, self._falls(batch)).content

    def most(self, policy: Policy) -> int | None:
        """Tokens that a plan may leave in a row where the budget counts them: with room for those until the next plan.

        Sinks and tail are fewer: ``room`` has found place for them and for an interval in the bytes of as many Full tokens.
        """
        if self.budget is None or not self.budget.count:
            return None
        return int(self.budget.value) - policy.interval

    def admit(self, policy: Policy, lengths: Sequence[int]) -> None:
        """BudgetExceeded where the limit, or the end of its schedule, leaves nothing for sequences of so many tokens, whose
        sinks and tails are fixed by now."""
        self.admit_within(policy, self._at(policy, lengths, None), len(lengths))

    def admit_within(self, policy: Policy, limit: int, batch: int) -> None:
        """BudgetExceeded where so many bytes leave nothing for so many sequences."""
        if self.content(policy, limit, batch) <= 0:
            raise BudgetExceeded(f"budget: {limit} bytes are too few for {batch} sequences")

    def admit_whole(self, lengths: Iterable[int]) -> None:
        """For a policy that drops nothing: BudgetExceeded where one of so many tokens is larger than the limit of each."""
        longest, total = max(lengths), 0
        for i, spec in enumerate(self._shape.layers):
            most = longest if spec.window is None else min(longest, spec.window + 64 + 2 * SLOTS)
            total += spec.kv_heads * pages(most) * page_bytes(self._shape, i)
        if (limit := self.fixed()) is not None and total > limit:
            raise BudgetExceeded(f"budget: limit is {limit} bytes per sequence, one of {longest} tokens needs {total}")

    def _falls(self, batch: int) -> tuple[int, int] | None:
        """The first and the last bytes of the schedule."""
        schedule = self.schedule
        if schedule is None or self.budget is None:
            return None
        start = limit_bytes(self.budget, self._shape, [0] * batch)
        return schedule.limit(start, 0), schedule.limit(start, _last(schedule))

    # --- decoded tokens -----------------------------------------------------------------------------------------------------

    @property
    def decoded(self) -> int:
        """t: the most that a sequence has decoded."""
        return max(self._decoded.values(), default=0)

    def count(self, new: dict[int, int]) -> None:
        """A step brought so many new tokens to sequences."""
        for i, n in new.items():
            if n <= TURN_ABOVE:
                self._decoded[i] = self._decoded.get(i, 0) + n

    def follow(self, ids: Sequence[int], sources: Sequence[int]) -> None:
        """The sequences ``ids`` continue ``sources``."""
        self._decoded |= {i: self._decoded.get(source, 0) for i, source in zip(ids, sources, strict=True)}

    def cropped(self, seq: int, tokens: int) -> None:
        """So many tokens of a sequence were taken back."""
        self._decoded[seq] = max(0, self._decoded.get(seq, 0) - tokens)

    def forget(self, ids: Iterable[int]) -> None:
        """The sequences ended, or are empty again."""
        for i in ids:
            self._decoded.pop(i, None)


def _last(schedule: Schedule) -> int:
    """Decoded tokens after which the limit is the schedule's end."""
    assert schedule.horizon is not None
    return schedule.horizon + schedule.interval
