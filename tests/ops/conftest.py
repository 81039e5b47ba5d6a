"""Every op's tests run at every instruction-set level of this machine."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kvstrata import _C

LEVELS = [name for name, available, _, _ in _C.isa_levels() if available]


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The levels of one case follow each other: it is made once for all of them (cases.py)."""
    first: dict[str, int] = {}
    for place, item in enumerate(items):
        first.setdefault(_case(item), place)
    items.sort(key=lambda item: first[_case(item)])


def _case(item: pytest.Item) -> str:
    """A test's name without its level."""
    call = getattr(item, "callspec", None)
    level = call.params.get("isa") if call is not None else None
    return item.nodeid if level is None else re.sub(rf"(?<=[\[-]){level}(?=[\]-])", "", item.nodeid, count=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The reference's small operators on one thread: a busy machine makes them wait for each other otherwise.

    The tests that are about threads pass their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
