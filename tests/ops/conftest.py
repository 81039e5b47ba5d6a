"""Every op's tests run at every instruction-set level of this machine.

Those of a module that says TILES = names run at amx_soft too, where the build has it: AMX kernels with tiles in plain code.
Those of a module that says EMULATED = share run on CUDA too: where a device is, and, so large a share of its cases, emulated,
but for those with TOO_LONG, if it says so, in their name.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import devices
import pytest
import torch

from kvstrata import _C

SOFT = "amx_soft"
ALL_LEVELS = [name for name, available, _, _ in _C.isa_levels() if available]
LEVELS = [name for name in ALL_LEVELS if name != SOFT]
MATRIX_LEVELS = [name for name in ALL_LEVELS if name.startswith("amx")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "matrix_isa" in metafunc.fixturenames:
        metafunc.parametrize("matrix_isa", MATRIX_LEVELS, indirect=True)
    for name, levels in (("isa", LEVELS), ("device", ["cpu"])):
        if name not in metafunc.fixturenames:
            continue
        on_cuda = ["emulated"] + ["cuda"] * torch.cuda.is_available()
        more = on_cuda if hasattr(metafunc.module, "EMULATED") else []
        if name == "isa" and hasattr(metafunc.module, "TILES") and SOFT in ALL_LEVELS:
            more = [SOFT, *more]
        metafunc.parametrize(
            name, [*levels, *(pytest.param(where, marks=marks(where)) for where in more)], indirect=True
        )


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.cuda] if name == "cuda" else []


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A level of the CPU, "emulated" or "cuda"."""
    if request.param in devices.NAMES:
        devices.use(request.param, monkeypatch)
        yield request.param
        return
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.fixture
def matrix_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """A level whose kernels read pages in matrix tiles."""
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@contextmanager
def at_scalar(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the rest of a test with `isa` ops run at the scalar level of the CPU: what all others are held against."""
    monkeypatch.undo()
    _C.set_isa("scalar")
    yield
    _C.set_isa("")


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "cpu", at the best level, "emulated" or "cuda": for ops whose CPU kernels are the same at all levels."""
    if request.param in devices.NAMES:
        devices.use(request.param, monkeypatch)
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The levels of one case follow each other: it is made once for all of them (cases.py). Of emulated ones a share stays."""
    items[:] = [item for item in items if not _left_out(item)]
    first: dict[str, int] = {}
    for place, item in enumerate(items):
        first.setdefault(_case(item), place)
    items.sort(key=lambda item: first[_case(item)])


def _left_out(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    if call is not None and call.params.get("isa") == SOFT:  # no f32 or f16 kernels of its own, nor for few query rows
        return call.params.get("formats") in (("f32",), ("f16",)) or not re.match(item.module.TILES, item.name)
    if call is None or "emulated" not in (call.params.get("isa"), call.params.get("device")):
        return False
    too_long = getattr(item.module, "TOO_LONG", None)
    if too_long is not None and too_long in item.name:
        return True
    share = getattr(item.module, "EMULATED", 1.0)  # tests of other folders have such a parameter, too
    return zlib.crc32(_case(item).encode()) % 1000 >= 1000 * share


def _case(item: pytest.Item) -> str:
    """A test's name without its level."""
    call = getattr(item, "callspec", None)
    level = call.params.get("isa", call.params.get("device")) if call is not None else None
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
