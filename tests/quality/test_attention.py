"""Captured attention mass, against the attention matrices that transformers itself gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstrata.quality import attention, metrics
from kvstrata.quality.contenders import Contender
from kvstrata.quality.measure import Subject, Tokens, measure
from kvstrata.quality.reader import Reader
from kvstrata.quality.run import Config, made_example, subject

transformers = pytest.importorskip("transformers")
STREAMING = Contender("streaming", "50%")


@pytest.fixture(scope="module")
def asked(model_folder: Path) -> Subject:
    return subject(str(model_folder), "auto")[0]


@pytest.fixture(scope="module")
def tokens(asked: Subject, model_folder: Path) -> Tokens:
    config = Config(str(model_folder), ("text",), ("full",), (), (), (1024,), 1)
    return asked.tokens(made_example(config, "text", 1024, 0))


@pytest.fixture(scope="module")
def matrices(model_folder: Path, tokens: Tokens) -> list[torch.Tensor]:
    """Per layer f32 [Hq, T, N]: what the continuation's queries give to the context's tokens."""
    model = transformers.LlamaForCausalLM.from_pretrained(model_folder, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(torch.tensor([tokens.context + tokens.continuation]), output_attentions=True)
    n = len(tokens.context)
    return [layer[0, :, n:, :n] for layer in out.attentions]


def test_mass_is_that_of_the_attention_matrices(asked: Subject, tokens: Tokens, matrices: list[torch.Tensor]) -> None:
    _, found = asked.dense(tokens)
    assert len(found) == len(matrices) == 2
    for got, matrix in zip(found, matrices, strict=True):
        want = matrix.unflatten(0, (2, 2)).sum((1, 2))  # 2 KV heads of 2 query heads
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_full_captures_all_and_streaming_what_it_keeps(
    asked: Subject, tokens: Tokens, matrices: list[torch.Tensor]
) -> None:
    full = measure(asked, tokens, Contender("full", None), "query-agnostic")
    assert full["captured_mass"] == [1.0, 1.0]
    reader = Reader(asked.model, STREAMING.make(asked.model, tokens.total), asked.stops)
    reader.read(tokens.context)
    reader.compress()
    n, kept = len(tokens.context), reader.cache.stored_length(0, 0, 0)
    sinks = reader.cache.report().sinks
    assert sinks < kept < 0.6 * n
    held = [*range(sinks), *range(n - kept + sinks, n)]  # the first tokens and the last ones
    want = [float(m[:, :, held].sum() / m.sum()) for m in matrices]
    got = measure(asked, tokens, STREAMING, "query-agnostic")["captured_mass"]
    assert got == pytest.approx(want, abs=1e-4) and max(got) < 0.99


def test_a_peer_cannot_say(asked: Subject, tokens: Tokens) -> None:
    record = measure(asked, tokens, Contender("DynamicCache", None), "query-agnostic")
    assert record["captured_mass"] is None and record["kl"] == 0.0  # watching changes nothing
    key = ("text", 1024, 0, "DynamicCache", "")
    assert metrics.cells({key: record})[0]["captured_mass"] is None


@pytest.mark.parametrize("window", [None, 5, 40])
def test_mass_with_everything_that_attention_knows(window: int | None) -> None:
    torch.manual_seed(0)
    before, length, heads, group, d = 30, 6, 2, 3, 8
    q, k = torch.randn(heads * group, length, d), torch.randn(heads, before + length, d)
    sinks, scale, cap = torch.randn(heads * group), 0.7, 2.0
    want = torch.zeros(heads, before)
    for head in range(heads * group):
        for t in range(length):
            at = before + t
            seen = range(0 if window is None else max(0, at - window + 1), at + 1)
            z = {j: cap * torch.tanh(scale * q[head, t] @ k[head // group, j] / cap) for j in seen}
            whole = sum(torch.exp(x) for x in z.values()) + torch.exp(sinks[head])
            for j, x in z.items():
                if j < before:
                    want[head // group, j] += torch.exp(x) / whole
    kept = before + length if window is None else min(before + length, window - 1 + length)
    got = attention.mass(q, k[:, -kept:], before, window, scale=scale, softcap=cap, sinks=sinks)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
