"""The small model: Llama in plain PyTorch, parameters under transformers' names, so that its weights load there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig

COMMON = 0.16
"""One dimension that all tokens' embeddings share at the start."""
LOOK_BACK_LOGIT = 12.0
SINKS = 16
"""First tokens that are seen by layers with a window, too."""
CONFIG = LlamaConfig(
    vocab_size=1536,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=0,
)


class Layer(nn.Module):
    """A Llama layer; parameters carry transformers' names. Keys and values are repeated for their query heads."""

    def __init__(self) -> None:
        super().__init__()
        width, d = CONFIG.hidden_size, CONFIG.head_dim
        q, kv = CONFIG.num_attention_heads * d, CONFIG.num_key_value_heads * d
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.self_attn = nn.ModuleDict(
            {n: nn.Linear(width, m, bias=False) for n, m in (("q_proj", q), ("k_proj", kv), ("v_proj", kv))}
        )
        self.self_attn["o_proj"] = nn.Linear(q, width, bias=False)
        inner = CONFIG.intermediate_size
        self.mlp = nn.ModuleDict({n: nn.Linear(width, inner, bias=False) for n in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, width]; cos, sin [B, 1, T, d]; mask bool [T, T], what each token sees (None: all before it, and itself)."""
        y = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[n](y).unflatten(-1, (-1, CONFIG.head_dim)).transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        group = q.shape[1] // k.shape[1]
        q, k = (t * cos + torch.cat((-t[..., 32:], t[..., :32]), -1) * sin for t in (q, k))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.self_attn["o_proj"](seen.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin f32 [B, 1, T, d] of positions i64 [B, T]."""
    half = torch.arange(0, CONFIG.head_dim, 2, device=positions.device) / CONFIG.head_dim
    angles = positions[:, None, :, None] * CONFIG.rope_parameters["rope_theta"] ** -half
    return torch.cos(torch.cat((angles, angles), -1)), torch.sin(torch.cat((angles, angles), -1))


def near(tokens: int, window: int) -> Tensor:
    """bool [T, T]: what each token sees of those before it, the last ``window`` (itself too) and SINKS."""
    i = torch.arange(tokens)
    back = i[:, None] - i
    return (back >= 0) & ((back < window) | (i < SINKS))


class Model(nn.Module):
    """Llama with tied embeddings, its logits computed only where they are asked for.

    Weights start wide enough that attention is not uniform, and the first layer's heads start on the tokens 1, 2, 3 and
    4 places back, from which the layers above build their lookups; from a plain start the small model sat for a
    thousand steps on guessing one of the stated values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG.vocab_size, CONFIG.hidden_size)
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG.num_hidden_layers))
        self.norm = nn.RMSNorm(CONFIG.hidden_size, 1e-6)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                narrow = "o_proj" in name or "down_proj" in name
                std = 0.04 if "embed" in name else CONFIG.hidden_size**-0.5 / (8**0.5 if narrow else 1)
                nn.init.normal_(p, std=std)
        with torch.no_grad():
            self._look_back()

    def _look_back(self) -> None:
        """Head h of layer 0 to offset h + 1: a dimension that is the same for all tokens, seen by queries as u and by
        keys as u turned back by the offset, on the fast half of the rotary pairs."""
        d, width = CONFIG.head_dim, CONFIG.hidden_size
        self.embed_tokens.weight[:, 0] = COMMON
        seen = COMMON / (0.04**2 + COMMON**2 / width) ** 0.5  # what the norm makes of it
        pairs = d // 4
        u = torch.zeros(d)
        u[:pairs] = torch.linspace(1.0, 0.1, pairs)
        gain = (LOOK_BACK_LOGIT * d**0.5 / (seen**2 * float(u @ u))) ** 0.5
        attention = self.layers[0].self_attn
        group = CONFIG.num_attention_heads // CONFIG.num_key_value_heads
        for head in range(CONFIG.num_attention_heads):
            cos, sin = (f[0, 0, 0] for f in rotary(torch.tensor([[head + 1]])))
            turned = u * cos - torch.cat((-u[d // 2 :], u[: d // 2])) * sin  # by -offset, moved to the query's side
            rows = slice(head * d, (head + 1) * d)
            attention["q_proj"].weight[rows] *= 0.1
            attention["q_proj"].weight[rows, 0] = gain * turned
            if head % group == 0:
                rows = slice(head // group * d, (head // group + 1) * d)
                attention["k_proj"].weight[rows] *= 0.1
                attention["k_proj"].weight[rows, 0] = gain * u

    def forward(
        self, ids: Tensor, positions: Tensor, where: Tensor, windows: Sequence[int | None] | None = None
    ) -> Tensor:
        """ids, positions i64 [B, T]; where bool [B, T]; windows: tokens that each layer sees, beside SINKS (None: all). Logits
        f32 [where.sum(), vocab]."""
        cos, sin = rotary(positions)
        x = self.embed_tokens(ids)
        for layer, window in zip(self.layers, windows or [None] * len(self.layers), strict=True):
            x = layer(x, cos, sin, None if window is None else near(ids.shape[1], window))
        return F.linear(self.norm(x[where]), self.embed_tokens.weight).float()
