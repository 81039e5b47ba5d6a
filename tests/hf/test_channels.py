"""The step reaches every attention call, by either channel; where it does not, nothing is answered."""

from __future__ import annotations

import pytest
import torch
from modes import ours, padded, prompt, run
from tiny import BUILDERS, build
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstrata.config import Unsupported
from kvstrata.hf import KVCache, hooks, patch, step
from kvstrata.hf.step import Forward


def forbid_fallback(monkeypatch, model):
    from kvstrata.hf.decoder import decoder_of

    def never(module, *args, **kwargs):
        raise AssertionError(f"{type(module).__name__} fell back")

    name = decoder_of(model).config._attn_implementation
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS[name], "fallback", never)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_attention_call_has_a_step(name, monkeypatch):
    model = patch(build(name))
    forbid_fallback(monkeypatch, model)
    calls, forwards = [], []
    attend, audit = Forward.attend, Forward.audit
    monkeypatch.setattr(Forward, "attend", lambda self, *a: (calls.append(1), attend(self, *a))[1])
    monkeypatch.setattr(Forward, "audit", lambda self: (forwards.append(len(self.noted)), audit(self))[1])
    cache = ours(model)
    ids, mask = padded()
    run(model, cache, ids, new=6, attention_mask=mask)
    assert len(forwards) == 6
    assert len(calls) == sum(forwards) == 6 * len(cache.attention_layers)


def test_stablelm_drops_keyword_arguments_and_needs_channel_two(monkeypatch):
    model = patch(build("stablelm"))
    run(model, ours(model), prompt(), new=2)
    monkeypatch.setattr(step, "_from_context", lambda module: None)
    cache = ours(model)
    with pytest.raises(Unsupported, match=r"did not reach every layer: expected \[0, 1, 2, 3\].*attended \[\]"):
        run(model, cache, prompt(), new=2)
    assert cache.columns == 0 and cache.sequences == ()


def test_llama_needs_no_context_variable(monkeypatch):
    model = patch(build("llama"))
    expected = run(model, ours(model), prompt(), new=4)
    monkeypatch.setattr(step, "_from_context", lambda module: None)
    assert run(model, ours(model), prompt(), new=4) == expected


def test_a_model_that_drops_both_channels_is_caught(monkeypatch):
    model = patch(build("llama"))
    monkeypatch.setattr(step, "_from_context", lambda module: None)
    monkeypatch.setattr(hooks, "STEP", "lost_on_the_way")
    with pytest.raises(Unsupported, match="did not reach every layer"):
        run(model, ours(model), prompt(), new=2)


def test_the_step_is_opaque_to_accelerate():
    from accelerate.utils import send_to_device

    seen = []
    model = patch(build("llama"))
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs[step.STEP]), with_kwargs=True
    )
    with torch.no_grad():
        model(prompt(), past_key_values=KVCache.for_model(model))
    hook.remove()
    assert send_to_device(seen[0], "meta") is seen[0]


def test_a_call_leaves_no_context_behind():
    model = patch(build("gemma3_mm"))
    run(model, ours(model), prompt(), new=2)
    assert step.current.get() is None
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 10**6), past_key_values=KVCache.for_model(model))
    assert step.current.get() is None
