"""Layer sensitivity: keys of two caches in lockstep, against one dense forward under a mask of what the small one sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import WINDOW, build
from transformers import DynamicCache

from kvstrata import Cache, LayerSpec, Shape, Unsupported
from kvstrata.budget import Sensitivity
from kvstrata.budget.allocate import RowsSeen
from kvstrata.cli.text import ByteTokenizer
from kvstrata.episodes import sensitivity
from kvstrata.hf import chat_model

N, SINKS = 600, 128
SETTINGS = [(160, 64), (208, 48), (256, 16), (176, 40)]
"""Budget and chunk; the last chunk is shorter where it does not divide N."""


def chat(name):
    return chat_model(build(name), ByteTokenizer(), style="transcript", max_positions=4096)


def text(n=N, seed=5):
    return torch.randint(1, 86, (n,), generator=torch.Generator().manual_seed(seed))


def window_of(budget, sinks=SINKS):
    """The recent tokens that ``streaming`` keeps: whole pages, with room for one that fills."""
    return (budget - sinks - 15) // 16 * 16


def seen_by_small(budget, chunk, n=N, sinks=SINKS):
    """bool [n, n]: the pairs (query, key) of a text read in chunks with only sinks and whole recent pages kept between them."""
    q, k = torch.arange(n)[:, None], torch.arange(n)[None]
    begin = q // chunk * chunk
    tail = (begin - window_of(budget, sinks)) // 16 * 16
    return (k <= q) & ((k < sinks) | (k >= tail))


def keys_under(name, visible):
    """Keys [H, N, D] of each layer that attends to all, of one dense forward in which ``visible`` pairs are."""
    model, ids = build(name), text()[None]
    q, k = torch.arange(N)[:, None], torch.arange(N)[None]
    masks = {"full_attention": visible, "sliding_attention": (k <= q) & (k > q - WINDOW)}
    masks = {kind: torch.zeros(N, N).masked_fill(~mask, -torch.inf)[None, None] for kind, mask in masks.items()}
    kinds = getattr(model.config, "layer_types", None)
    cache = DynamicCache()
    with torch.no_grad():
        mask = masks if kinds and len(set(kinds)) > 1 else masks["full_attention"]
        model.model(input_ids=ids, attention_mask=mask, past_key_values=cache, position_ids=torch.arange(N)[None])
    full = [i for i in range(4) if not kinds or kinds[i] == "full_attention"]
    return [cache.layers[i].keys[0] for i in full]


def first_cut(visible):
    """The first token that does not see all before it."""
    return int((visible.sum(1) < torch.arange(1, N + 1)).nonzero()[0])


@pytest.mark.parametrize(("budget", "chunk"), SETTINGS)
def test_the_small_cache_sees_what_the_mask_shows(budget, chunk, monkeypatch):
    """All pairs of 600 tokens, in every layer and head."""
    chatting, expected = chat("llama"), seen_by_small(budget, chunk)
    seen = torch.zeros(4, 2, N, N, dtype=torch.bool)
    step = Cache.step

    def noted(cache, seqs, lengths):
        if cache.policy.name == "streaming":
            first = cache.logical_length(seqs[0])
            own = torch.ones(lengths[0], lengths[0], dtype=torch.bool).tril()
            seen[:, :, first : first + lengths[0], first : first + lengths[0]] = own
            for layer in range(4):
                for head, positions in enumerate(cache.materialize(layer, seqs[0])[2]):
                    seen[layer, head, first : first + lengths[0], positions[positions >= 0].long()] = True
        return step(cache, seqs, lengths=lengths)

    monkeypatch.setattr(Cache, "step", noted)
    profile = sensitivity(chatting, [text()], budget, chunk)
    assert torch.equal(seen, expected.expand_as(seen))
    assert first_cut(expected) % chunk == 0 and profile.tokens == N - first_cut(expected)
    assert expected[-1].sum() <= budget + chunk


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(("budget", "chunk"), SETTINGS)
def test_profile_equals_dense_forwards_under_masks(name, budget, chunk):
    visible = seen_by_small(budget, chunk)
    whole, small = keys_under(name, torch.ones(N, N, dtype=torch.bool).tril()), keys_under(name, visible)
    since = first_cut(visible)
    profile = sensitivity(chat(name), [text()], budget, chunk)
    assert len(profile.sigma) == len(whole) == (4 if name == "llama" else 2)
    for found, a, b in zip(profile.sigma, whole, small, strict=True):
        a, b = a[:, since:].double(), b[:, since:].double()
        cosines = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        assert abs(found - float(cosines.mean())) < 1e-5
    assert max(profile.sensitivity) > 0.01  # something is lost
    assert profile.spread == (0.0,) * len(whole)


def test_keys_of_the_first_layer_see_no_context():
    profile = sensitivity(chat("llama"), [text()], 160, 64)
    assert profile.sensitivity[0] == 0 and (profile.sensitivity[1:] > 0.01).all()


def test_a_model_that_heeds_no_context_is_stable_and_gets_a_uniform_budget():
    table = torch.randn(96, 2, 16, generator=torch.Generator().manual_seed(1))

    class Deaf:
        """Its keys are of its tokens alone."""

        shape = Shape([LayerSpec(2, 4, 16)] * 3, torch.float32)
        max_positions, fingerprint = 4096, "a" * 64

        def forward(self, ids, positions, step, logits="last"):
            assert logits == "none" and torch.equal(positions, torch.arange(positions[0], positions[0] + len(ids)))
            for layer in range(3):
                k = table[ids] * (layer + 1)
                step.attend(layer, k.repeat_interleave(2, 1), k, k)

    profile = sensitivity(Deaf(), [text()], 160, 64)
    assert profile.sensitivity.tolist() == [0, 0, 0] and profile.model_hash == "a" * 64
    seen = RowsSeen(torch.full((3, 2), 400), torch.full((1, 3), 64), unit=64)
    for alike in (profile, replace(profile, sigma=(0.9,) * 3)):
        given = Sensitivity(alike).allocate(seen, 64 * 30).bytes
        assert given.tolist() == [[320, 320]] * 3


def test_several_texts():
    chatting, texts = chat("llama"), [text(seed=seed) for seed in (5, 6, 7)]
    each = [sensitivity(chatting, [ids], 160, 64) for ids in texts]
    both = sensitivity(chatting, texts, 160, 64)
    sigma = torch.tensor([p.sigma for p in each], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(both.sigma, dtype=torch.float64), sigma.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.tensor(both.spread, dtype=torch.float64), sigma.std(0, correction=0), rtol=0, atol=1e-12
    )
    assert both.spread[1] > 0 and both.tokens == sum(p.tokens for p in each)
    assert both.model_hash == chatting.fingerprint
    assert len({both.text_hash, *(p.text_hash for p in each)}) == 4
    assert sensitivity(chatting, texts, 160, 64) == both


def test_profile_comes_back_for_its_model_and_text_alone(tmp_path):
    profile = sensitivity(chat("llama"), [text()], 160, 64)
    profile.save(tmp_path / "profile.json")
    assert type(profile).load(tmp_path / "profile.json", chat("llama").fingerprint, profile.text_hash) == profile
    with pytest.raises(ValueError, match="another model"):
        type(profile).load(tmp_path / "profile.json", chat("qwen3").fingerprint)


def test_refusals():
    chatting = chat("llama")
    cases = [
        ([text()], 160, 0, "chunk is 0"),
        ([], 160, 64, "texts is empty"),
        ([text(), text(447)], 160, 64, r"texts\[1\] is torch.int64 \[447\], expected .* T in 448..4096"),
        ([text(4097)], 160, 64, r"texts\[0\] is torch.int64 \[4097\]"),
        ([text()[None]], 160, 64, r"texts\[0\] is torch.int64 \[1, 600\]"),
        ([text().float()], 160, 64, r"texts\[0\] is torch.float32"),
        ([text()], 140, 64, "budget"),
    ]
    for texts, budget, chunk, message in cases:
        with pytest.raises(ValueError, match=message):
            sensitivity(chatting, texts, budget, chunk)
    assert sensitivity(chatting, [text(448)], 160, 64).tokens > 0
    with pytest.raises(Unsupported, match="every layer has a sliding window"):
        sensitivity(chat("mistral"), [text()], 160, 64)
