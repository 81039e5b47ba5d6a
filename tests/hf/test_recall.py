"""A policy that selects and archives, with a budget that reads everything: the tokens of DynamicCache in every mode."""

from __future__ import annotations

from functools import cache

import modes
import pytest
import torch
from modes import MODES, stock
from tiny import build

from kvstrata.hf import KVCache, patch
from kvstrata.policy import icecache

BY_NAME = {mode.__name__: mode for mode in MODES if mode.__name__ not in ("two_turns_chunked", "assisted")}
"""Without those that some releases of transformers refuse; test_equality.py knows which."""
LONG = 600
"""Tokens of a prompt of which two segments are archived."""


@cache
def pair(name):
    """(unpatched, patched) models with equal weights."""
    plain, with_kv = build(name, 64), build(name, 64)
    plain.assistant = modes.noisy(plain)
    with_kv.assistant = plain.assistant
    return plain, patch(with_kv)


def reading_all(model, **kwargs):
    return KVCache.for_model(model, policy=icecache(8192, segment=256, segment_min=256, **kwargs))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("mode", BY_NAME)
def test_short_prompts(name, mode):
    plain, with_kv = pair(name)
    torch.manual_seed(0)
    expected = BY_NAME[mode](plain, stock)
    torch.manual_seed(0)
    assert BY_NAME[mode](with_kv, reading_all) == expected


def padded(rows=3):
    ids = modes.prompt(rows, LONG)
    mask = torch.ones_like(ids)
    for row, real in enumerate((LONG, LONG // 2, 7)):
        ids[row, : LONG - real], mask[row, : LONG - real] = 0, 0
    return ids, mask


@pytest.mark.parametrize("far", ["auto", None])
@pytest.mark.parametrize("beams", [1, 3])
def test_archived_prompts(beams, far):
    """Left-padded, greedy and with beams, which fork and reorder rows whose pages lie in the Far tier."""
    plain, with_kv = pair("llama")
    ids, mask = padded()
    expected = modes.run(plain, stock(plain), ids, new=20, attention_mask=mask, num_beams=beams)
    policy = icecache(8192, segment=256, segment_min=256)
    held = KVCache.for_model(with_kv, policy=policy, far=far)
    assert modes.run(with_kv, held, ids, new=20, attention_mask=mask, num_beams=beams) == expected
    report = held.report()
    assert (report.far_tokens > 0) == (far == "auto")


def test_few_tokens_read_give_the_same_text_twice():
    _, with_kv = pair("llama")
    ids = modes.prompt(2, LONG)
    runs = []
    for _ in range(2):
        held = KVCache.for_model(with_kv, policy="icecache", budget="128tok")
        runs.append(modes.run(with_kv, held, ids, new=30))
        assert held.report().recall.selections > 0
    assert runs[0] == runs[1]
