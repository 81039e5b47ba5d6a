"""A transformers model as a conversation runs it: forwards through a step that somebody else opened."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import talk
import torch
import transformers as tf
from modes import greedy, prompt, stock
from tiny import BUILDERS, HYBRID, build

from kvstrata import Cache, Unsupported, unpatch
from kvstrata.cli.text import ByteTokenizer
from kvstrata.episodes import Turn
from kvstrata.hf import patch, step
from kvstrata.hf.chat_model import chat_model
from kvstrata.hf.decoder import decoder_of, record_of
from kvstrata.hf.fingerprint import projections

NAMES = [name for name in BUILDERS if name not in HYBRID]
PARTS = [(0, 10, "none"), (10, 90, "last"), *((i, i + 1, "last") for i in range(90, 96))]
"""A small and a large chunk, then single tokens."""


def chat(model, **more):
    return chat_model(model, ByteTokenizer(), style="transcript", **more)


def dense(model, ids, positions):
    """Logits [T, V] of one dense forward. With a cache given, positions that jump are not taken for packed texts."""
    with torch.no_grad():
        fed = {"input_ids": ids[None], "position_ids": positions[None], "past_key_values": stock(model)}
        return model(**fed, use_cache=True).logits[0].float()


def fed(chat, ids, positions, parts=PARTS):
    """(end, logits) of each part that asks for them, through one sequence of a whole cache."""
    cache = Cache(chat.shape)
    (seq,) = cache.new(1)
    found = []
    for first, last, logits in parts:
        with cache.step([seq], lengths=[last - first]) as open_step:
            out = chat.forward(ids[first:last], positions[first:last], open_step, logits)
        assert (out is None) == (logits == "none")
        found += [] if out is None else [(last, out)]
    assert cache.logical_length(seq) == parts[-1][1]
    return found


def close(found, expected):
    for end, logits in found:
        assert logits.shape == expected[end - 1].shape and logits.dtype == torch.float32
        assert (logits - expected[end - 1]).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("jump", [0, 37])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_dense_models(name, jump):
    """Positions as given, also where they jump: after 40 tokens, inside the second chunk."""
    model, ids = build(name), prompt(length=96)[0]
    positions = torch.arange(96) + jump * (torch.arange(96) >= 40)
    expected = dense(model, ids, positions)
    if jump:  # they count for something
        assert (expected - dense(model, ids, torch.arange(96))).abs().max() > 1e-3
    close(fed(chat(model), ids, positions), expected)


def test_every_layer_hands_over_queries_keys_and_values():
    """What a step is given are the keys of a dense cache, and its answer goes on to the next layer."""
    model, ids = build("qwen3"), prompt(length=20)[0]
    cache = stock(model)
    with torch.no_grad():
        model(ids[None], past_key_values=cache)

    class Dense:
        def __init__(self):
            self.seen = {}

        def attend(self, layer, q, k, v, *, scale=None, softcap=None, sinks=None):
            assert q.shape == (20, 4, 16) and k.shape == v.shape == (20, 2, 16)
            self.seen[layer] = k
            out = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scale, enable_gqa=True
            )
            return out.transpose(0, 1)

    taken = Dense()
    logits = chat(model).forward(ids, torch.arange(20), taken)
    assert list(taken.seen) == [0, 1, 2, 3]
    for layer, k in taken.seen.items():
        torch.testing.assert_close(k.transpose(0, 1), cache.layers[layer].keys[0], rtol=0, atol=1e-5)
    close([(20, logits)], dense(model, ids, torch.arange(20)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_mm", "opt"])
def test_the_head_runs_for_one_token_or_none(name):
    model, ids = build(name), prompt(length=12)[0]
    chatting, rows = chat(model), []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.shape[:-1].numel()))
    fed(chatting, ids, torch.arange(12), [(0, 8, "none"), (8, 11, "last"), (11, 12, "none")])
    hook.remove()
    assert rows == [1]


def test_a_fault_leaves_the_step_to_its_owner_and_no_context():
    model, ids = build("llama"), prompt(length=12)[0]
    chatting = chat(model)
    cache = Cache(chatting.shape)
    (seq,) = cache.new(1)

    def fail(module, args):
        raise RuntimeError("lost")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="lost"), cache.step([seq], lengths=[12]) as open_step:
        chatting.forward(ids, torch.arange(12), open_step)
    hook.remove()
    assert cache.logical_length(seq) == 0 and step.current.get() is None
    with cache.step([seq], lengths=[12]) as open_step:
        logits = chatting.forward(ids, torch.arange(12), open_step)
        assert not open_step.closed
    close([(12, logits)], dense(model, ids, torch.arange(12)))


def test_a_step_that_answers_in_another_shape_is_refused():
    model, ids = build("llama"), prompt(length=5)[0]
    wrong = SimpleNamespace(attend=lambda layer, q, k, v, **_: q[:1])
    with pytest.raises(ValueError, match=r"attend: layer 0 gave \[1, 4, 16\], expected \[5, 4, 16\]"):
        chat(model).forward(ids, torch.arange(5), wrong)
    assert step.current.get() is None


def test_the_model_does_as_before_and_unpatch_undoes_all():
    model, fresh, ids = build("gemma3"), build("gemma3"), prompt(length=30)
    name = model.config._attn_implementation
    chatting = chat(model)
    fed(chatting, ids[0], torch.arange(30), [(0, 29, "none"), (29, 30, "last")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)
    assert greedy(model, stock) == greedy(fresh, stock)
    unpatch(model)
    assert record_of(decoder_of(model)) is None and model.config._attn_implementation == name
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="not patched"):
        chatting.forward(ids[0], torch.arange(30), None)
    patch(model)
    close(fed(chatting, ids[0], torch.arange(30), [(0, 30, "last")]), dense(fresh, ids[0], torch.arange(30)))


def test_threads_share_a_model():
    model = build("mistral")
    chatting, texts = chat(model), [prompt(length=40, seed=seed)[0] for seed in (1, 2, 3)]
    parts = [(0, 20, "none"), *((i, i + 1, "last") for i in range(20, 40))]
    expected = [fed(chatting, ids, torch.arange(40), parts) for ids in texts]
    found, barrier = [None] * 3, threading.Barrier(3)

    def work(i):
        barrier.wait(60)
        found[i] = fed(chatting, texts[i], torch.arange(40), parts)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, want, strict=True))


# --- facts ----------------------------------------------------------------------------------------------------------------


def test_facts_of_a_model():
    model = build("mistral")
    chatting = chat_model(model, talk.tokenizer(talk.CHATML), system="Hello.")
    assert [(s.kv_heads, s.q_heads, s.head_dim, s.window) for s in chatting.shape.layers] == [(2, 4, 16, 8)] * 4
    assert chatting.max_positions == 256 and chatting.style == "chat"
    assert torch.equal(chatting.embeddings, model.get_input_embeddings().weight)
    assert not chatting.embeddings.requires_grad
    words = talk.tokenizer(talk.CHATML)
    assert chatting.stop_ids == {words.eos_token_id}
    model.generation_config.eos_token_id = [3, 5]
    again = chat_model(model, talk.tokenizer(talk.CHATML), max_positions=99)
    assert again.stop_ids == {3, 5, words.eos_token_id} and again.max_positions == 99
    assert chatting.closing.tolist() == words.encode("<|end|>\n", add_special_tokens=False)
    assert chatting.plain("<b> the.\n").tolist() == words.encode("<b> the.\n", add_special_tokens=False)
    ids, offsets = chatting.tokens([Turn("user", "Where?")], first=True, answer=True)
    assert ids.dtype == offsets.dtype == torch.int64 and offsets.shape == (2,)
    assert chatting.text(ids) == "system\nHello.\nuser\nWhere?\nassistant\n"


def test_fingerprints():
    model, other = build("llama"), build("llama")
    name = chat(model).fingerprint
    assert len(name) == 64 and int(name, 16) >= 0
    other.config._name_or_path = other.config.transformers_version = "elsewhere"
    assert chat(other).fingerprint == name
    for where in (0, -1):
        with torch.no_grad():
            other.model.layers[where].self_attn.k_proj.weight[0, 0] += 1e-3
        assert chat(other).fingerprint != name
        other = build("llama")
    other.config.rope_parameters["rope_theta"] = 5.0
    assert chat(other).fingerprint != name
    assert chat(build("llama").to(torch.bfloat16)).fingerprint != name
    assert len({chat(build(n)).fingerprint for n in NAMES}) == len(NAMES)


def test_key_projections_are_found():
    expected = [m.self_attn.k_proj.weight for m in (build("llama").model.layers[i] for i in (0, 3))]
    found = projections(decoder_of(build("llama")))
    assert len(found) == 2 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    config = tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    fused = tf.GPT2LMHeadModel(config)
    found = projections(decoder_of(fused))
    assert [f.data_ptr() for f in found] == [b.attn.c_attn.weight.data_ptr() for b in fused.transformer.h]


def test_tokenizer_fingerprints():
    model = build("llama")

    def of(words, **more):
        return chat_model(model, words, **more).tokenizer_fingerprint

    name = of(talk.tokenizer(talk.CHATML))
    assert name == of(talk.tokenizer(talk.CHATML)) and len(name) == 64
    changed = talk.tokenizer(talk.CHATML)
    changed.add_tokens(["zebra"])
    others = [
        of(changed),
        of(talk.tokenizer(talk.CHATML), system="Hi."),
        of(talk.tokenizer(talk.CHATML), style="transcript"),
        of(talk.tokenizer(talk.TRIMS)),
        of(ByteTokenizer(), style="transcript"),
    ]
    assert len({name, *others}) == 6


def test_arguments_reach_the_template():
    named = talk.CHATML.replace("assistant\n{%", "{{ tongue }}\n{%")
    chatting = chat_model(build("llama"), talk.tokenizer(named), template={"tongue": "latin"})
    ids, _ = chatting.tokens([], first=False, answer=True)
    assert chatting.text(ids) == "latin\n"


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_refusals_leave_the_model_as_it_was():
    model = build("llama")
    words = talk.tokenizer(talk.CHATML)
    cases = [
        (ValueError, "style is 'lines', expected 'chat' or 'transcript'", words, {"style": "lines"}),
        (ValueError, "system is blank", words, {"system": " "}),
        (ValueError, "max_positions is 0", words, {"max_positions": 0}),
        (Unsupported, "no chat template; style='transcript'", talk.tokenizer(), {}),
        (Unsupported, "no chat template; style='transcript'", ByteTokenizer(), {}),
        (Unsupported, "no prefix of .*style='transcript'", talk.tokenizer(talk.THINKS), {}),
    ]
    for kind, message, tokenizer, more in cases:
        with pytest.raises(kind, match=message):
            chat_model(model, tokenizer, **more)
        assert record_of(decoder_of(model)) is None
    model.config.max_position_embeddings = -1
    with pytest.raises(Unsupported, match="max_position_embeddings is -1; give max_positions="):
        chat(model)
    assert chat(model, max_positions=64).max_positions == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("qwen3_next"), "layer type 'linear_attention'"),
        (lambda: build("llama").model, "takes no logits_to_keep"),
        (lambda: build("llama").double(), "dtype is torch.float64"),
        (lambda: tf.BartForCausalLM(tf.BartConfig(**BART)), "takes no position_ids"),
    ],
)
def test_models_that_a_conversation_cannot_run(make, message):
    model = make()
    with pytest.raises(Unsupported, match=message):
        chat(model)
    assert record_of(decoder_of(model)) is None


BART = {"vocab_size": 96, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}
BART |= {"encoder_layers": 2, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "max_position_embeddings": 64}


def test_inputs_of_a_forward_are_checked_before_it():
    model = build("llama")
    chatting, ids, at = chat(model), prompt(length=4)[0], torch.arange(4)
    cases = [
        ((ids, at, None, "all"), "logits is 'all', expected 'last' or 'none'"),
        ((ids[:0], at[:0], None), r"ids is torch.int64 \[0\]"),
        ((ids[None], at, None), r"ids is torch.int64 \[1, 4\]"),
        ((ids.int(), at, None), "ids is torch.int32"),
        ((ids, at.float(), None), "positions is torch.float32"),
        ((ids, at[:3], None), "4 ids, 3 positions"),
        ((ids, at - 1, None), r"positions are -1..2, expected 0..255"),
        ((ids, at + 253, None), r"positions are 253..256, expected 0..255"),
        ((ids + 96, at, None), r"expected 0..95"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            chatting.forward(*given)


def test_another_model_behind_the_same_chat_is_refused():
    model = build("llama")
    chatting = chat(model)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="call kvstrata.patch"):
        chatting.forward(prompt(length=4)[0], torch.arange(4), None)
    patch(model)
    with pytest.raises(ValueError, match="another model; layer 0 dtype: expected torch.float32, got torch.bfloat16"):
        chatting.forward(prompt(length=4)[0], torch.arange(4), None)
