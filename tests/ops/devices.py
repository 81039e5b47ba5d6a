"""Where the tests of ops run beside the CPU's levels: on the emulated CUDA library, and on a CUDA device.

Both run the tests as they are. Emulated kernels work on CPU tensors that are said to lie on CUDA's device 0. For a device each
op is wrapped: its tensors are carried over, and back where the op has written them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated import emulated_path
from kvstrata import _C, ops, pools

NAMES = ("emulated", "cuda")


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops called by tests run there from now on."""
    if name == "emulated":
        _C.open_cuda(str(emulated_path()))
        monkeypatch.setattr(pools, "device_code", lambda what, device: 1)
        return
    for op in ops.__all__:
        function = getattr(ops, op)
        if callable(function) and not isinstance(function, type) and not op.endswith("_bytes"):
            monkeypatch.setattr(ops, op, on_device(function))


def on_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op for tensors of the CPU that does its work on the device."""

    def carried(*args: Any, **options: Any) -> Any:
        there: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (here, on the device)
        result = op(*[over(x, there) for x in args], **{name: over(x, there) for name, x in options.items()})
        for here, device in there.values():
            here.copy_(device)
        return back(result, {id(device): here for here, device in there.values()})

    return carried


def over(x: Any, there: dict[int, tuple[Tensor, Tensor]]) -> Any:
    if isinstance(x, Tensor):
        if id(x) not in there:
            there[id(x)] = (x, on_cuda(x))
        return there[id(x)][1]
    if isinstance(x, ops.Pool):
        return dataclasses.replace(x, slabs=tuple(over(slab, there) for slab in x.slabs))
    return type(x)(over(part, there) for part in x) if isinstance(x, (list, tuple)) else x


def on_cuda(x: Tensor) -> Tensor:
    """A copy with the same strides, so that ops see what tests made."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return copy.copy_(x)


def back(x: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(x, Tensor):
        return known.get(id(x), x.cpu())
    return type(x)(back(part, known) for part in x) if isinstance(x, (list, tuple)) else x
