"""Shapes of well-known models, with random weights: what they compute is nonsense, what it costs is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SPREAD = 0.02
"""Standard deviation of the weights."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes, from its published configuration."""

    kind: str  # "llama" or "qwen3"
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # input and output embeddings are one

    def build(self, layers: int | None = None, seed: int = 0, device: torch.device | str = "cpu") -> Any:
        """A transformers model in bfloat16 and eval mode. layers: fewer of them, for a look. Weights depend on the device."""
        config_class, model_class = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        }[self.kind]
        config: Any = config_class(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=1 << 18,
        )
        config.dtype = torch.bfloat16
        with torch.device("meta"):
            model: Any = model_class(config)
        model = model.to(torch.bfloat16).to_empty(device=device)
        rotary = type(model.model.rotary_emb)(config)  # its frequencies are no parameters
        model.model.rotary_emb = rotary.to(device)
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(1.0) if weight.dim() < 2 else weight.normal_(0.0, SPREAD, generator=generator)
        model.tie_weights()
        return model.eval()


SHAPES = {
    "qwen3-0.6b": ModelShape("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "llama-3.2-1b": ModelShape("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.1-8b": ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}
