"""Threads: whose they are, and that results do not depend on them, on callers at once, or on fork()."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from cases import Case, make_case
from torch import Tensor

from kvstrata import _C


@pytest.fixture
def own_pool() -> Iterator[None]:
    _C.prefer_own_pool(True)
    yield
    _C.prefer_own_pool(False)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def large_case(seed: int = 0) -> Case:
    return make_case([200, 100, 150], formats=("bf16",), dim=64, seed=seed)


def test_borrows_the_team_of_torch() -> None:
    assert _C.threads_source().endswith("(torch)"), "torch ships an OpenMP runtime, and it is loaded"


def test_own_pool_gives_the_same_bits(own_pool: None) -> None:
    assert _C.threads_source() == "own pool"
    case = large_case()
    once = case.attend(threads=1)
    for threads in (2, 5, 3, 8, 2):
        for _ in range(20):
            assert same(case.attend(threads=threads), once)


def callers_at_once(count: int) -> None:
    cases = [large_case(seed) for seed in range(count)]
    once = [case.attend(threads=1) for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not same(cases[i].attend(threads=2), once[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_callers_at_once_on_the_team_of_torch() -> None:
    callers_at_once(8)


def test_callers_at_once_on_the_own_pool(own_pool: None) -> None:
    callers_at_once(8)


def test_a_matmul_of_torch_in_between(isa: str) -> None:
    case, a = large_case(), torch.randn(200, 200)
    once = case.attend(threads=1)
    torch.set_num_threads(2)
    for _ in range(50):
        a = (a @ a).clamp(-1, 1)
        assert same(case.attend(), once)


NO_TORCH = """
import sys
sys.modules["torch"] = None
import array
from kvstrata import _C

def view(a, *shape):
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return a.buffer_info()[0], shape, tuple(strides), 0, 0, 0

N, D = 5000, 16
outs = [array.array("f", [j + i % 7 for i in range(N * D)]) for j in range(2)]
lses = [array.array("f", [j * (i % 3) for i in range(N)]) for j in range(2)]
results = []
for threads in (1, 2, 4):
    out, lse = array.array("f", [-1] * N * D), array.array("f", [-1] * N)
    views = [view(o, N, D) for o in outs], [view(s, N) for s in lses]
    _C.merge(*views, view(out, N, D), view(lse, N), threads)
    results.append((out, lse))
assert results[0] == results[1] == results[2]
assert abs(results[0][0][0] - 0.5) < 1e-6
print(_C.threads_source())
"""


def test_without_torch_the_pool_is_our_own() -> None:
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "own pool", done.stderr


FORK = """
import os, signal, sys
import torch
from kvstrata import _C, ops

_C.prefer_own_pool(sys.argv[1] == "own")
outs = [torch.randn(20_000, 16) for _ in range(2)]
lses = [torch.randn(20_000) for _ in range(2)]
before = ops.merge(outs, lses, threads=2)
torch.randn(500, 500) @ torch.randn(500, 500)
children = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        torch.set_num_threads(1)  # torch's own team hangs in a child
        ok = True
        for _ in range(20):
            after = ops.merge(outs, lses, threads=2)
            ok = ok and torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
        os._exit(0 if ok and _C.threads_source() == "own pool (after fork)" else 3)
    children.append(pid)
assert torch.equal(ops.merge(outs, lses, threads=2)[0], before[0])
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""


@pytest.mark.parametrize("source", ["torch", "own"])
def test_works_in_a_child_after_fork(source: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, source], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


def test_python_runs_meanwhile(own_pool: None) -> None:
    """The GIL is released: another thread counts while an op works."""
    case = make_case([3000], dim=128, group=16, queries=4)
    counted, stop = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0)  # gives the GIL back

    counter = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to give the GIL up
    try:
        counter.start()
        before = counted
        for _ in range(5):
            case.attend(threads=1)
        during = counted - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        counter.join()
    assert during > 0
