"""generate() with a cache on a device: the tokens of DynamicCache there, and budgets that hold. With emulated kernels too."""

from __future__ import annotations

import modes
import pytest
import torch
from modes import ours, stock
from tiny import build

from emulated import emulated_path
from kvstrata import _C, pools
from kvstrata.hf import KVCache, patch

DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where models lie. On the emulated device tensors are the CPU's."""
    if request.param == "cuda":
        return "cuda"
    _C.open_cuda(str(emulated_path()))
    monkeypatch.setattr(pools, "device_code", lambda what, device: 1)
    return "cpu"


def pair(name, device, dim=16):
    """(unpatched, patched) models with equal weights."""
    plain, with_kv = (build(name, dim).to(device) for _ in range(2))
    plain.assistant = with_kv.assistant = modes.noisy(plain)
    return plain, patch(with_kv)


MODES = ["greedy", "left_padded", "beams_return", "chunks", "two_turns_full"]
CELLS = [(name, mode) for name in ("llama", "gemma3") for mode in MODES]
ON_DEVICES = [("gemma3", "left_padded"), ("gemma3", "beams_return"), ("gemma3", "two_turns_full"), ("llama", "chunks")]


@pytest.mark.parametrize(("name", "mode"), [*CELLS, ("llama", "assisted")])
def test_tokens_equal_dynamic_cache(device, name, mode):
    if device == "cpu" and (name, mode) in ON_DEVICES:
        pytest.skip("emulated in fewer cells: it takes long")
    plain, with_kv = pair(name, device)
    expected = getattr(modes, mode)(plain, stock)
    assert getattr(modes, mode)(with_kv, ours) == expected


def test_a_long_prompt_is_attended_densely_and_in_chunks(device):
    plain, with_kv = pair("llama", device)
    ids = modes.prompt(length=150)
    for more in ({}, {"prefill_chunk_size": 70}):
        expected = modes.run(plain, stock(plain), ids, new=20, **more)
        assert modes.run(with_kv, ours(with_kv), ids, new=20, **more) == expected


POLICIES = [
    ("full", "8MiB"),
    ("streaming", "64tok"),
    ("keydiff", "1280KiB"),
    ("snapkv", "1280KiB"),
    ("arkv", "1280KiB"),
]
ROWS = 6


@pytest.mark.parametrize(("policy", "budget"), [*POLICIES, ("kivi", None)])
def test_policies_run_and_hold_their_budget(device, policy, budget):
    _, model = pair("llama", device, dim=32)  # quantized formats need as many dimensions
    cache = KVCache.for_model(model, policy=policy, budget=budget)
    ids = modes.prompt(ROWS, length=220)
    tokens = modes.run(model, cache, ids, new=24, attention_mask=torch.ones_like(ids))
    report, dense = cache.report(), ROWS * 243 * 2 * model.config.num_hidden_layers
    assert [len(t) for t in tokens] == [244] * ROWS and cache.get_seq_length() == 243
    assert (
        report.allocator_bytes <= report.nbytes
        and report.loan_bytes > 0
        and report.peak_bytes <= (report.limit_bytes or report.peak_bytes)
    )
    full = report.states["full"]
    assert full == dense if policy == "full" else full < dense
    if policy == "streaming":
        assert max(map(max, report.stored)) <= 64
    if device == "cuda":
        assert cache.cache.shape.device == torch.device("cuda", torch.cuda.current_device())
