"""Every refusal names op, argument, expected and actual, and comes before anything is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstrata import _C, ops

NAN = float("nan")


def attend_arguments() -> dict[str, Any]:
    pools = [ops.Pool.allocate(f, 64, 100, slabs=2) for f in ("bf16", "f32")]
    for pool in pools:
        for slab in pool.slabs:
            slab.zero_()
    return {
        "q": torch.zeros(8, 3, 4, 64),
        "pages": torch.zeros(8, 32, dtype=torch.int32),
        "pools": pools,
        "out": torch.full((8, 3, 4, 64), 7.0),
    }


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def ids(value: int) -> Tensor:
    pages = torch.zeros(8, 32, dtype=torch.int32)
    pages[2, 5] = value
    return pages


def masks(*shape: int) -> Tensor:
    return torch.full(shape, 0xFFFF, dtype=torch.int64).to(torch.uint16)


Change = dict[str, Any]
ATTEND: list[tuple[Change, str]] = [
    ({"visible": masks(8, 33)}, "attend: visible is [8, 33], expected [R=8, K=32] (K set by pages)"),
    ({"visible": masks(8)}, "attend: visible is [8], expected [R=8, K=32]"),
    ({"visible": zeros(8, 32, dtype=torch.int16)}, "attend: visible has dtype torch.int16, expected one of"),
    ({"visible": zeros(8, 32, dtype=torch.int32)}, "attend: visible has dtype i32, expected u16"),
    ({"q": zeros(8, 64)}, "attend: q is [8, 64], expected [R, G, D] or [R, T, G, D]"),
    (
        {"q": zeros(8, 3, 4, 64, dtype=torch.float64)},
        "attend: q has dtype torch.float64, expected one of torch.float32",
    ),
    ({"q": zeros(8, 3, 4, 64, dtype=torch.int32)}, "attend: q has dtype i32, expected f32 or bf16 or f16"),
    ({"q": zeros(8, 3, 4, 128)[..., ::2]}, "attend: q has stride 2 in its last dimension, expected 1 (contiguous)"),
    ({"q": zeros(8, 3, 17, 64), "out": None}, "attend: group is 17 query heads per KV head, expected 1 to 16"),
    ({"q": zeros(8, 3, 4, 513), "out": None}, "attend: head_dim is 513, expected 1 to 512"),
    ({"q": zeros(8, 3, 4, 32), "out": None}, "attend: pools[0] has head_dim 64, expected 32"),
    ({"q": zeros(8, 3, 4, 64, dtype=torch.float32).to("meta")}, "attend: q is on meta, expected cpu"),
    ({"pages": zeros(7, 32, dtype=torch.int32)}, "attend: pages is [7, 32], expected [R=8, K=32] (R set by q)"),
    ({"pages": zeros(8, dtype=torch.int32)}, "attend: pages is [8], expected [R, K]"),
    ({"pages": zeros(8, 32, dtype=torch.int64)}, "attend: pages has dtype i64, expected i32"),
    ({"pages": ids(-2)}, "attend: pages[2, 5] is -2, expected a page or -1"),
    ({"pages": ids(ops.make_page(2, 0, 0))}, "attend: pages[2, 5] names pool 2, expected one of 2 pools"),
    ({"pages": ids(ops.make_page(1, 2, 0))}, "attend: pages[2, 5] names slab 2 of pool 1, expected one of 2 slabs"),
    ({"pages": ids(100)}, "attend: pages[2, 5] names page 100 of pool 0 slab 0, expected one of 100 pages"),
    ({"scale": NAN}, "attend: scale is nan, expected a finite number"),
    ({"scale": float("inf")}, "attend: scale is inf, expected a finite number"),
    ({"softcap": -1.0}, "attend: softcap is -1, expected 0 (none) or more"),
    ({"softcap": NAN}, "attend: softcap is nan, expected 0 (none) or more"),
    ({"window": -1}, "attend: window is -1, expected 0 (none) or more"),
    ({"window": 5}, "attend: q_pos is missing, expected [T] (window is 5)"),
    ({"q_pos": zeros(8, 4, dtype=torch.int32), "window": 5}, "attend: q_pos is [8, 4], expected [R=8, T=3]"),
    ({"bias": zeros(8, 32)}, "attend: bias is [8, 32], expected [R=8, K=32, 16] (K set by pages)"),
    ({"bias": zeros(8, 32, 16, dtype=torch.bfloat16)}, "attend: bias has dtype bf16, expected f32"),
    ({"sinks": zeros(4)}, "attend: sinks is [4], expected [R=8, G=4]"),
    ({"own": torch.full((8,), 4, dtype=torch.int32)}, "attend: own[0] is 4, expected 0 to 3 (T)"),
    ({"own": torch.full((8,), -1, dtype=torch.int32)}, "attend: own[0] is -1, expected 0 to 3 (T)"),
    ({"own": zeros(8)}, "attend: own has dtype f32, expected i32"),
    (
        {"pages": zeros(8, 0, dtype=torch.int32), "own": torch.ones(8, dtype=torch.int32)},
        "attend: own[0] is 1, expected at most the row's 0 visible slots",
    ),
    (
        {"tree": zeros(8, 3, dtype=torch.int64), "own": torch.full((8,), 65, dtype=torch.int32)},
        "attend: own[0] is 65, expected 0 to 64 (bits of tree)",
    ),
    ({"tree": zeros(8, 3, dtype=torch.int32)}, "attend: tree has dtype i32, expected u64 or i64"),
    ({"out": zeros(8, 3, 4, 32)}, "attend: out is [8, 3, 4, 32], expected [R=8, T=3, G=4, D=64] (as q)"),
    ({"out": zeros(8, 12, 64)}, "attend: out is [8, 12, 64], expected [8, 3, 4, 64] (as q)"),
    (
        {"want_logits": zeros(8, 4, 3, 31, 16)},
        "attend: logits is [8, 4, 3, 31, 16], expected [R=8, G=4, T=3, K=32, 16]",
    ),
    ({"want_logits": zeros(8, 4, 3, 16, 32).transpose(3, 4)}, "attend: logits has stride"),
    ({"threads": 0}, "attend: threads is 0, expected at least 1"),
    ({"workspace": zeros(64, dtype=torch.uint8)}, "attend: workspace has 64 bytes, expected at least"),
]


@pytest.mark.parametrize(("change", "text"), ATTEND, ids=lambda x: x if isinstance(x, str) else "")
def test_attend(change: Change, text: str) -> None:
    arguments = {**attend_arguments(), **change}
    out = arguments["out"]
    before = None if out is None else out.clone()
    q, pages, pools = (arguments.pop(name) for name in ("q", "pages", "pools"))
    with pytest.raises(ValueError, match=re.escape(text)):
        ops.attend(q, pages, pools, **arguments)
    assert before is None or torch.equal(out, before), "something was written"


def append_call(**change: Any) -> Callable[[], object]:
    pool = ops.Pool.allocate("bf16", 64, 10)
    pool.slabs[0].zero_()
    a = {
        "k": zeros(2, 5, 64),
        "v": zeros(2, 5, 64),
        "pages": zeros(2, 5, dtype=torch.int32),
        "slots": zeros(2, 5, dtype=torch.uint8),
        "pools": [pool],
        "position": zeros(2, dtype=torch.int32),
        **change,
    }

    def call() -> None:
        before = [p.slabs[0].clone() for p in a["pools"]]  # type: ignore[union-attr]
        try:
            ops.append(**a)  # type: ignore[arg-type]
        finally:
            assert all(torch.equal(b, p.slabs[0]) for b, p in zip(before, a["pools"], strict=True))  # type: ignore

    return call


def merge_call(outs: list[Tensor], lses: list[Tensor], **more: Any) -> Callable[[], object]:
    return lambda: ops.merge(outs, lses, **more)


def mass_call(logits: Tensor, lse: Tensor, *reduce: Any, **more: Any) -> Callable[[], object]:
    return lambda: ops.mass(logits, lse, *reduce, **more)


def pack_call(k: Tensor, pages: Tensor, fmt: str = "bf16") -> Callable[[], object]:
    return lambda: ops.pack(k, k, pages, [ops.Pool.allocate(fmt, 64, 10)])


BF16, I32 = torch.bfloat16, torch.int32
OTHERS: list[tuple[Callable[[], object], str]] = [
    (append_call(k=zeros(2, 5)), "append: k is [2, 5], expected [R, T, D]"),
    (append_call(v=zeros(2, 6, 64)), "append: v is [2, 6, 64], expected [R=2, T=5, D=64] (as k)"),
    (append_call(v=zeros(2, 5, 64, dtype=BF16)), "append: v has dtype bf16, expected f32"),
    (append_call(k=zeros(2, 5, 600), v=zeros(2, 5, 600)), "append: pools[0] has head_dim 64, expected 600"),
    (append_call(slots=torch.full((2, 5), 16, dtype=torch.uint8)), "append: slots[0, 0] is 16, expected 0 to 15"),
    (append_call(slots=zeros(2, 5, dtype=I32)), "append: slots has dtype i32, expected u8"),
    (
        append_call(pages=torch.full((2, 5), 10, dtype=I32)),
        "append: pages[0, 0] names page 10 of pool 0 slab 0, expected",
    ),
    (append_call(pages=torch.full((2, 5), -2, dtype=I32)), "append: pages[0, 0] is -2, expected a page or -1"),
    (append_call(position=zeros(3, dtype=I32)), "append: position is [3], expected [R=2] (set by k)"),
    (append_call(k=zeros(2, 64, 5).transpose(1, 2)), "append: k has stride 5 in its last dimension, expected 1"),
    (merge_call([], []), "merge: outs has 0 parts, expected at least 1"),
    (merge_call([zeros(3, 4)], []), "merge: lses has 0 parts, expected 1 (set by outs)"),
    (
        merge_call([zeros(3, 4), zeros(4, 4)], [zeros(3)] * 2),
        "merge: outs[1] is [4, 4], expected [3, 4] (set by outs[0])",
    ),
    (merge_call([zeros(3, 4)], [zeros(4)]), "merge: lses[0] is [4], expected [3] (set by outs[0])"),
    (merge_call([zeros(3, 4, dtype=BF16)], [zeros(3)]), "merge: outs[0] has dtype bf16, expected f32"),
    (merge_call([zeros(4, 3).t()], [zeros(3)]), "merge: outs[0] has strides [1, 3], expected contiguous"),
    (merge_call([zeros(3, 4)], [zeros(3)], out=zeros(3, 5)), "merge: out is [3, 5], expected [3, 4] (set by outs[0])"),
    (
        merge_call([zeros(3, 4)], [zeros(3)], out=zeros(3, 4, dtype=I32)),
        "merge: out has dtype i32, expected f32 or bf16",
    ),
    (merge_call([zeros(3, 600)], [zeros(3)]), "merge: head_dim is 600, expected 1 to 512"),
    (mass_call(zeros(2, 3, 4, 5), zeros(2, 4, 3)), "mass: logits is [2, 3, 4, 5], expected [R, G, T, K, 16]"),
    (
        mass_call(zeros(2, 3, 4, 5, 16), zeros(2, 3, 4)),
        "mass: lse is [2, 3, 4], expected [R=2, T=4, G=3] (set by logits)",
    ),
    (
        mass_call(zeros(2, 3, 4, 5, 8), zeros(2, 4, 3)),
        "mass: logits is [2, 3, 4, 5, 8], expected [R=2, G=3, T=4, K=5, 16]",
    ),
    (
        mass_call(zeros(2, 3, 4, 5, 16), zeros(2, 4, 3), "most"),
        "mass: reduce is 'most', expected one of sum, mean, max",
    ),
    (mass_call(zeros(2, 17, 1, 5, 16), zeros(2, 1, 17)), "mass: group is 17 query heads per KV head, expected 1 to 16"),
    (
        mass_call(zeros(2, 3, 4, 5, 16), zeros(2, 4, 3), out=zeros(2, 6, 16)),
        "mass: out is [2, 6, 16], expected [R=2, K=5, 16] (set by logits)",
    ),
    (pack_call(zeros(3, 16, 64), zeros(3, dtype=I32)), "pack: k has dtype f32, expected bf16 (the format of pages[0])"),
    (pack_call(zeros(3, 15, 64, dtype=BF16), zeros(3, dtype=I32)), "pack: k is [3, 15, 64], expected [P=3, 16, D=64]"),
    (pack_call(zeros(2, 16, 64, dtype=BF16), zeros(3, dtype=I32)), "pack: k is [2, 16, 64], expected [P=3, 16, D=64]"),
    (pack_call(zeros(1, 16, 64, dtype=BF16), torch.tensor([-1]).int()), "pack: pages[0] is -1, expected a page"),
    (
        pack_call(zeros(1, 16, 64, dtype=BF16), torch.tensor([10]).int()),
        "pack: pages[0] names page 10 of pool 0 slab 0",
    ),
    (lambda: ops.unpack(torch.tensor([1 << 28]).int(), []), "unpack: pages[0] names pool 1, expected one of 0 pools"),
    (lambda: ops.page_bytes("int3", 64), "page_bytes: format is 'int3', expected one of f32, bf16, f16"),
    (lambda: ops.page_bytes("f32", 513), "page_bytes: head_dim is 513, expected 1 to 512"),
    (lambda: ops.Pool.allocate("f32", 64, 65537), "Pool.allocate: pages is 65537, expected 0 to 65536"),
    (
        lambda: ops.Pool("f32", 64, (zeros(10, dtype=torch.uint8),), (1,)).native(),
        "Pool: slab 0 is torch.uint8 [10], expected contiguous torch.uint8 of at least [8256] (1 pages)",
    ),
]


@pytest.mark.parametrize(("call", "text"), OTHERS, ids=lambda x: x if isinstance(x, str) else "")
def test_others(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_misaligned_slab_is_refused() -> None:
    good = ops.Pool.allocate("f32", 16, 3)
    bad = ops.Pool("f32", 16, (torch.zeros(10_000, dtype=torch.uint8)[4:],), (3,))
    pages = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape("attend: pools[1] slab 0 starts 4 bytes past a 64-byte boundary")):
        ops.attend(torch.zeros(1, 1, 16), pages, [good, bad])


def test_too_many_pools_are_refused() -> None:
    pools = [ops.Pool.allocate("f32", 16, 1)] * 9
    with pytest.raises(ValueError, match="attend: pools has 9 pools, expected at most 8"):
        ops.attend(torch.zeros(1, 1, 16), torch.zeros(1, 1, dtype=torch.int32), pools)


def test_unsupported_is_a_value_error() -> None:
    assert issubclass(_C.Unsupported, ValueError) and issubclass(_C.Invalid, ValueError)
    with pytest.raises(_C.Unsupported):
        ops.attend_workspace_bytes(torch.zeros(1, 17, 64), 4)


CHECKED = """
import torch
from kvstrata import _C, ops
assert _C.settings()["check"]
pool = ops.Pool.allocate("bf16", 64, 10)
pool.slabs[0].zero_()
out, lse = ops.attend(torch.zeros(1, 2, 64), torch.arange(10, dtype=torch.int32).view(1, 10), [pool])
assert lse[0, 0] == torch.log(torch.tensor(160.0))
"""


def test_checked_mode_lets_good_calls_through() -> None:
    env = {**os.environ, "KVSTRATA_CHECK": "1"}
    done = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
