"""Caches of several threads at once: each says what it says alone. One cache serves one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from feeding import drawn

from kvstrata import Cache, LayerSpec, Shape

POLICIES = ("full", "streaming", "kivi", "snapkv", "arkv", "h2o", "keydiff", "icecache")
COUNTS = [[300, 40], [1, 1], [1, 1], [90, 1], [1, 0]]


def fed(number: int) -> list[torch.Tensor]:
    """All outputs of a cache of its own."""
    torch.set_num_threads(1)  # of a new thread; what threads work in is a part of a limit in bytes
    budget = None if POLICIES[number] in ("full", "kivi") else "256tok"
    cache = Cache(Shape([LayerSpec(2, 4, 32)] * 2, torch.bfloat16), budget, POLICIES[number])
    seqs, random = cache.new(2), torch.Generator().manual_seed(number)
    found = []
    for counts in COUNTS:
        with cache.step(seqs, counts) as step:
            tensors = drawn(cache, sum(counts), random)
            found += [step.attend(layer, *qkv) for layer, qkv in enumerate(tensors)]
    return found


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_eight_threads_on_eight_caches_give_the_serial_bits() -> None:
    expected = [fed(i) for i in range(8)]
    found: list[list[torch.Tensor]] = [[] for _ in range(8)]
    together = threading.Barrier(8)

    def work(i: int) -> None:
        together.wait()
        for _ in range(2):
            found[i] = fed(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(found, expected, strict=True):
        assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
