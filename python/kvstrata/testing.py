"""Fault points for tests: ``with fault("append.after_take"): ...`` makes the named place fail at its nth visit.

Points: ``slab.lend`` (before a slab is made), ``append.after_take`` (pages taken, nothing written), ``plan.after_check``
(a row's plan was checked, nothing moved), ``plan.after_write`` (its new pages are
written, the table still holds the old ones), ``far.write`` and ``far.read`` (before a page goes to the Far tier or comes back),
``disk.write``, ``disk.sync``, ``disk.rename``, ``disk.remove`` (before each such call as a conversation is saved).

``with trouble(fail=0.1): ...``: the files of every Far tier are those of a bad disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from kvstrata import _C


@dataclass
class Fault:
    """An armed point; ``visits`` counts how often it was reached."""

    point: str
    nth: int
    visits: int = 0


_armed: ContextVar[Fault | None] = ContextVar("kvstrata_fault", default=None)


@contextmanager
def fault(point: str, nth: int = 1) -> Iterator[Fault]:
    """Makes ``point`` raise MachineError at its nth visit inside the block."""
    armed = Fault(point, nth)
    token = _armed.set(armed)
    _C.arm_fault(point, nth)
    try:
        yield armed
    finally:
        armed.visits += _C.fault_visits()
        _C.disarm_fault()
        _armed.reset(token)


def fault_point(point: str) -> None:
    """A point on the Python side."""
    armed = _armed.get()
    if armed is None or armed.point != point:
        return
    armed.visits += 1
    if armed.visits == armed.nth:
        raise _C.MachineError(f"fault injected at {point}")


@contextmanager
def trouble(
    seed: int = 0,
    *,
    fail: float = 0.0,
    part: float = 0.0,
    cut: float = 0.0,
    change: float = 0.0,
    stay: float = 0.0,
    delay: float = 0.0,
) -> Iterator[None]:
    """Inside the block no Far page is there at once, and pages that are on their way come in another order.

    Shares of the calls that read or write a file: fail, with an error; part, do less than asked; cut, end at once, or find no
    space; change, bring a changed byte. Of pages on their way: stay, the share that does not come before the block ends; delay,
    the longest by which each is late, in seconds.
    """
    _C.begin_trouble(seed, fail, part, cut, change, stay, int(delay * 1e6))
    try:
        yield
    finally:
        _C.end_trouble()
