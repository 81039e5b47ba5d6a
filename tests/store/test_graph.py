"""Steps whose launches are captured once and replayed: eager's bits from changing lists. Emulated, and on a device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated import emulated_path
from kvstrata import _C, Cache, LayerSpec, Shape, Unsupported, loans, ops, pools
from kvstrata.graph import Graph, GraphStep

LAYERS = [LayerSpec(2, 4, 32), LayerSpec(2, 4, 32, window=48)]
DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.cuda)]


class EmulatedGraph:
    """What the emulation keeps while a graph is captured."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._number = -1

    def replay(self) -> None:
        assert self._library.kvstrata_emulated_replay(self._number) == 0

    @contextmanager
    def captured(self) -> Iterator[None]:
        self._library.kvstrata_emulated_begin_capture()
        try:
            yield
        finally:
            self._number = self._library.kvstrata_emulated_end_capture()


class Device:
    """Where caches lie. On an emulated device their tensors are the CPU's."""

    def __init__(self, name: str) -> None:
        self.emulated = name == "emulated"
        self.name = "cpu" if self.emulated else "cuda"
        if self.emulated:
            _C.open_cuda(str(emulated_path()))
            self.library = ctypes.CDLL(str(emulated_path()))
            self.library.kvstrata_emulated_asked.restype = ctypes.c_int64

    def graph(self) -> Any:
        return EmulatedGraph(self.library) if self.emulated else torch.cuda.CUDAGraph()

    @contextmanager
    def captured(self, graph: Any) -> Iterator[None]:
        with graph.captured() if self.emulated else torch.cuda.graph(graph):
            yield

    def asked(self, name: str) -> int:
        return int(self.library.kvstrata_emulated_asked(name.encode()))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    if request.param == "emulated":
        monkeypatch.setattr(pools, "device_code", lambda what, device: 1)
    return Device(request.param)


@pytest.fixture(params=["emulated"])  # so that the cases are named by it
def emulated(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(pools, "device_code", lambda what, device: 1)
    return Device("emulated")


class Model:
    """Queries, keys and values of each layer from what the layer before has found, in tensors that stay where they are."""

    def __init__(self, batch: int, device: str) -> None:
        self.x = torch.zeros(batch, 8, 32, device=device)
        self.other = torch.randn(batch, 4, 32, generator=torch.Generator().manual_seed(9)).to(device)
        self.lse = torch.zeros(batch, 4, device=device)
        self.kept: list[Tensor] = []  # what replays write to: the emulation has no pool of memory for a graph

    def __call__(self, step: Any) -> Tensor:
        q, self.kept = self.x[:, :4], []
        for layer in range(len(LAYERS)):
            out = step.attend(layer, q, self.x[:, 4:6], self.x[:, 6:])
            q, lse = ops.merge([out, self.other], [self.lse, self.lse])
            self.kept += [out, q, lse]
        return q


class Pair:
    """The same tokens into a cache that steps as ever, and into one whose steps are replayed."""

    def __init__(
        self, device: Device, prompts: list[int], policy: str = "full", budget: str | None = None, **room: int
    ) -> None:
        self.device = device
        shape = Shape(LAYERS, torch.float32, device.name)
        self.eager, self.replayed = Cache(shape, budget, policy), Cache(shape, budget, policy)
        self.seqs = [cache.new(len(prompts)) for cache in (self.eager, self.replayed)]
        self.random = torch.Generator().manual_seed(0)
        self.graph = Graph(self.replayed, self.seqs[1], **room)
        self.models = [Model(len(prompts), device.name) for _ in range(2)]
        self.held: Any = None
        self.epoch = -1
        self.captures = 0
        self.out: Tensor | None = None
        self.feed(prompts)

    def feed(self, counts: list[int]) -> None:
        """Tokens by ordinary steps of both."""
        tensors = [[self.drawn(sum(counts), heads) for heads in (4, 2, 2)] for _ in LAYERS]
        for cache, seqs in zip((self.eager, self.replayed), self.seqs, strict=True):
            with cache.step(seqs, counts) as step:
                for layer, qkv in enumerate(tensors):
                    step.attend(layer, *qkv)

    def drawn(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, 32, generator=self.random).to(self.device.name)

    def decode(self) -> None:
        """One token more, whose outputs have the same bits."""
        x = self.drawn(len(self.seqs[0]), 8)
        for model in self.models:
            model.x.copy_(x)
        with self.eager.step(self.seqs[0], [1] * len(self.seqs[0])) as step:
            expected = self.models[0](step)
        with self.graph.step() as step:
            self.replay(step)
        assert self.out is not None
        assert torch.equal(self.out, expected)

    def replay(self, step: GraphStep) -> None:
        if step.epoch != self.epoch:
            self.held, self.epoch = self.device.graph(), step.epoch
            self.captures += 1
            with self.device.captured(self.held):
                self.out = self.models[1](step)
        step.replay(self.held, self.epoch)


def test_replays_have_the_bits_of_eager_steps(device: Device) -> None:
    pair = Pair(device, [37, 5, 100])
    for _ in range(20):
        pair.decode()
    assert pair.captures == 1  # up to 120 tokens a list of 16 entries has room


def test_a_thousand_replays(device: Device) -> None:
    pair = Pair(device, [3, 40], tokens=2000)
    for _ in range(12 if device.emulated else 1000):
        pair.decode()
    assert pair.captures == 1


def test_lists_that_outgrow_their_room_raise_the_epoch(device: Device) -> None:
    pair = Pair(device, [250])
    for _ in range(5):
        pair.decode()
    before = pair.held, pair.epoch
    for _ in range(5):
        pair.decode()
    assert pair.captures == 2 and pair.epoch == before[1] + 1
    with (
        pytest.raises(ValueError, match=f"replay: the graph is of epoch {before[1]}, expected {pair.epoch}"),
        pair.graph.step() as step,
    ):
        step.replay(*before)
    assert pair.replayed.logical_length(pair.seqs[1][0]) == 260
    pair.decode()


@pytest.mark.parametrize(("policy", "budget"), [("streaming", "64tok"), ("kivi", None), ("snapkv", "256tok")])
def test_lists_that_policies_rewrite(device: Device, policy: str, budget: str | None) -> None:
    pair = Pair(device, [150, 70], policy, budget)
    for _ in range(18):
        pair.decode()
    assert pair.captures <= 3


def test_other_steps_in_between(device: Device) -> None:
    pair = Pair(device, [20, 30])
    for counts in ([1, 1], [0, 9], [80, 3], [70, 0]):
        pair.decode()
        pair.feed(counts)
        pair.decode()
    for cache, seqs in zip((pair.eager, pair.replayed), pair.seqs, strict=True):
        cache.crop(seqs, [cache.logical_length(s) - 20 for s in seqs])
    for _ in range(3):
        pair.decode()
    for cache, seqs in zip((pair.eager, pair.replayed), pair.seqs, strict=True):
        cache.fork(seqs[0])  # its open page is copied before the next token
    pair.decode()


def test_a_step_that_fails_takes_its_tokens_back(device: Device) -> None:
    pair = Pair(device, [33, 16])
    pair.decode()
    with pytest.raises(KeyError), pair.graph.step():
        raise KeyError
    with pytest.raises(ValueError, match=r"layers \[0, 1\] did not attend"), pair.graph.step():
        pass
    _C.arm_fault("append.after_take", 1)
    with pytest.raises(RuntimeError), pair.graph.step():
        pass
    _C.disarm_fault()
    assert [pair.replayed.logical_length(s) for s in pair.seqs[1]] == [34, 17]
    for _ in range(3):
        pair.decode()


def test_ops_by_themselves(device: Device) -> None:
    """append of a token per row, attend and merge read lists and positions on the device: nothing else changes."""
    rows, dim, room = 3, 32, 8  # entries
    pool = ops.Pool.allocate("f32", dim, rows * room, device=device.name)
    random = torch.Generator().manual_seed(1)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device.name)

    qkv, other = zeros(rows, 4, dim), zeros(rows, 2, dim)
    pages, slots = zeros(rows, 1, dtype=torch.int32), zeros(rows, 1, dtype=torch.uint8)
    position, table = zeros(rows, dtype=torch.int32), zeros(rows, room, dtype=torch.int32)
    visible, lse = zeros(rows, room, dtype=torch.uint16), zeros(rows, 2)
    q, out = qkv[:, :2], zeros(rows, 2, dim)
    workspace = zeros(ops.attend_workspace_bytes(q, room), dtype=torch.uint8)
    kept: list[Any] = []

    def run() -> None:
        ops.append(qkv[:, 2:3], qkv[:, 3:], pages, slots, [pool], position)
        found = ops.attend(q, table, [pool], visible=visible, workspace=workspace)
        kept.append((found, ops.merge([found[0], other], [found[1], lse], out=out)))

    graph = device.graph()
    for t in range(40):
        first = [t + 3 * r for r in range(rows)]  # as if so many tokens stood before
        lists = [[r * room + e if 16 * e <= n else -1 for e in range(room)] for r, n in enumerate(first)]
        table.copy_(torch.tensor(lists, dtype=torch.int32))
        masks = [[(1 << min(16, max(0, n + 1 - 16 * e))) - 1 for e in range(room)] for n in first]
        visible.copy_(torch.tensor(masks, dtype=torch.uint16))
        pages.copy_(torch.tensor([[row[n // 16]] for row, n in zip(lists, first, strict=True)], dtype=torch.int32))
        slots.copy_(torch.tensor([[n % 16] for n in first], dtype=torch.uint8))
        position.copy_(torch.tensor(first, dtype=torch.int32))
        qkv.copy_(torch.randn(qkv.shape, generator=random))
        if t == 0:
            pool.slabs[0].zero_()
            run()  # warm
            with device.captured(graph):
                run()
        graph.replay()
        replayed = out.clone()
        run()
        assert torch.equal(out, replayed)
        assert pool.positions().flatten()[pages[:, 0].long() * 16 + slots[:, 0]].tolist() == first


def test_what_a_graph_is_not_for(device: Device) -> None:
    pair = Pair(device, [5])
    with pair.graph.step() as step:
        with pytest.raises(Unsupported, match="expected attend"):
            step.append(0, *[pair.drawn(1, 2)] * 2)
        with pytest.raises(ValueError, match="expected contiguous torch.float32 beside q"):
            step.attend(0, *[pair.drawn(1, n) for n in (4, 2, 2)], sinks=torch.zeros(4, dtype=torch.float64))
        pair.replay(step)
    with pytest.raises(ValueError, match="tokens is -1"):
        Graph(pair.replayed, pair.seqs[1], tokens=-1)


def test_the_cpu_has_no_graphs() -> None:
    cache = Cache(Shape(LAYERS, torch.float32))
    with pytest.raises(Unsupported, match="the cache is on the CPU"):
        Graph(cache, cache.new(1))


WORK = ("upload", "append", "attend", "cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaStreamSynchronize")


def test_what_the_host_does_per_step(emulated: Device) -> None:
    """Of an ordinary step, one launch to write and two to read per layer, and two uploads; of a replayed one, uploads for
    all layers together. The emulation takes few rows per launch, so that there are few here."""
    pair = Pair(emulated, [40])
    for _ in range(3):
        pair.decode()

    def work(run: Any) -> dict[str, int]:
        before = {name: emulated.asked(name) for name in WORK}
        run()
        return {name: emulated.asked(name) - n for name, n in before.items() if emulated.asked(name) != n}

    def eager() -> None:
        with pair.eager.step(pair.seqs[0], [1]) as step:
            pair.models[0](step)

    def replayed() -> None:
        with pair.graph.step() as step:
            pair.replay(step)

    layers = len(LAYERS)
    assert work(eager) == {"upload": 2 * layers, "append": layers, "attend": 2 * layers}
    assert work(replayed) == {"upload": 1}  # what a replay does is no work of the host


def test_a_capture_asks_for_no_memory_and_waits_for_nothing(emulated: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait fails in a capture; memory is asked of Python."""
    taken, lent = loans.taken, []

    def lend(nbytes: int, where: torch.device) -> Tensor:
        lent.append(nbytes)
        return taken(nbytes, where)

    monkeypatch.setattr(loans, "taken", lend)
    pair = Pair(emulated, [40], "snapkv", "256tok")
    assert lent
    with pair.graph.step() as step:
        lent.clear()
        pair.replay(step)
    assert pair.captures == 1 and not lent


def test_a_plan_waits_a_few_times(emulated: Device) -> None:
    """Not once per page: what keys are relative to is found from many pages at a time."""
    cache = Cache(Shape(LAYERS, torch.float32), None, "kivi")
    random = torch.Generator().manual_seed(0)
    seqs = cache.new(1)
    before = emulated.asked("cudaStreamSynchronize")
    with cache.step(seqs, [600]) as step:
        for layer in range(len(LAYERS)):
            step.attend(layer, *[torch.randn(600, n, 32, generator=random) + 3 for n in (4, 2, 2)])
    assert any(cache._store.centre(seqs[0].id, 0, 0)[1])
    assert emulated.asked("cudaStreamSynchronize") - before == 2 * LAYERS[0].kv_heads  # keys and values of each row
