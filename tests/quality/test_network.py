"""The network that is trained is the Llama that is published."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
FILE = Path(__file__).resolve().parents[2] / "bench" / "quality" / "network.py"


@pytest.fixture(scope="module")
def network():
    spec = importlib.util.spec_from_file_location("network", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module


def test_same_logits_as_transformers(network) -> None:
    model, published = network.Model(), transformers.LlamaForCausalLM(network.CONFIG).eval()
    published.model.load_state_dict(model.state_dict())
    ids = torch.randint(0, network.CONFIG.vocab_size, (2, 50))
    positions = torch.stack([torch.arange(50), torch.arange(50) + 700])
    with torch.no_grad():
        got = model(ids, positions, torch.ones_like(ids, dtype=torch.bool)).view(2, 50, -1)
        want = published(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) <= 8e6


def test_first_layer_starts_on_the_tokens_before(network) -> None:
    model = network.Model()
    layer = model.layers[0]
    cos, sin = network.rotary(torch.arange(40)[None])
    x = layer.input_layernorm(model.embed_tokens(torch.randint(0, network.CONFIG.vocab_size, (1, 40))))
    q, k = (layer.self_attn[n](x).unflatten(-1, (-1, 64)).transpose(1, 2) for n in ("q_proj", "k_proj"))
    q, k = (t * cos + torch.cat((-t[..., 32:], t[..., :32]), -1) * sin for t in (q, k))
    logits = q @ k.repeat_interleave(2, 1).mT / 8 + torch.full((40, 40), -torch.inf).triu(1)
    for head, weights in enumerate(logits.softmax(-1)[0]):
        assert weights.diagonal(-head - 1).mean() > 0.5


def test_layers_with_a_window_see_sinks_and_what_is_near(network) -> None:
    model, tokens, window = network.Model(), 96, 4
    ids = torch.randint(0, network.CONFIG.vocab_size, (1, tokens))
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, -1] = True
    reach = len(model.layers) * (window - 1)

    def said(changed: int, windows: list[int | None]) -> torch.Tensor:
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % network.CONFIG.vocab_size
        with torch.no_grad():
            return model(other, torch.arange(tokens)[None], where, windows)

    near, whole = [window] * 4, [window, None, window, window]
    beyond = tokens - 2 - reach
    assert torch.equal(said(beyond, near), said(beyond - 30, near))
    for changed, windows in ((beyond + 1, near), (network.SINKS - 1, near), (beyond, whole)):
        assert not torch.equal(said(changed, windows), said(beyond, near))
