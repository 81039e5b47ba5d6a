"""Uncompressed, a KVCache gives the tokens of DynamicCache: every model in every mode."""

from __future__ import annotations

from functools import cache

import modes
import pytest
import torch
from modes import MODES, RELEASE, ours, stock
from tiny import BUILDERS, HYBRID, WINDOWED, build

from kvstrata.hf import KVCache, patch

BY_NAME = {mode.__name__: mode for mode in MODES}


@cache
def pair(name, dim):
    """(unpatched, patched) models with equal weights."""
    plain, with_kv = build(name, dim), build(name, dim)
    plain.assistant = modes.noisy(plain)
    with_kv.assistant = plain.assistant
    return plain, patch(with_kv)


def stock_fails(name, mode):
    """The cells in which transformers itself refuses."""
    if name in HYBRID and mode in ("lookup", "assisted"):
        return "assisted generation"
    if name in HYBRID and mode == "repeated":
        return "has no attribute 'batch_repeat_interleave'"
    if RELEASE < (5, 18) and name in WINDOWED and mode == "assisted":
        return ".*"
    if name == "gemma3_mm" and mode == "embeddings":
        return "doesn't have its forwarding implemented"
    return None


FIRST = ("llama", "qwen3", "mistral", "gemma3", "gpt_oss", "qwen3_next")
ALWAYS = ("greedy", "left_padded", "beams_return", "chunks_padded", "assisted", "two_turns_full", "deepcopied")
"""Every model runs these; the models of FIRST run all. The other cells are marked slow."""


def cells():
    for name in BUILDERS:
        for mode in BY_NAME:
            marks = () if name in FIRST or mode in ALWAYS else pytest.mark.slow
            yield pytest.param(name, mode, marks=marks)


@pytest.mark.parametrize(("name", "mode"), list(cells()))
def test_tokens_equal_dynamic_cache(name, mode):
    check(name, 16, mode)


@pytest.mark.parametrize("mode", ["left_padded", "beams", "chunks", "lookup", "two_turns_full"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3"])
def test_tokens_equal_dynamic_cache_wide_heads(name, mode):
    check(name, 64, mode)


def check(name, dim, mode):
    plain, with_kv = pair(name, dim)
    torch.manual_seed(1)
    refused = stock_fails(name, mode)
    if refused is not None:
        with pytest.raises(Exception, match=refused):
            BY_NAME[mode](plain, stock)
        return
    expected = BY_NAME[mode](plain, stock)
    torch.manual_seed(1)
    if mode == "two_turns_chunked" and RELEASE < (5, 18):
        with pytest.raises(ValueError, match="attention_mask must be"):  # 5.17 restarts the positions
            BY_NAME[mode](with_kv, ours)
        return
    assert BY_NAME[mode](with_kv, ours) == expected


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_generated_depends_on_the_context(name):
    """Else equal tokens would prove nothing: another first token changes the rest, and the rest is not one token."""
    plain, _ = pair(name, 16)
    ids, other = modes.prompt(), modes.prompt()
    other[0, 8] += 1
    first, second = (modes.run(plain, None, x)[0][13:] for x in (ids, other))
    assert first != second
    assert len(set(first)) > 4


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_assisted_decoding_crops_to_every_depth(name, monkeypatch):
    """Rounds in which 0, 1, 2 and 3 drafts were rejected all occur, and a crop is never deeper than its round."""
    if RELEASE < (5, 18) and name in WINDOWED:
        pytest.skip("transformers 5.17 cannot assist a windowed model")
    _, with_kv = pair(name, 16)
    depths, crop = set(), KVCache.crop
    monkeypatch.setattr(KVCache, "crop", lambda self, n: (depths.add(int(n)), crop(self, n))[1])
    for seed in range(3, 9):
        modes.run(with_kv, ours(with_kv), modes.prompt(seed=seed), assistant_model=with_kv.assistant)
        if {0, -1, -2, -3} <= depths:
            break
    assert {0, -1, -2, -3} <= depths, depths
