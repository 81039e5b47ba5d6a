"""A cache whose pages lie on a device says what one on the CPU says: with emulated kernels, and where a device is on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from emulated import emulated_path
from kvstrata import _C, Cache, LayerSpec, Shape, Unsupported, pools
from kvstrata.policy import resolve

LAYERS = [LayerSpec(2, 4, 32), LayerSpec(2, 4, 32, window=48)]
DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.cuda)]


class Device:
    """Where the second cache of a pair lies. On an emulated device its tensors are the CPU's."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.emulated = name == "emulated"
        self.device = "cpu" if self.emulated else "cuda"
        self._patch = monkeypatch
        if self.emulated:
            _C.open_cuda(str(emulated_path()))

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self._patch.context() as patch:
            if self.emulated:
                patch.setattr(pools, "device_code", lambda what, device: 1)
            yield


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(request.param, monkeypatch)


class Pair:
    """The same calls on a cache of the CPU and on one of a device."""

    def __init__(self, device: Device, policy: str, budget: str | None, seed: int = 0) -> None:
        self.device = device
        self.here = Cache(Shape(LAYERS, torch.float32), budget, policy)
        with device.entered():
            self.there = Cache(Shape(LAYERS, torch.float32, device.device), budget, policy)
            self.seqs = [(self.here.new(1)[0], self.there.new(1)[0])]
        self.random = torch.Generator().manual_seed(seed)

    def feed(self, counts: list[int]) -> None:
        """So many tokens of each sequence; the outputs are those of the CPU."""
        total = sum(counts)
        tensors = [
            [torch.randn(total, heads, spec.head_dim, generator=self.random) for heads in (4, 2, 2)] for spec in LAYERS
        ]
        expected = self._fed(self.here, [s[0] for s in self.seqs], counts, tensors)
        moved = [[t.to(self.device.device) for t in layer] for layer in tensors]
        with self.device.entered():
            found = self._fed(self.there, [s[1] for s in self.seqs], counts, moved)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=5e-5)

    def _fed(self, cache: Cache, seqs: list, counts: list[int], tensors: list[list[Tensor]]) -> list[Tensor]:
        with cache.step(seqs, counts) as step:
            return [step.attend(layer, *qkv) for layer, qkv in enumerate(tensors)]

    def fork(self, n: int) -> None:
        here, there = self.here.fork(self.seqs[0][0], n), self.there.fork(self.seqs[0][1], n)
        self.seqs += list(zip(here, there, strict=True))

    def crop(self, length: int) -> None:
        for here, there in self.seqs:
            self.here.crop([here], [length])
            self.there.crop([there], [length])

    def same_books(self) -> None:
        for here, there in self.seqs:
            for layer, spec in enumerate(LAYERS):
                for head in range(spec.kv_heads):
                    at = [torch.empty(c.stored_length(layer, s, head), dtype=torch.int32)
                          for c, s in ((self.here, here), (self.there, there))]  # fmt: skip
                    self.here._store.positions(here.id, layer, head, at[0].data_ptr())
                    self.there._store.positions(there.id, layer, head, at[1].data_ptr())
                    assert torch.equal(*at)


@pytest.mark.parametrize(
    ("policy", "budget"),
    [
        ("full", None),
        ("streaming", "64tok"),
        ("keydiff", "256tok"),
        ("keynorm", "256tok"),
        ("snapkv", "256tok"),
        ("kivi", None),
        ("arkv", "256tok"),
    ],
)
def test_says_what_the_cpu_says(device: Device, policy: str, budget: str | None) -> None:
    pair = Pair(device, policy, budget)
    pair.feed([330])
    pair.same_books()
    for _ in range(20):
        pair.feed([1])
    pair.feed([70])
    pair.feed([9])
    pair.same_books()


def test_forks_crops_and_clears(device: Device) -> None:
    pair = Pair(device, "full", None)
    pair.feed([100])
    pair.fork(2)
    pair.feed([1, 3, 0])
    pair.feed([17, 1, 40])
    pair.same_books()
    pair.crop(95)
    pair.feed([2, 2, 2])
    pair.same_books()
    for cache, which in ((pair.here, 0), (pair.there, 1)):
        cache.free([s[which] for s in pair.seqs[1:]])
        cache.clear([pair.seqs[0][which]])
    pair.seqs = pair.seqs[:1]
    pair.feed([33])
    pair.feed([1])
    with device.entered():
        assert pair.there.trim() >= 0
    pair.feed([1])
    pair.same_books()


def test_trim_moves_pages(device: Device) -> None:
    pair = Pair(device, "full", None)
    pair.fork(3)
    for _ in range(6):
        pair.feed([64, 64, 64, 64])
    for cache, which in ((pair.here, 0), (pair.there, 1)):
        cache.free([pair.seqs[i][which] for i in (0, 2)])
    pair.seqs = [pair.seqs[1], pair.seqs[3]]
    before = pair.there.nbytes()
    with device.entered():
        assert pair.there.trim() > 0
    assert pair.there.nbytes() < before
    pair.feed([1, 1])
    pair.same_books()


def test_bytes_are_those_of_the_allocator(device: Device) -> None:
    pair = Pair(device, "streaming", "2MiB")
    for _ in range(8):
        pair.feed([200])
        assert pair.there.nbytes() <= 2 << 20
        report = pair.there.report()
        assert report.allocator_bytes <= report.nbytes <= report.limit_bytes and report.loan_bytes > 0
    assert pair.here.report().loan_bytes == 0


@pytest.mark.parametrize("policy", ["icecache", "strata", "h2o"])
def test_what_a_device_does_not_do_is_refused(device: Device, policy: str) -> None:
    assert resolve(policy)
    with device.entered(), pytest.raises(Unsupported, match="on a CUDA device, expected none"):
        Cache(Shape(LAYERS, torch.float32, device.device), "4MiB", policy)
