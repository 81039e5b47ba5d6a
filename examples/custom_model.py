"""A hand-written PyTorch model on a kvstrata cache: no transformers, about 60 lines.

Run it: python examples/custom_model.py
"""

from __future__ import annotations

import torch
from torch import nn

import kvstrata

WIDTH, LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 256, 4, 8, 2, 32, 256


def rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding. x: [n, heads, D]; positions: i64 [n]."""
    angle = positions[:, None, None] * 10000 ** (-torch.arange(0, DIM, 2) / DIM)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, step: kvstrata.Step, index: int) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(len(x), -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
        q, k = rope(q, step.positions), rope(k, step.positions)
        x = x + self.out(step.attend(index, q, k, v).flatten(1))  # stores k and v, reads all that the policy kept
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, cache: kvstrata.Cache, seqs: list[kvstrata.Sequence], ids: list[torch.Tensor]) -> torch.Tensor:
        """Feeds each sequence its next tokens (ids[b]: i64 [n_b], any lengths); logits [B, VOCAB] of their last."""
        with cache.step(seqs, [len(i) for i in ids]) as step:
            x = self.embed(torch.cat(ids))
            for index, layer in enumerate(self.layers):
                x = layer(x, step, index)
        last = torch.tensor([len(i) for i in ids]).cumsum(0) - 1
        return self.head(x[last])


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = Model()
    shape = kvstrata.Shape([kvstrata.LayerSpec(KV_HEADS, HEADS, DIM)] * LAYERS, torch.float32)
    cache = kvstrata.Cache(shape, budget="256tok", policy="streaming")
    prompts = [
        torch.tensor(list(text.encode())) for text in ("A short prompt. ", "A longer one, again and again. " * 40)
    ]
    seqs = cache.new(len(prompts))
    logits = model(cache, seqs, prompts)  # sequences of any lengths in one step, packed side by side
    for _ in range(32):
        logits = model(cache, seqs, list(logits.argmax(-1, keepdim=True)))
    report = cache.report()
    print(f"tokens seen {report.logical_tokens}, bytes {report.nbytes:,}, a dense cache: {report.dense_bytes:,}")


if __name__ == "__main__":
    main()
