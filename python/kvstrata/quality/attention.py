"""What attention gives and where it looks: outputs of every layer, and the mass that falls on each token before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvstrata.hf.decoder import facts_of
from kvstrata.hf.facts import Probe, ProbeCache


@contextmanager
def outputs(model: Any) -> Iterator[list[Tensor]]:
    """f32 [T, width] of every attention module, in order of the layers, while inside."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0].float())

    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
    hooks = [m.register_forward_hook(keep) for m in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class WatchedCache(ProbeCache):
    """A dense cache of a patched model: the same masks and attention as ever, watched on the way.

    After a forward ``mass`` holds, by the model's layer, f32 [H, N]: the weights of all its queries on the N tokens
    before it, summed over the queries and over the query heads of each KV head. Batch 1.
    """

    def __init__(self, model: Any) -> None:
        decoder, facts = facts_of(model)
        self.watch = _Watch(frozenset(id(m) for m in decoder.modules()), {f.layer: f.window for f in facts.layers})
        super().__init__(model.config, self.watch)

    @property
    def mass(self) -> list[Tensor]:
        return [self.watch.mass[layer] for layer in sorted(self.watch.mass)]

    def record_mask(self, fallback: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The fallback's mask, as without us."""
        return fallback(*args, **kwargs)


class _Watch(Probe):
    def __init__(self, modules: frozenset[int], windows: dict[int, int | None]) -> None:
        super().__init__("watch", modules)
        self.windows = windows
        self.mass: dict[int, Tensor] = {}
        self._seen = dict.fromkeys(windows, 0)

    def note(self, layer: int, new_k: Any, new_v: Any, k: Any, v: Any) -> None:
        self._seen[layer] += new_k.shape[2]
        self._last = layer

    def record(self, module: Any, q: Any, k: Any, v: Any, mask: Any, kwargs: dict[str, Any]) -> None:
        layer = self._last
        before = self._seen[layer] - q.shape[2]
        if before:  # a first forward has nothing before it, and may be long
            self.mass[layer] = mass(q[0], k[0], before, self.windows[layer], **_known(kwargs))


def _known(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"scale": kwargs.get("scaling"), "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}


def mass(
    q: Tensor,
    k: Tensor,
    before: int,
    window: int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """f32 [H, before]: softmax weights of causal queries on the tokens before them, summed over queries and group.

    q [Hq, T, D] at positions before .. before + T - 1; k [H, N, D]: the last N of the before + T keys, so many as a
    sliding layer still has. scale: None for D ** -0.5; softcap: c of c * tanh(logits / c); sinks [Hq]: logits that take
    part in the softmax and belong to no token.
    """
    heads, held = k.shape[:2]
    length = q.shape[1]
    first = before + length - held
    ours = torch.arange(before, before + length, device=q.device)[:, None]
    theirs = torch.arange(first, first + held, device=q.device)
    hidden = theirs > ours if window is None else (theirs > ours) | (theirs <= ours - window)
    found = torch.zeros(heads, before)
    for head, group in enumerate(q.float().chunk(heads)):
        logits = group @ k[head].float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            own = sinks.float().chunk(heads)[head][:, None, None].expand(-1, length, 1)
            logits = torch.cat((logits, own), -1)
        found[head, first:] = logits.softmax(-1)[..., : held - length].sum((0, 1))
    return found


def stored(cache: Any, tokens: int) -> list[Tensor] | None:
    """bool [H, tokens] per attention layer: which of its first tokens a cache of ours holds, in whatever state or tier.

    None for caches that cannot say. Batch 1.
    """
    if not hasattr(cache, "materialize"):
        return None
    found = []
    for layer in sorted(cache.attention_layers):
        _, _, positions = cache.materialize(layer)[0]
        places = positions.long().where((positions >= 0) & (positions < tokens), torch.tensor(tokens))
        found.append(torch.zeros(len(places), tokens + 1, dtype=torch.bool).scatter_(1, places, True)[:, :tokens])
    return found


def captured(dense: list[Tensor], held: list[Tensor] | None) -> list[float] | None:
    """Per layer, the share of the dense cache's mass (f32 [H, N]) that lies on tokens still held (bool [H, N])."""
    if held is None:
        return None
    return [float((m * h).sum() / m.sum()) for m, h in zip(dense, held, strict=True)]
