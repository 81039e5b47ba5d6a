"""What was evicted is gone, and only that: a dense cache with a per-head mask over the same columns agrees."""

from __future__ import annotations

import pytest
import torch
from modes import ours, padded
from tiny import WINDOW, build
from transformers import DynamicCache

from kvstrata.hf import patch

NEW = 12


def drop_half(cache, model):
    """Drop a random half of the slots of every (layer, row, head); what is kept, as bool [B, H, columns] per layer."""
    generator, hidden = torch.Generator().manual_seed(2), {}
    for layer in sorted(cache.attention_layers):
        rows = []
        for seq, (k, _, positions) in zip(cache.sequences, cache.materialize(layer), strict=True):
            keep = torch.rand(positions.shape, generator=generator) < 0.5
            cache.cache.drop(sorted(cache.attention_layers).index(layer), seq, keep)
            gone = torch.zeros(k.shape[0], cache.logical_length(seq), dtype=torch.bool)
            for head in range(k.shape[0]):
                gone[head, positions[head][~keep[head] & (positions[head] >= 0)].long()] = True
            rows.append(gone)
        hidden[layer] = rows
    return hidden


def dense_mask(hidden, pads, columns, queries, heads, window):
    """Additive f32 [B, Hq, queries, columns]: causal, windowed, no padding, and nothing that was dropped."""
    batch = len(hidden)
    column = torch.arange(columns)
    query = torch.arange(columns - queries, columns)[:, None]
    see = (column <= query) & (column > query - (window or columns + 1))
    see = see.expand(batch, heads, queries, columns).clone()
    for b, gone in enumerate(hidden):
        see[b, :, :, : pads[b]] = False
        for head in range(heads):
            kv = gone[head * gone.shape[0] // heads]
            see[b, head, :, pads[b] : pads[b] + len(kv)] &= ~kv
    return torch.where(see, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_dropping_half_of_the_slots(name):
    model, plain = patch(build(name)), build(name)
    ids, mask = padded(length=30)
    cache = ours(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        first = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
    hidden = drop_half(cache, model)
    assert cache.get_seq_length() == 30
    pads = (30 - mask.sum(1)).tolist()
    windows = [layer.window for layer in cache._batch.facts.layers]
    dense = DynamicCache()
    columns = [30]

    def give_mask(layer):
        def hook(module, args, kwargs):
            queries = kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1]
            gone = hidden[layer] if columns[0] > 30 else [torch.zeros(2, 0, dtype=torch.bool)] * 4
            kwargs["attention_mask"] = dense_mask(gone, pads, columns[0], queries, 4, windows[layer])
            return args, kwargs

        return hook

    for i, block in enumerate(plain.model.layers):
        block.self_attn.register_forward_pre_hook(give_mask(i), with_kwargs=True)
    with torch.no_grad():
        plain(ids, attention_mask=mask, position_ids=positions, past_key_values=dense)
    token = first.argmax(-1, keepdim=True)
    differs = False
    undropped = undropped_tokens(name, ids, mask)
    for step in range(NEW):
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        columns[0] += 1
        kwargs = {"attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            got = model(token, past_key_values=cache, **kwargs).logits[:, -1]
            expected = plain(token, past_key_values=dense, **kwargs).logits[:, -1]
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
        token = got.argmax(-1, keepdim=True)
        differs |= token.flatten().tolist() != undropped[step]
        assert cache.get_seq_length() == columns[0]
    assert differs  # the dropped slots mattered


def undropped_tokens(name, ids, mask):
    """The tokens after the first one, without eviction."""
    out = build(name).generate(ids, attention_mask=mask, max_new_tokens=NEW + 1, do_sample=False)
    return out[:, 31:].T.tolist()


def test_windows_are_narrower_than_the_prompt():
    assert WINDOW < 30
