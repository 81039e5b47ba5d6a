"""Models that a KVCache cannot serve are refused by patch, with the reason, and left as they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as tf
from tiny import build

from kvstrata.config import Unsupported
from kvstrata.hf import compat, patch
from kvstrata.hf.cache import shape_of
from kvstrata.hf.capability import reasons
from kvstrata.hf.decoder import facts_of

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def refused_at_patch(model, match):
    before = {k: v for k, v in model.__dict__.items() if "hook" not in k}
    implementation = model.config._attn_implementation
    with pytest.raises(Unsupported, match=match):
        patch(model)
    assert model.config._attn_implementation == implementation
    assert {k: v for k, v in model.__dict__.items() if "hook" not in k} == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_release_window():
    assert compat.version_reason("5.16.2") == "kvstrata needs transformers 5.17 to 5.23, found 5.16.2"
    assert all(compat.version_reason(v) is None for v in ("5.17.0", "5.20.0", "5.23.0", "5.23.1.dev0"))


def test_a_newer_release_warns_once(caplog):
    compat.warn_once.cache_clear()
    assert compat.version_reason("5.99.0") is None
    assert compat.version_reason("5.99.0") is None
    assert [r.getMessage() for r in caplog.records] == [
        "kvstrata is tested with transformers 5.17 to 5.23, found 5.99.0"
    ]


def test_encoder_decoder():
    config = tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, pad_token_id=0)
    refused_at_patch(tf.T5ForConditionalGeneration(config), "T5ForConditionalGeneration: encoder-decoder")


def test_attention_that_is_not_dispatched():
    config = tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    refused_at_patch(tf.BloomForCausalLM(config), "BloomModel: its attention is not dispatched")


def test_a_class_without_readable_source():
    space = {"LlamaForCausalLM": tf.LlamaForCausalLM, "LlamaModel": tf.LlamaModel, "__name__": "nowhere"}
    exec(
        "class Inner(LlamaModel): _can_set_attn_implementation_cached_value = None\nclass Outer(LlamaForCausalLM): pass",
        space,
    )
    model = space["Outer"](tf.LlamaConfig(**SMALL))
    model.model = space["Inner"](model.config)
    refused_at_patch(model, "Inner: .*source cannot be read")


def test_chunked_attention():
    config = tf.Llama4TextConfig(
        **SMALL, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=32, head_dim=16
    )
    refused_at_patch(tf.Llama4ForCausalLM(config).eval(), "layer type 'chunked_attention'")


def test_attention_and_recurrence_in_one_layer():
    config = tf.FalconH1Config(
        **SMALL, head_dim=16, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1
    )
    refused_at_patch(tf.FalconH1ForCausalLM(config).eval(), "layer type 'hybrid'")


def test_shared_keys_and_values():
    config = tf.Gemma3nTextConfig(
        vocab_size=96,
        vocab_size_per_layer_input=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
        pad_token_id=0,
    )
    refused_at_patch(tf.Gemma3nForCausalLM(config).eval(), r"num_kv_shared_layers = 2")


def test_latent_attention():
    config = tf.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    refused_at_patch(tf.DeepseekV3ForCausalLM(config).eval(), "kv_lora_rank = 16")


def test_no_attention_layer_and_no_past_key_values():
    config = tf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0)
    refused_at_patch(tf.MambaForCausalLM(config).eval(), "no decoder whose forward takes past_key_values")


def test_an_attention_implementation_without_a_fallback():
    model = build("llama")
    model.config._attn_implementation_internal = "paged|eager"
    refused_at_patch(model, r"attention implementation 'paged\|eager'")


def test_keys_reworked_after_the_cache():
    config = tf.DiffLlamaConfig(**SMALL, head_dim=16)
    refused_at_patch(tf.DiffLlamaForCausalLM(config).eval(), r"DiffLlama.*\(layer 0\)")


def test_every_reason_is_listed():
    model = build("llama")
    model.config.kv_lora_rank, model.config.num_kv_shared_layers = 8, 1
    assert len(reasons(model)) == 2


def test_layers_of_more_than_one_dtype():
    _, facts = facts_of(patch(build("llama")))
    mixed = replace(facts, layers=(replace(facts.layers[0], dtype=torch.bfloat16), *facts.layers[1:]))
    with pytest.raises(Unsupported, match="layers of more than one dtype"):
        shape_of(mixed)
