"""A hand-written PyTorch model on a kvstrata cache under torch.compile, in one graph: the ops are registered with torch.

Run it: python examples/compiled_model.py [BACKEND]. The default, inductor, needs a C++ compiler.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import kvstrata
from kvstrata.registry import Ref

WIDTH, LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 256, 4, 8, 2, 32, 256


def rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding. x: [n, heads, D]; positions: i64 [n]."""
    angle = positions[:, None, None] * 10000 ** (-torch.arange(0, DIM, 2) / DIM)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, order: torch.Tensor, ref: int) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(len(x), -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
        q, k = rope(q, positions), rope(k, positions)
        out = torch.ops.kvstrata.step_attend(q, k, v, order, ref, self.index)  # the step that is open
        return x + self.out(out.flatten(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer(index) for index in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, order: list[torch.Tensor], ref: int) -> torch.Tensor:
        """Logits [n, VOCAB] of packed tokens; ids, positions: i64 [n]. What torch.compile sees: tensors and a number."""
        x = self.embed(ids)
        for layer, mark in zip(self.layers, order, strict=True):
            x = layer(x, positions, mark, ref)
        return self.head(x)


@torch.no_grad()
def generate(forward: nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    """Greedy tokens after a prompt."""
    shape = kvstrata.Shape([kvstrata.LayerSpec(KV_HEADS, HEADS, DIM)] * LAYERS, torch.float32)
    cache = kvstrata.Cache(shape, budget="128tok", policy="streaming")
    ref, seqs = Ref.of_cache(cache), cache.new()
    ids, found = prompt, []
    for _ in range(count):
        with cache.step(seqs, [len(ids)]) as step:
            logits = forward(ids, step.positions, ref.order, ref.number)
        ids = logits[-1:].argmax(-1)
        found.append(int(ids))
    return found


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    backend = sys.argv[1] if len(sys.argv) > 1 else "inductor"
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    prompt = torch.tensor(list(b"A prompt, again and again. " * 12))
    same = generate(compiled, prompt, 16) == generate(model, prompt, 16)
    print(f"compiled by {backend} without a graph break: {'the same tokens' if same else 'other tokens'} as eager")


if __name__ == "__main__":
    main()
