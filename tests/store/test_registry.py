"""Registered ops in compiled graphs: no graph break, eager's bits, and an order that the compiler keeps."""

from __future__ import annotations

import gc
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from kvstrata import Cache, LayerSpec, Shape, ops, registry

H, G, D, PAGES = 2, 2, 32, 8


class Paged(nn.Module):
    """A layer on pools of its own: appends a token per row, attends over the row's pages, merges with what others found."""

    def __init__(self, namespace: str = "kvstrata") -> None:
        super().__init__()
        self.ops = getattr(torch.ops, namespace)
        self.qkv = nn.Linear(D, (G + 2) * D, bias=False)

    def forward(self, x: Tensor, ref: registry.Ref, lists: tuple[Tensor, ...], other: tuple[Tensor, Tensor]) -> Tensor:
        """x: [H, D] -> [H, G, D]."""
        pages, slots, position, table, visible = lists
        q, k, v = self.qkv(x).view(H, G + 2, D).split([G, 1, 1], 1)
        self.ops.append(k, v, pages, slots, position, ref.order[0], ref.number)
        out, lse = self.ops.attend(q, table, ref.order[0], ref.number, visible=visible)
        return self.ops.merge([out, other[0]], [lse, other[1]])[0]


def decoded(run: Any, steps: int = 20) -> Tensor:
    """Outputs [steps, H, G, D] of `run` over pools of zeros: row h has page h, then page 2 + h."""
    pool = ops.Pool.allocate("f32", D, PAGES)
    pool.slabs[0].zero_()
    ref = registry.Ref.of_pools([pool])
    random = torch.Generator().manual_seed(3)
    found = []
    for t in range(steps):
        own = [ops.make_page(0, 0, t // 16 * H + h) for h in range(H)]
        table = torch.tensor([[ops.make_page(0, 0, i * H + h) for i in range(2)] for h in range(H)], dtype=torch.int32)
        masks = [(1 << min(16, max(0, t + 1 - 16 * i))) - 1 for i in range(2)]
        lists = (
            torch.tensor(own, dtype=torch.int32)[:, None],
            torch.full((H, 1), t % 16, dtype=torch.uint8),
            torch.full((H,), t, dtype=torch.int32),
            table,
            torch.tensor([masks] * H, dtype=torch.uint16),
        )
        other = torch.randn(H, G, D, generator=random), torch.randn(H, G, generator=random)
        found.append(run(torch.randn(H, D, generator=random), ref, lists, other))
    return torch.stack(found)


@pytest.fixture
def paged() -> Paged:
    torch.manual_seed(0)
    return Paged()


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def test_compiled_ops_say_what_eager_says(paged: Paged) -> None:
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(paged, fullgraph=True, backend=counter)
    assert torch.equal(decoded(compiled), decoded(paged))
    assert counter.frame_count == 1


def test_inductor_keeps_the_order(paged: Paged) -> None:
    """Nothing but products and ops, so that no C++ is compiled."""
    assert torch.equal(decoded(torch.compile(paged, fullgraph=True), 4), decoded(paged, 4))


def test_without_the_mark_the_compiler_drops_an_append(paged: Paged) -> None:
    library = registry.register("kvstrata_unmarked", mark="Tensor order")
    unmarked = Paged("kvstrata_unmarked")
    unmarked.load_state_dict(paged.state_dict())
    expected = decoded(paged, 2)
    assert torch.equal(decoded(unmarked, 2), expected)  # eager knows no better, and needs none
    compiled = torch.compile(unmarked, fullgraph=True, backend="aot_eager_decomp_partition")
    assert not torch.equal(decoded(compiled, 2), expected)
    library._destroy()


class Stepped(nn.Module):
    """Two layers on a cache's open step."""

    def forward(self, x: Tensor, number: int, order: list[Tensor]) -> Tensor:
        """x: [n, (G + 2) H, D] -> [n, G H, D]."""
        for layer in range(2):
            q, k, v = x.split([G * H, H, H], 1)
            out = torch.ops.kvstrata.step_attend(q, k, v, order[layer], number, layer, softcap=20.0)
            x = torch.cat([out, k + v, k - v], 1)
        return x[:, : G * H]


def fed(run: Any, policy: str = "streaming") -> list[Tensor]:
    cache = Cache(Shape([LayerSpec(H, H * G, D)] * 2, torch.float32), "64tok", policy)
    ref, seqs = registry.Ref.of_cache(cache), cache.new(2)
    random = torch.Generator().manual_seed(5)
    found = []
    for counts in ([40, 7], [1, 1], [1, 1], [1, 1], [3, 0]):
        x = torch.randn(sum(counts), (G + 2) * H, D, generator=random)
        with cache.step(seqs, counts):
            found.append(run(x, ref.number, ref.order))
    return found


def test_a_cache_in_a_compiled_model() -> None:
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(Stepped(), fullgraph=True, backend=counter, dynamic=True)
    for expected, found in zip(fed(Stepped()), fed(compiled), strict=True):
        assert torch.equal(found, expected)
    before = counter.frame_count
    for _ in range(3):
        fed(compiled)  # caches of other numbers
    assert counter.frame_count - before <= 1


@pytest.mark.parametrize("op", ["append", "attend", "merge"])
def test_schemas_say_what_the_ops_do(op: str) -> None:
    pool = ops.Pool.allocate("f32", D, PAGES)
    ref = registry.Ref.of_pools([pool])
    table, k = torch.zeros(H, 1, dtype=torch.int32), torch.randn(H, 1, D)
    table[1] = 1
    inputs: dict[str, tuple[Any, ...]] = {
        "append": (k, k, table, torch.zeros(H, 1, dtype=torch.uint8), table[:, 0], ref.order[0], ref.number),
        "attend": (torch.randn(H, G, D), table * 0 - 1, ref.order[0], ref.number),
        "merge": ([torch.randn(H, D)] * 2, [torch.randn(H)] * 2),
    }
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.kvstrata, op).default, inputs[op], test_utils=checks)


def test_bad_references_are_refused() -> None:
    cache = Cache(Shape([LayerSpec(H, H * G, D)], torch.float32))
    of_cache, of_pools = registry.Ref.of_cache(cache), registry.Ref.of_pools([ops.Pool.allocate("f32", D, 1)])
    q, k = torch.zeros(1, H * G, D), torch.zeros(1, H, D)
    attend = torch.ops.kvstrata.step_attend
    with pytest.raises(RuntimeError, match="no step of the cache is open"):
        attend(q, k, k, of_cache.order[0], of_cache.number, 0)
    with pytest.raises(ValueError, match="expected one made by Ref.of_cache"):
        attend(q, k, k, of_pools.order[0], of_pools.number, 0)
    order, number = of_pools.order[0], of_pools.number
    del of_pools
    gc.collect()
    with pytest.raises(ValueError, match=f"ref is {number}, expected the number of a Ref that is alive"):
        torch.ops.kvstrata.attend(q, torch.zeros(1, 1, dtype=torch.int32), order, number)
    with pytest.raises(ValueError, match="0 pools and 1 layers"):
        registry.Ref.of_pools([])


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "compiled_model.py"
    monkeypatch.setattr(sys, "argv", [str(path), "aot_eager"])
    runpy.run_path(str(path), run_name="__main__")
    assert "the same tokens" in capsys.readouterr().out
