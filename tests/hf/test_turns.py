"""A turn over a compressed cache is causal: what a token says later moves no earlier logit."""

from __future__ import annotations

import pytest
import torch
from modes import prompt
from tiny import VOCAB, build

from kvstrata.hf import KVCache, patch
from kvstrata.policy.base import STATES

PROMPT = 200


@pytest.fixture(scope="module")
def model():
    return patch(build("llama", 64))


def over_compressed(model, policy, turn):
    """Logits f32 [n, VOCAB] of a second turn i64 [1, n] over a prompt that the policy has compressed."""
    cache = KVCache.for_model(model, policy=policy, budget="760KiB")
    with torch.no_grad():
        model(prompt(1, PROMPT), past_key_values=cache)
        states = cache.report().states
        assert states["evicted"] + sum(states.get(name, 0) for name in STATES) > 0.3 * PROMPT * cache.cache.shape.rows
        logits = model(turn, past_key_values=cache).logits[0]
    assert cache.logical_length(0) == PROMPT + turn.shape[1]
    return logits


@pytest.mark.parametrize("length", [40, 100, 12])
@pytest.mark.parametrize("policy", ["arkv", "h2o", "snapkv"])
def test_the_last_token_of_a_turn_moves_no_earlier_logit(model, policy, length):
    """Exactly 0: in a turn that is cut, one longer than a chunk, and one that is stored as decoding stores."""
    turn = prompt(1, length, seed=9)
    other = turn.clone()
    other[0, -1] = turn[0, -1] % (VOCAB - 11) + 1
    first, second = (over_compressed(model, policy, t) for t in (turn, other))
    assert torch.equal(first[:-1], second[:-1])
    assert not torch.equal(first[-1], second[-1])
