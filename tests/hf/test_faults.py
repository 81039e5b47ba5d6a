"""A fault in the middle of a forward changes nothing, and the retry gives the same logits."""

from __future__ import annotations

import pytest
import torch
from modes import ours, padded
from tiny import build

from kvstrata.hf import patch


class Fault(Exception):
    pass


def state(cache):
    """Lengths, tables and bytes of pages. What pools and tables have room for beyond that is not a sequence's state."""
    report = cache.report().to_dict()
    tables = [(x.tolist() for x in row) for layer in sorted(cache.attention_layers) for row in cache.materialize(layer)]
    kept = ("columns", "logical_tokens", "stored", "stored_tokens", "states", "lost_slots", "dense_bytes", "counts")
    used = {k: v for k, v in report["bytes_by_kind"].items() if k.startswith("pages")}
    return {k: report[k] for k in kept}, used, [list(row) for row in tables]


def forward(model, cache, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


def armed(layer, when):
    """Raise before or after the attention module of `layer` at its next call."""

    def fail(*_):
        handle.remove()
        raise Fault

    module = layer.self_attn
    handle = module.register_forward_pre_hook(fail) if when == "before" else module.register_forward_hook(fail)


def prefilled(model):
    ids, mask = padded(length=30)
    cache = ours(model)
    forward(model, cache, ids, mask)
    return cache, torch.cat([mask, torch.ones(4, 3, dtype=torch.long)], 1), torch.tensor([[5, 6, 7]] * 4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_fault_at_a_layer(name, layer, when):
    model = patch(build(name))
    reference, mask, new = prefilled(model)
    expected = forward(model, reference, new, mask)
    cache, _, _ = prefilled(model)
    before = state(cache)
    armed(model.model.layers[layer], when)
    with pytest.raises(Fault):
        forward(model, cache, new, mask)
    assert state(cache) == before
    assert torch.equal(forward(model, cache, new, mask), expected)
    assert state(cache) == state(reference)


def test_fault_in_the_first_forward_leaves_no_rows():
    model = patch(build("llama"))
    cache = ours(model)
    armed(model.model.layers[2], "after")
    ids, mask = padded()
    with pytest.raises(Fault):
        forward(model, cache, ids, mask)
    assert (cache.columns, cache.sequences, cache.report().stored_tokens) == (0, (), 0)
    assert forward(model, cache, ids[:2], mask[:2]).shape[0] == 2  # another batch size is fine


def test_fault_in_compiled_code():
    """Compiled code runs no always-called hook: the next step rolls the open one back."""
    torch._dynamo.reset()
    model = patch(build("llama"))
    model.compile(backend="eager")
    reference, mask, new = prefilled(model)
    expected = forward(model, reference, new, mask)
    cache, _, _ = prefilled(model)
    armed(model.model.layers[1], "after")
    with pytest.raises(Fault):
        forward(model, cache, new, mask)
    assert torch.equal(forward(model, cache, new, mask), expected)
    assert state(cache) == state(reference)


def test_fault_at_the_core(monkeypatch):
    from kvstrata.testing import fault

    model = patch(build("llama"))
    reference, mask, new = prefilled(model)
    expected = forward(model, reference, new, mask)
    cache, _, _ = prefilled(model)
    before = state(cache)
    with fault("append.after_take", nth=3), pytest.raises(RuntimeError, match="fault injected"):
        forward(model, cache, new, mask)
    assert state(cache) == before
    assert torch.equal(forward(model, cache, new, mask), expected)


def test_a_broken_hybrid_says_so_until_reset():
    model = patch(build("qwen3_next"))
    cache, mask, new = prefilled(model)
    module = model.model.layers[3].self_attn

    def fail(*_):
        handle.remove()
        raise Fault

    handle = module.register_forward_hook(fail)
    with pytest.raises(Fault):
        forward(model, cache, new, mask)
    for use in (lambda: forward(model, cache, new, mask), cache.fork, lambda: cache.crop(0), lambda: cache.select([0])):
        with pytest.raises(RuntimeError, match=r"broken.*call reset\(\)"):
            use()
    cache.reset()
    ids, mask = padded(length=30)
    assert torch.equal(forward(model, cache, ids, mask), forward(model, ours(model), ids, mask))


def test_a_refused_input_does_not_break_a_hybrid():
    model = patch(build("qwen3_next"))
    cache, mask, new = prefilled(model)
    with pytest.raises(ValueError, match="attention_mask must be"):
        forward(model, cache, new, mask[:, :-1])
    forward(model, cache, new, mask)
