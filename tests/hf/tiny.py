"""Tiny random models: 4 layers, 4 query and 2 KV heads, no end-of-sequence token, weights wide enough to disagree."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers as tf

VOCAB = 96
WINDOW = 8
SEEDS = {"gpt_oss": 8, "qwen3_next": 9, "stablelm": 8, "gemma3_mm": 8}
"""With these the two best logits of a greedy run never lie closer than 1e-3, which rounding could turn over."""
_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def _base(dim: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 4 * dim,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        **_SPECIAL,
    }


def _llama(dim):
    return tf.LlamaForCausalLM, tf.LlamaConfig(**_base(dim), head_dim=dim)


def _qwen3(dim):
    return tf.Qwen3ForCausalLM, tf.Qwen3Config(**_base(dim), head_dim=dim)


def _mistral(dim):
    return tf.MistralForCausalLM, tf.MistralConfig(**_base(dim), head_dim=dim, sliding_window=WINDOW)


def _gemma3(dim):
    kinds = ["sliding_attention", "full_attention"] * 2
    config = tf.Gemma3TextConfig(
        **_base(dim),
        head_dim=dim,
        sliding_window=WINDOW,
        layer_types=kinds,
        query_pre_attn_scalar=dim,
        tie_word_embeddings=False,
    )
    return tf.Gemma3ForCausalLM, config


def _gemma2(dim):
    config = tf.Gemma2Config(
        **_base(dim),
        head_dim=dim,
        sliding_window=WINDOW,
        query_pre_attn_scalar=dim,
        attn_logit_softcapping=5.0,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    return tf.Gemma2ForCausalLM, config


def _gpt_oss(dim):
    config = tf.GptOssConfig(
        **_base(dim), head_dim=dim, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1
    )
    return tf.GptOssForCausalLM, config


def _qwen3_next(dim):
    config = tf.Qwen3NextConfig(
        **_base(dim),
        head_dim=dim,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        decoder_sparse_step=1,
    )
    return tf.Qwen3NextForCausalLM, config


def _stablelm(dim):
    return tf.StableLmForCausalLM, tf.StableLmConfig(**_base(dim))


def _opt(dim):
    config = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=4 * dim,
        word_embed_proj_dim=4 * dim,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.3,
        dropout=0.0,
        **_SPECIAL,
    )
    return tf.OPTForCausalLM, config


def _gemma3_mm(dim):
    text = _gemma3(dim)[1].to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = tf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90, tie_word_embeddings=False
    )
    for name, value in _SPECIAL.items():
        setattr(config, name, value)
    return tf.Gemma3ForConditionalGeneration, config


BUILDERS = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "gemma2": _gemma2,
    "gpt_oss": _gpt_oss,
    "qwen3_next": _qwen3_next,
    "stablelm": _stablelm,
    "opt": _opt,
    "gemma3_mm": _gemma3_mm,
}
HYBRID = {"qwen3_next"}
WINDOWED = {"mistral", "gemma3", "gemma2", "gpt_oss", "gemma3_mm"}


@cache
def _built(name: str, dim: int):
    torch.manual_seed(SEEDS.get(name, 7))
    kind, config = BUILDERS[name](dim)
    model = kind(config).eval()
    with torch.no_grad():  # whatever the class initializes by its own rule: make every matrix count
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
            elif name == "gpt_oss" and parameter.shape[0] == 4:
                parameter.normal_(0.0, 1.0)  # sink logits
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def build(name: str, dim: int = 16):
    """A fresh, unpatched copy, the same weights every time."""
    return copy.deepcopy(_built(name, dim))
