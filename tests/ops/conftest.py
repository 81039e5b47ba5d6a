"""Every op's tests run at every instruction-set level of this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kvstrata import _C  # noqa: E402

LEVELS = [name for name, available, _, _ in _C.isa_levels() if available]


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")
