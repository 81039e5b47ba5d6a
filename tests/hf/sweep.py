"""Every causal-LM class of the installed transformers, made tiny: identical to DynamicCache, or refused with a reason.

`python sweep.py [--markdown]` prints the table; test_sweep.py asserts that nothing differs.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from dataclasses import dataclass

import torch
import transformers
from transformers import DynamicCache
from transformers.models.auto import modeling_auto

from kvstrata.config import Unsupported
from kvstrata.hf import KVCache, patch
from kvstrata.hf.capability import reasons

LARGEST = 4_000_000  # parameters
NEW = 8
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "model_dim": 64,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "ffn_hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "expert_intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "dense_intermediate_size": 64,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "attention_head_dim": 16,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "top_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "sliding_window": 8,
    "attention_window_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "n_groups": 1,
    "ssm_state_size": 8,
    "state_size": 8,
    "lru_width": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "first_k_dense_replace": 1,
    "initializer_range": 0.2,
    "init_std": 0.2,
}
EVEN_IF_NONE = ("head_dim", "num_key_value_heads")
GIVEN = {
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"] * 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
}
"""What a class cannot do without and its defaults do not say."""
ZERO = (
    "attention_dropout",
    "dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "activation_dropout",
)


@dataclass(frozen=True)
class Outcome:
    """kind: identical, refused, different, trivial (nothing can be concluded) or not buildable."""

    name: str
    kind: str
    reason: str = ""


def tiny_config(kind):
    """A config of this class with every known size made small."""
    known = vars(kind())
    sizes = {k: v for k, v in SIZES.items() if known.get(k) is not None and not isinstance(known[k], (list, dict))}
    sizes |= {k: SIZES[k] for k in EVEN_IF_NONE if k in known}
    if "kv_lora_rank" in sizes:
        sizes |= {"num_key_value_heads": 4, "head_dim": 8}
    names = getattr(kind, "attribute_map", {})
    sizes = {k: v for k, v in sizes.items() if names.get(k, k) == k}
    zeros = {k: 0.0 for k in ZERO if k in known}
    sizes |= {**zeros, **GIVEN.get(kind.__name__, {}), "pad_token_id": 0}
    try:
        config = kind(**sizes, bos_token_id=None, eos_token_id=None)
    except Exception:  # some insist on the tokens; generation is told to ignore them
        config = kind(**sizes, bos_token_id=1, eos_token_id=95)
    layers = config.num_hidden_layers
    if isinstance(known.get("layer_types"), list) and len(config.layer_types) != layers:
        kinds = list(dict.fromkeys(known["layer_types"]))
        config.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    return config


def build(class_name):
    """A tiny random model of the class, in eval mode; raises whatever the class raises when it cannot be made."""
    cls = getattr(transformers, class_name)
    config = tiny_config(cls.config_class)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(3)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.cache_implementation = None
    return model


def prompts():
    ids = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pads in ((1, 5), (2, 9)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return ids, mask


def generate(model, cache):
    ids, mask = prompts()
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, 12:], torch.stack(out.logits, 1)


def compare(name, model):
    """Generate with DynamicCache and, patched, with a KVCache."""
    if reasons(model):
        return Outcome(name, "refused", reasons(model)[0])
    try:
        tokens, logits = generate(model, DynamicCache(config=model.config.get_text_config(decoder=True)))
    except Exception as error:  # whatever a class raises that cannot generate with a DynamicCache
        return Outcome(name, "not buildable", f"stock: {type(error).__name__}: {str(error)[:90]}")
    try:
        ours, other = generate(model, KVCache.for_model(patch(model)))
    except Unsupported as error:
        return Outcome(name, "refused", str(error))
    if not torch.isfinite(logits).all() or tokens.unique().numel() < 3:
        return Outcome(
            name, "trivial", f"{tokens.unique().numel()} tokens, finite: {bool(torch.isfinite(logits).all())}"
        )
    if torch.equal(tokens, ours):
        return Outcome(name, "identical", f"{(logits - other).abs().max():.1e}")
    return Outcome(name, "different", f"logits differ by {(logits - other).abs().max():.1e}")


def classes():
    """The name of every causal-LM class, once."""
    listed = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return list(dict.fromkeys(n for names in listed for n in (names if isinstance(names, (list, tuple)) else (names,))))


def sweep(part=0, parts=1):
    """Outcomes of every class, or of one part of them."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        for i, name in enumerate(classes()):
            if i % parts != part:
                continue
            try:
                model = build(name)
            except Exception as error:  # whatever a class raises that cannot be made
                yield Outcome(name, "not buildable", f"{type(error).__name__}: {str(error)[:90]}")
                continue
            yield compare(name, model)
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    for outcome in sweep():
        if "--markdown" in sys.argv:
            print(f"| {outcome.name} | {outcome.kind} | {outcome.reason} |".replace("\n", " "), flush=True)
        else:
            print(f"{outcome.kind:14} {outcome.name:40} {outcome.reason}".replace("\n", " "), flush=True)
