"""A patched model with any other cache, without one, and in training: bit for bit as unpatched."""

from __future__ import annotations

import pytest
import torch
from modes import padded, prompt, run
from tiny import BUILDERS, HYBRID, build
from transformers import DynamicCache, StaticCache

from kvstrata.hf import patch

NO_STATIC = {(name, "static") for name in HYBRID}


def both(name):
    return build(name), patch(build(name))


CELLS = [(name, kind) for name in BUILDERS for kind in ("none", "dynamic", "static") if (name, kind) not in NO_STATIC]


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_logits_with_a_foreign_cache(name, kind):
    ids, mask = padded()
    outs = []
    for model in both(name):
        config = model.config.get_text_config(decoder=True)
        cache = {"none": None, "dynamic": DynamicCache(config=config)}.get(kind)
        if kind == "static":
            cache = StaticCache(config=config, max_cache_len=32)
        with torch.no_grad():
            first = model(ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None).logits
            if cache is None:
                outs.append((first,))
                continue
            longer = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
            second = model(ids[:, -1:], attention_mask=longer, past_key_values=cache, use_cache=True).logits
            outs.append((first, second))
    for mine, theirs in zip(*outs, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_training(name, checkpointing):
    ids = prompt(rows=2)
    grads = []
    for model in both(name):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert any(g is not None and g.abs().max() > 0 for g in grads[0])
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def test_packed_rows_without_a_cache():
    """position_ids that restart: the fallback's mask function sees every argument."""
    ids, positions = prompt(length=8), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with torch.no_grad():
        plain, with_kv = (m(ids, position_ids=positions, use_cache=False).logits for m in both("llama"))
    assert torch.equal(plain, with_kv)
    with torch.no_grad():
        assert not torch.allclose(plain, build("llama")(ids, use_cache=False).logits)


def test_output_attentions_of_an_eager_model_without_a_cache():
    model = build("gemma2")
    ids = prompt()
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
        got = patch(model)(ids, output_attentions=True).attentions
    assert len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_generate_without_our_cache():
    plain, with_kv = both("mistral")
    assert run(plain, None, prompt()) == run(with_kv, None, prompt())
