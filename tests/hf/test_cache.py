"""Lengths, verbs and bytes of a KVCache."""

from __future__ import annotations

import copy
import gc
import json

import modes
import pytest
import torch
from modes import ours, padded, prompt, run
from rich.console import Console
from tiny import build
from transformers import DynamicCache

from kvstrata import testing
from kvstrata.config import Unsupported
from kvstrata.hf import KVCache, patch


@pytest.fixture
def model():
    return patch(build("llama"))


def forward(model, cache, ids, mask=None):
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def used(cache):
    """Bytes of pages that hold something."""
    return sum(n for kind, n in cache.report().bytes_by_kind.items() if kind.startswith("pages"))


def test_three_lengths(model):
    cache = ours(model)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    ids, mask = padded()
    forward(model, cache, ids, mask)
    assert [cache.logical_length(i) for i in range(4)] == [13, 5, 1, 9]
    assert [cache.logical_length(s) for s in cache.sequences] == [13, 5, 1, 9]
    assert [cache.stored_length(3, i, 1) for i in range(4)] == [13, 5, 1, 9]
    assert (cache.columns, cache.get_seq_length(), cache.get_seq_length(3), cache.get_query_offset()) == (13,) * 4
    assert cache.get_mask_sizes(4, 2) == (17, 0) and cache.layers[2].get_mask_sizes(4) == (17, 0)
    assert (cache.get_max_length(), cache.layers[0].get_max_length(), cache.batch_size) == (-1, -1, 4)
    assert (len(cache), cache.is_initialized, cache.is_compileable, cache.is_croppable) == (4, True, False, True)
    assert all(layer.keys is None and layer.values is None for layer in cache.layers)


def test_a_layer_counts_the_open_step_once_it_was_updated(model):
    cache, seen = ours(model), []

    def look(*_):
        seen.append([cache.get_seq_length(i) for i in range(4)])

    model.model.layers[2].register_forward_pre_hook(look)
    forward(model, cache, prompt())
    assert seen == [[13, 13, 0, 0]]


def test_outputs_carry_the_same_cache(model):
    cache = ours(model)
    out = model.generate(prompt(), max_new_tokens=4, past_key_values=cache, return_dict_in_generate=True)
    assert out.past_key_values is cache


def test_materialize_gives_the_keys_the_model_made(model):
    dense, cache = DynamicCache(), ours(model)
    ids = prompt()
    with torch.no_grad():
        build("llama")(ids, past_key_values=dense)
    forward(model, cache, ids)
    for layer in range(4):
        ((k, v, positions),) = (row[:3] for row in cache.materialize(layer))
        assert positions.tolist() == [list(range(13))] * 2
        torch.testing.assert_close(k, dense.layers[layer].keys[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, dense.layers[layer].values[0], atol=1e-5, rtol=1e-5)


def test_select_reorders_repeats_and_frees(model):
    cache = ours(model)
    ids, mask = padded()
    forward(model, cache, ids, mask)
    cache.select(torch.tensor([3, 0, 3, -1]))
    assert [cache.logical_length(i) for i in range(4)] == [9, 13, 9, 9]
    new, index = torch.tensor([[5], [6], [5], [7]]), [3, 0, 3, 3]
    longer = torch.cat([mask[index], torch.ones(4, 1, dtype=torch.long)], 1)
    got = forward(model, cache, new, longer)
    for row, source in enumerate(index):
        alone = ours(model)
        real = ids[source : source + 1, mask[source].bool()]
        forward(model, alone, real)
        torch.testing.assert_close(got[row], forward(model, alone, new[row : row + 1])[0], atol=2e-4, rtol=2e-4)
    cache.batch_select_indices(torch.tensor([False, True, False, False]))
    assert (cache.batch_size, cache.logical_length(0)) == (1, 14)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_repeat_equals_a_repeated_prompt(name):
    model = patch(build(name))
    ids = prompt(2)
    cache, whole = ours(model), ours(model)
    forward(model, cache, ids[:, :-1])
    pages = used(cache)
    cache.repeat(3)
    assert used(cache) == pages  # shared
    forward(model, whole, ids[:, :-1].repeat_interleave(3, 0))
    new = prompt(6, 2, seed=4)
    torch.testing.assert_close(forward(model, cache, new), forward(model, whole, new), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_next"])
def test_forks_share_pages_and_go_their_own_way(name):
    model = patch(build(name))
    cache = ours(model)
    ids = prompt(1, 48)
    forward(model, cache, ids)
    pages = used(cache)
    other = copy.deepcopy(cache)
    assert used(cache) == pages and other.columns == 48
    left, right = prompt(1, 5, seed=4), prompt(1, 7, seed=5)
    forward(model, cache, left)
    got = forward(model, other, right)
    assert (cache.columns, other.columns) == (53, 55)
    alone = ours(model)
    forward(model, alone, ids)
    torch.testing.assert_close(got, forward(model, alone, right), atol=2e-4, rtol=2e-4)


def test_a_dropped_fork_gives_its_pages_back(model):
    cache = ours(model)
    forward(model, cache, prompt(1, 48))
    pages, copies = used(cache), [cache.fork() for _ in range(3)]
    for i, fork in enumerate(copies):
        forward(model, fork, prompt(1, 40, seed=i))
    assert used(cache) > pages
    del fork
    copies.clear()
    assert used(cache) == pages  # by reference count, without the garbage collector


def test_after_reset_the_cache_is_as_new(model):
    cache = ours(model)
    fresh = cache.report().to_dict()
    expected = run(model, cache, prompt(), new=6)
    cache.reset()
    cache.trim()
    report = cache.report().to_dict()
    assert (cache.columns, cache.sequences, used(cache)) == (0, (), 0)
    assert {k: report[k] for k in ("stored_tokens", "logical_tokens")} == {
        k: fresh[k] for k in ("stored_tokens", "logical_tokens")
    }
    ids, mask = padded()
    forward(model, cache, ids, mask)  # another batch size, with padding
    cache.reset()
    assert run(model, cache, prompt(), new=6) == expected


def test_crop_goes_back_in_padded_rows(model):
    cache, straight = ours(model), ours(model)
    ids, mask = padded(length=20)
    forward(model, straight, ids[:, :14], mask[:, :14])
    forward(model, cache, ids, mask)
    cache.crop(-6)
    assert [cache.logical_length(i) for i in range(4)] == [straight.logical_length(i) for i in range(4)]
    again, longer = prompt(4, 3, seed=8), torch.cat([mask[:, :14], torch.ones(4, 3, dtype=torch.long)], 1)
    assert torch.equal(forward(model, cache, again, longer), forward(model, straight, again, longer))


def test_recording_is_one_switch(model):
    cache = ours(model)
    cache.activate_past_recording()
    assert all(cache.is_recording_past(i) if hasattr(cache, "is_recording_past") else True for i in range(4))
    assert [layer.record_past for layer in cache.layers] == [True] * 4
    cache.layers[2].record_past = False
    assert [layer.record_past for layer in cache.layers] == [False] * 4


def test_a_chunk_of_nothing_but_padding(model):
    """Extra left padding: columns without a real token in any row."""
    ids, mask = padded()
    wide = torch.cat([torch.zeros(4, 9, dtype=torch.long), ids], 1)
    wide_mask = torch.cat([torch.zeros(4, 9, dtype=torch.long), mask], 1)
    cache, plain = ours(model), ours(model)
    forward(model, cache, wide[:, :5], wide_mask[:, :5])
    forward(model, cache, wide[:, 5:9], wide_mask[:, :9])
    assert (cache.columns, [cache.logical_length(i) for i in range(4)]) == (9, [0] * 4)
    got = forward(model, cache, wide[:, 9:], wide_mask)
    assert torch.equal(got[mask.bool()], forward(model, plain, ids, mask)[mask.bool()])


def test_pad_queries_do_not_disturb(model):
    ids, mask = padded()
    other = ids.clone()
    other[mask == 0] = 50
    outs = [forward(model, ours(model), x, mask)[mask.bool()] for x in (ids, other)]
    assert torch.equal(*outs)


def test_report(model):
    cache = ours(model)
    ids, mask = padded()
    forward(model, cache, ids, mask)
    report = cache.report()
    assert json.loads(json.dumps(report.to_dict()))["columns"] == 13
    assert report.logical_tokens == (13, 5, 1, 9)
    assert report.nbytes == cache.nbytes() == sum(report.bytes_by_kind.values())
    console = Console(record=True, width=100)
    console.print(report)
    assert "columns fed: 13" in console.export_text()


def test_recurrent_states_count_as_bytes():
    model = patch(build("qwen3_next"))
    cache = ours(model)
    before = cache.nbytes()
    forward(model, cache, prompt())
    states = sum(
        t.nbytes for x in cache.layers if hasattr(x, "conv_states") for t in (x.conv_states[0], x.recurrent_states[0])
    )
    assert cache.report().bytes_by_kind["recurrent states"] == states > 0
    assert cache.nbytes() - before >= states
    assert cache.nbytes() == cache.report().nbytes == sum(cache.report().bytes_by_kind.values())


POLICIES = [("full", None), ("full", "1MiB"), ("streaming", "35tok")]


@pytest.mark.parametrize("mode", ["left_padded", "beams", "chunks", "lookup"])
@pytest.mark.parametrize(("policy", "budget"), POLICIES)
def test_policies_stay_within_budget_and_repeat_themselves(model, policy, budget, mode, monkeypatch):
    caches, over = [], []

    def make(model):
        caches.append(KVCache.for_model(model, policy=policy, budget=budget))
        return caches[-1]

    close = type(make(model)._batch).close

    def watched(batch, forward, failed):
        close(batch, forward, failed)
        report = batch.core.report()
        if report.limit_bytes is not None and report.nbytes > report.limit_bytes:
            over.append(report.nbytes)
        if policy == "streaming" and max(map(max, report.stored)) > 35 and not batch.feed.recording:
            over.append(report.stored)

    monkeypatch.setattr("kvstrata.hf.batch.Batch.close", watched)
    runs = [getattr(modes, mode)(model, make) for _ in range(2)]
    assert runs[0] == runs[1]
    assert not over
    if policy == "streaming" and mode == "left_padded":
        assert runs[0] != getattr(modes, mode)(model, modes.stock)  # 49 tokens do not fit into 35


def test_sequences_end_with_the_cache(model):
    cache = ours(model)
    core = cache.cache
    forward(model, cache, prompt(2))
    assert len(core.report().logical_tokens) == 2
    del cache
    gc.collect()
    assert core.report().logical_tokens == ()


def test_append_takes_over_a_dense_cache(model):
    """A prompt's keys and values from elsewhere, in two chunks: the next logits are those of the model's own prefill."""
    ids, dense = prompt(), DynamicCache()
    whole = forward(model, ours(model), ids)
    forward(model, dense, ids[:, :-1])
    cache, n = ours(model), ids.shape[1] - 1
    for first, last in ((0, 5), (5, n)):
        layers = [(layer.keys[:, :, first:last], layer.values[:, :, first:last]) for layer in dense.layers]
        cache.append([k for k, _ in layers], [v for _, v in layers])
    assert (cache.columns, cache.logical_length(0)) == (n, n)
    torch.testing.assert_close(forward(model, cache, ids[:, -1:])[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"append: keys has 1 layers, expected 4"):
        cache.append([layers[0][0]], [layers[0][1]])
    with pytest.raises(ValueError, match="append: batch size is 2, expected 1"):
        cache.append([k.repeat(2, 1, 1, 1) for k, _ in layers], [v.repeat(2, 1, 1, 1) for _, v in layers])
    assert cache.columns == n + 1


def test_append_where_the_plan_after_it_fails(model):
    """The tokens stand, in the cache and in its columns; a cache of recurrent layers is refused."""
    cache = KVCache.for_model(model, policy="keydiff", budget="120KiB")
    forward(model, cache, torch.randint(0, 50, (1, 700)))
    heads = [(f.kv_heads, f.head_dim, f.dtype) for f in cache._batch.facts.layers]
    new = [torch.randn(1, h, 8, d).to(dtype) for h, d, dtype in heads]
    due = cache.cache.policy.interval // 8 + 1
    with testing.fault("plan.after_check"), pytest.raises(RuntimeError):
        for _ in range(due):
            cache.append(new, new)
    assert cache.columns == cache.logical_length(0) > 700
    hybrid = patch(build("qwen3_next"))
    with pytest.raises(Unsupported, match="append: the model has recurrent layers"):
        KVCache.for_model(hybrid).append(new, new)
