"""What a decoder's layers really do, seen in two tiny forwards: the facts that shape a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from kvstrata.config import Unsupported
from kvstrata.hf import compat
from kvstrata.hf.step import Recorder, audit_arguments

PROBE_TOKENS = (3, 1)


@dataclass(frozen=True)
class LayerFact:
    """One attention layer as the probe saw it. `kwargs`: names of the attention call's other arguments."""

    layer: int
    kv_heads: int
    q_heads: int
    head_dim: int
    window: int | None
    dtype: torch.dtype
    device: torch.device
    kwargs: tuple[str, ...] = field(compare=False, default=())


@dataclass(frozen=True)
class Facts:
    """A decoder: its class, one fact per attention layer, and the layer types of all layers.

    `weights`: dtype and device the decoder had when it was probed.
    """

    name: str
    layers: tuple[LayerFact, ...]
    types: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    weights: tuple[torch.dtype, torch.device] = field(compare=False)

    def difference(self, other: Facts) -> str | None:
        """The first thing in which two decoders differ, with both values; None if a cache of one serves the other."""
        if self.name != other.name:
            return f"model class: expected {self.name}, got {other.name}"
        if self.types != other.types:
            return f"layer types: expected {self.types}, got {other.types}"
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for name in ("dtype", "device", "kv_heads", "q_heads", "head_dim", "window"):
                a, b = getattr(mine, name), getattr(theirs, name)
                if a != b:
                    return f"layer {mine.layer} {name}: expected {a}, got {b}"
        return None


class ProbeCache(DynamicCache):  # type: ignore[misc]
    """A stock cache that tells the recorder what was updated and which masks were made."""

    def __init__(self, config: Any, recorder: Probe) -> None:
        super().__init__(config=config)
        self.recorder = recorder

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As stock, noted."""
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.recorder.note(layer_idx, key_states, value_states, k, v)
        return k, v

    def record_mask(self, fallback: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The fallback's mask, never skipped, so that each layer's mask tells its window."""
        mask = fallback(*args, **{**kwargs, "allow_is_causal_skip": False})
        self.recorder.masks.append((mask, kwargs.get("local_size")))
        return mask


class Probe(Recorder):
    """Watches one forward: per layer the new and the returned k, v, then the attention call."""

    def __init__(self, name: str, modules: frozenset[int]) -> None:
        super().__init__(modules)
        self.name = name
        self.masks: list[tuple[Any, int | None]] = []
        self.noted: dict[int, tuple[Any, Any, Any, Any]] = {}
        self.facts: dict[int, LayerFact] = {}
        self._last = -1

    def note(self, layer: int, new_k: Any, new_v: Any, k: Any, v: Any) -> None:
        """`update` of `layer` got new_k, new_v [B, H, T, D] and returned k, v [B, H, N, D]."""
        if layer in self.noted:
            raise Unsupported(f"{self.name}: layer {layer} updated the cache twice in one forward")
        self.noted[layer], self._last = (new_k, new_v, k, v), layer

    def record(self, module: Any, q: Any, k: Any, v: Any, mask: Any, kwargs: dict[str, Any]) -> None:
        """See Recorder. Unsupported for what a step would refuse too."""
        where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
        layer = self._last
        if layer not in self.noted or layer in self.facts:
            raise Unsupported(f"{where}: attention ran without an update of the cache in this step")
        new_k, new_v, got_k, got_v = self.noted[layer]
        if got_k is not k or got_v is not v:
            raise Unsupported(
                f"{where}: keys and values are reworked after the cache: update got {list(new_k.shape)} and returned "
                f"{list(got_k.shape)}, attention got {list(k.shape)}, another tensor"
            )
        if hasattr(new_k, "to_local"):
            raise Unsupported(f"{where}: the keys are a DTensor: each rank must cache its own heads")
        if new_k.shape[-1] != new_v.shape[-1] or new_k.shape[:3] != new_v.shape[:3]:
            raise Unsupported(f"{where}: keys {list(new_k.shape)} and values {list(new_v.shape)} differ in shape")
        window = self._window(where, mask, kwargs)
        audit_arguments(module, None, kwargs, window)
        self.facts[layer] = LayerFact(
            layer, new_k.shape[1], q.shape[1], new_k.shape[3], window, new_k.dtype, new_k.device, tuple(sorted(kwargs))
        )

    def _window(self, where: str, mask: Any, kwargs: dict[str, Any]) -> int | None:
        """The window of the mask this layer was given; where the fallback makes no mask, of its keyword argument."""
        if mask is None:
            return kwargs.get("sliding_window")
        for made, window in self.masks:
            if made is mask or _same_memory(made, mask):
                return window
        raise Unsupported(f"{where}: the attention mask is not the one made for this forward (a bias, or reworked)")


def _same_memory(a: Any, b: Any) -> bool:
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return both and a.data_ptr() == b.data_ptr() and a.dtype == b.dtype


@contextlib.contextmanager
def _undisturbed(decoder: torch.nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and the random state as it was, for the time of the probe."""
    training = [m for m in decoder.modules() if m.training]
    devices = sorted({p.device.index or 0 for p in decoder.parameters() if p.device.type == "cuda"})
    decoder.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in training:
            module.training = True


def weights_of(decoder: Any) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the decoder's weights."""
    return decoder.dtype, decoder.device


def moved(facts: Facts, decoder: Any) -> bool:
    """Whether the weights have another dtype or device than at the probe. Offloaded ones ("meta") may be anywhere."""
    (dtype, device), (old_dtype, old_device) = weights_of(decoder), facts.weights
    return dtype != old_dtype or (device != old_device and "meta" not in (device.type, old_device.type))


def probe(decoder: Any) -> Facts:
    """Run two forwards (3 tokens, then 1) of a hooked decoder; Unsupported with class, layer and what was seen."""
    name = type(decoder).__name__
    config = compat.text_config(decoder.config)
    modules = frozenset(id(m) for m in decoder.modules())
    types = compat.layer_types(config)
    expected = {i for i, (kind, _) in enumerate(types) if kind in compat.ATTENTION_TYPES}
    with _undisturbed(decoder):
        first, second = _forwards(decoder, config, name, modules)
    for seen in (first, second):
        if seen.keys() != expected:
            raise Unsupported(
                f"{name}: the step did not reach every layer: expected {sorted(expected)}, attended {sorted(seen)}"
            )
    layers = tuple(first[i] for i in sorted(expected))
    for fact in layers:
        _agree(name, fact, second[fact.layer], types[fact.layer])
    frozen = tuple((kind, tuple(sorted(kwargs.items()))) for kind, kwargs in types)
    return Facts(name, layers, frozen, weights_of(decoder))


def _forwards(decoder: Any, config: Any, name: str, modules: frozenset[int]) -> list[dict[int, LayerFact]]:
    device = decoder.device if decoder.device.type != "meta" else torch.device("cpu")
    ids = torch.arange(1, 1 + sum(PROBE_TOKENS), device=device)[None] % config.vocab_size
    cache = ProbeCache(config, Probe(name, modules))
    seen = []
    for part in ids.split(PROBE_TOKENS, dim=1):
        cache.recorder = Probe(name, modules)
        decoder(input_ids=part, past_key_values=cache, use_cache=True)
        if cache.recorder.noted.keys() != cache.recorder.facts.keys():
            raise Unsupported(
                f"{name}: layers {sorted(cache.recorder.noted.keys() - cache.recorder.facts.keys())} updated the "
                "cache, but no attention of theirs went through the attention interface"
            )
        seen.append(cache.recorder.facts)
    return seen


def _agree(name: str, prefill: LayerFact, decode: LayerFact, kind: tuple[str, dict[str, Any]]) -> None:
    """Prefill, decode and the cache's own layer type must tell the same story."""
    if replace(prefill, kwargs=()) != replace(decode, kwargs=()):
        raise Unsupported(f"{name}: layer {prefill.layer} differs between prefill ({prefill}) and decode ({decode})")
    stock = kind[1].get("sliding_window")
    if stock is not None and prefill.window != stock:
        raise Unsupported(
            f"{name}: layer {prefill.layer} is cached with a window of {stock}, but masked with {prefill.window}"
        )
