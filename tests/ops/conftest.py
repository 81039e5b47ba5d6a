"""Every op's tests run at every instruction-set level of this machine."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The reference's small operators on one thread: a busy machine makes them wait for each other otherwise.

    The tests that are about threads pass their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
