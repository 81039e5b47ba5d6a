"""KVCache: the transformers face of a kvstrata.Cache."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache as StockCache

from kvstrata.cache import Cache, Sequence
from kvstrata.config import LayerSpec, Shape, Unsupported
from kvstrata.hf import compat
from kvstrata.hf.decoder import facts_of
from kvstrata.hf.facts import Facts
from kvstrata.hf.feed import Feed
from kvstrata.hf.layers import RecurrentLayer, StrataLayer, refuse_early_initialization
from kvstrata.hf.step import Forward

_REFUSED = "a KVCache holds pages, not tensors per layer: KVCache.materialize(layer) gives keys, values and positions"
_BROKEN = "this cache is broken: a forward failed after recurrent states had changed; call reset()"


class KVCache(StockCache):  # type: ignore[misc]
    """A paged KV cache for one patched decoder, passed to `generate` or `forward` as `past_key_values`.

    Made by `KVCache.for_model`. Rows of the batch are sequences of the underlying `kvstrata.Cache` (`.cache`,
    `.sequences`); they come into being with the first forward. `layer` arguments are the model's layer indices.
    """

    def __init__(self, facts: Facts, core: Cache) -> None:
        self.cache = core
        self._facts = facts
        self._index = {fact.layer: i for i, fact in enumerate(facts.layers)}
        self.attention_layers = frozenset(self._index)
        self._rows: list[Sequence] = []
        self._feed = Feed(core.set_recording)
        super().__init__(layers=[self._layer(i, kind, dict(kwargs)) for i, (kind, kwargs) in enumerate(facts.types)])
        weakref.finalize(self, _release, core, self._rows).atexit = False

    def _layer(self, index: int, kind: str, kwargs: dict[str, Any]) -> Any:
        if kind in compat.ATTENTION_TYPES:
            return StrataLayer(self._feed, index, self._facts.layers[self._index[index]].window)
        if kind in compat.RECURRENT_TYPES:
            return RecurrentLayer(self._feed, **kwargs)
        return compat.idle_layer()

    @classmethod
    def for_model(
        cls,
        model: Any,
        policy: Any = None,
        budget: Any = None,
        *,
        far: Any = "auto",
        hold: int = 64,
        ledger: Any = None,
        compression_ratio: float | None = None,
        keep_ratio: float | None = None,
    ) -> KVCache:
        """A cache for a patched model.

        policy: None (`full`), a name, or a Policy. budget: None, "1.5GiB", "25%" (kept), int or "256tok" (tokens per
        row), or a Budget; `keep_ratio` and `compression_ratio` (the share removed, in (0, 1)) say a share instead.
        far: "auto", None, "64GiB" or a Far. hold: tokens that stay revocable while assisted decoding records.

        RuntimeError if the model is not patched; ValueError for a budget or policy that cannot work; Unsupported for
        a shape the core does not serve.
        """
        _, facts = facts_of(model)
        budget = _budget(budget, compression_ratio, keep_ratio)
        core = Cache(_shape(facts), budget=budget, policy=policy, hold=hold)
        return cls(facts, core)

    # -- one forward ----------------------------------------------------------------------------------------------

    def _open(
        self, facts: Facts, modules: frozenset[int], mask: torch.Tensor | None, batch: int, length: int, positions: Any
    ) -> Forward:
        """Check the inputs, reserve the step's pages and open it. Nothing has changed when this raises."""
        self._settle()
        difference = None if facts is self._facts else self._facts.difference(facts)
        if difference is not None:
            raise ValueError(f"this cache was made for another model; {difference}")
        if self._rows and batch != len(self._rows):
            raise ValueError(f"batch size: expected {len(self._rows)}, the sequences in the cache, got {batch}")
        new = self._feed.admit(mask, batch, length, positions)
        fresh = not self._rows
        if fresh:
            self._rows.extend(self.cache.new(batch))
        try:
            step = self.cache.step(self._rows, valid=new, columns=length).open()
        except BaseException:
            self._withdraw_rows(fresh)
            raise
        forward = Forward(self, step, facts.name, modules, new, length)
        forward.fresh = fresh
        self._feed.forward = forward
        return forward

    def _close(self, forward: Forward, failed: bool) -> None:
        """Audit and commit the open step, or roll it back."""
        try:
            if not failed:
                forward.audit()
                forward.step.commit()
        except BaseException:
            self._abort(forward)
            raise
        if failed:
            self._abort(forward)
            return
        self._feed.forward = None
        self._feed.extend(forward.new, len(self._rows), forward.length)

    def _abort(self, forward: Forward) -> None:
        self._feed.forward = None
        self._feed.broken |= forward.irreversible
        if not forward.step.closed:
            forward.step.rollback()
        self._withdraw_rows(forward.fresh)

    def _withdraw_rows(self, fresh: bool) -> None:
        if fresh:
            rows, self._rows[:] = list(self._rows), []
            self.cache.free(rows)

    def _settle(self, broken: bool = False) -> None:
        """No step of this cache is open after this. RuntimeError if one is, in another thread, or the cache broke."""
        forward = self._feed.forward
        if forward is not None:
            alive = {thread.ident for thread in threading.enumerate()}
            if forward.thread != threading.get_ident() and forward.thread in alive:
                raise RuntimeError(
                    "this cache has a step open in another thread: one cache serves one thread at a time"
                )
            self._abort(forward)
        if self._feed.broken and not broken:
            raise RuntimeError(_BROKEN)

    def check_keys(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """ValueError unless k, v [B, H, T, D] are what the probe saw of `layer`."""
        if layer not in self._index:
            raise Unsupported(f"{self._facts.name}: layer {layer} has keys, but the probe saw none")
        fact, forward = self._facts.layers[self._index[layer]], self._feed.forward
        assert forward is not None
        for name, x in (("keys", k), ("values", v)):
            expected = (len(self._rows), fact.kv_heads, forward.length, fact.head_dim)
            if tuple(x.shape) != expected:
                raise ValueError(f"layer {layer} {name}: expected [B, H, T, D] = {list(expected)}, got {list(x.shape)}")
            if x.dtype != fact.dtype or x.device != fact.device:
                raise ValueError(
                    f"layer {layer} {name}: expected {fact.dtype} on {fact.device}, as the cache was made, got "
                    f"{x.dtype} on {x.device}"
                )

    def layer_facts(self, layer: int) -> tuple[int, int | None]:
        """(index of a model's attention layer in `.cache`, its window or None)."""
        index = self._index[layer]
        return index, self._facts.layers[index].window

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note k, v [B, H, T, D] of a layer in the open step; returns them unchanged, the new tokens only.

        RuntimeError without an open step: the model is not patched.
        """
        return self._feed.note(layer_idx, key_states, value_states)

    # -- what transformers asks -----------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed, padding included; those of the open step too once the layer was updated in it."""
        if layer_idx not in self._index:
            layer_idx = min(self._index)
        return self._feed.columns_of(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As get_seq_length."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns + query_length, 0)."""
        return self._feed.columns + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward."""
        return len(self._rows) or -1

    @property
    def is_compileable(self) -> bool:
        """False."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything was fed."""
        return self._feed.columns > 0

    @property
    def is_croppable(self) -> bool:
        """True while no lossy event lies past the confirmed length; False with recurrent layers."""
        if self._recurrent():
            return False
        floors = [self.cache.crop_floor(s) < max(1, self.cache.logical_length(s)) for s in self._rows]
        return self._feed.recording or all(floors)

    def activate_past_recording(self) -> None:
        """From now on the last `hold` tokens are neither sealed nor planned until `crop` confirms them."""
        self._feed.record(True)

    def offload(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: tiers are the policy's."""

    def prefetch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: tiers are the policy's."""

    def early_initialization(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Unsupported."""
        refuse_early_initialization()

    def __iter__(self) -> NoReturn:
        raise TypeError(_REFUSED)

    def __getitem__(self, layer: Any) -> NoReturn:
        raise TypeError(_REFUSED)

    def __repr__(self) -> str:
        return f"KVCache({self._facts.name}, {len(self._rows)} rows, {self._feed.columns} columns)"

    def _recurrent(self) -> list[RecurrentLayer]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]

    # -- verbs ----------------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Withdraw the last -n columns (n <= 0, int or 0-d tensor) and confirm the rest.

        ValueError: n > 0; more than is cached; below the crop floor of a row or past what a window still holds.
        """
        n = int(tokens_to_remove)
        if n > 0:
            raise ValueError(f"crop({n}): a positive length is not supported; crop(-{n}) withdraws {n} columns")
        self._settle()
        if -n > self._feed.columns:
            raise ValueError(f"crop({n}): only {self._feed.columns} columns are cached")
        if n and self._recurrent():
            raise ValueError(f"crop({n}): recurrent states cannot be taken back")
        if self._rows:
            gone = self._feed.real_in_last(-n, len(self._rows))
            self.cache.crop(
                self._rows, [self.cache.logical_length(s) - g for s, g in zip(self._rows, gone, strict=True)]
            )
        self._feed.withdraw(-n)

    def select(self, rows: Any) -> None:
        """Row i of the result continues row rows[i]; rows named twice fork, rows not named are freed.

        rows: list of int or an i64 tensor [n]. ValueError for one that does not exist.
        """
        index = [int(i) for i in (rows.tolist() if isinstance(rows, torch.Tensor) else rows)]
        self._settle()
        index = [i + len(self._rows) if i < 0 else i for i in index]
        if not all(0 <= i < len(self._rows) for i in index):
            raise ValueError(f"select: rows must be in [0, {len(self._rows)}), got {index}")
        self._rows[:] = self.cache.select(self._rows, index)
        self._feed.select(index)
        for layer in self._recurrent():
            layer.batch_select_indices(torch.tensor(index, dtype=torch.long))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues row beam_idx[i] (i64 [B])."""
        if self._rows:
            self.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep rows `indices`: i64 [n], or a bool mask [B]."""
        if isinstance(indices, torch.Tensor) and indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        if self._rows:
            self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, next to each other; pages are shared."""
        if self._rows:
            self.select([i for i in range(len(self._rows)) for _ in range(repeats)])

    def repeat(self, n: int) -> None:
        """As batch_repeat_interleave: after a prefill, n continuations of each row that share its pages."""
        self.batch_repeat_interleave(n)

    def fork(self) -> KVCache:
        """Another KVCache that continues from here and shares the pages; as copy.deepcopy."""
        self._settle()
        other = KVCache(self._facts, self.cache)
        other._rows.extend(self.cache.fork(row, 1)[0] for row in self._rows)
        self._feed.copy_to(other._feed)
        copies = [x.clone(other._feed) if isinstance(x, RecurrentLayer) else None for x in self.layers]
        other.layers = [mine if copy is None else copy for mine, copy in zip(other.layers, copies, strict=True)]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        memo[id(self)] = other = self.fork()
        return other

    def reset(self) -> None:
        """Pages back to the pools, lengths 0; a broken cache works again."""
        self._settle(broken=True)
        rows, self._rows[:] = list(self._rows), []
        self.cache.free(rows)
        self._feed.clear()
        self.layers = [
            self._layer(i, kind, dict(kwargs)) if kind in compat.RECURRENT_TYPES else layer
            for i, (layer, (kind, kwargs)) in enumerate(zip(self.layers, self._facts.types, strict=True))
        ]

    def end_prefill(self) -> None:
        """For own loops of chunked prefill: the prompt ends here."""
        self._settle()
        self.cache.end_prefill(self._rows)

    def compress(self) -> None:
        """Plan and apply now."""
        self._settle()
        self.cache.compress()

    def trim(self) -> None:
        """Give free slabs back to the allocator."""
        self.cache.trim()

    # -- numbers --------------------------------------------------------------------------------------------------

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The rows' handles in `.cache`."""
        return tuple(self._rows)

    @property
    def columns(self) -> int:
        """Padded positions fed so far."""
        return self._feed.columns

    def _row(self, seq: int | Sequence) -> Sequence:
        return self._rows[seq] if isinstance(seq, int) else seq

    def logical_length(self, seq: int | Sequence) -> int:
        """Real tokens that a row (its number or its handle) has seen."""
        return self.cache.logical_length(self._row(seq))

    def stored_length(self, layer: int, seq: int | Sequence, head: int) -> int:
        """Slots resident of one layer, row and KV head."""
        return self.cache.stored_length(self._index[layer], self._row(seq), head)

    def materialize(self, layer: int) -> list[Any]:
        """For debugging: per row, dense keys [H, N, D], values and positions of a layer."""
        return [self.cache.materialize(self._index[layer], row) for row in self._rows]

    def nbytes(self) -> int:
        """Bytes held: pages, metadata, recurrent states."""
        return self.cache.nbytes() + sum(layer.nbytes() for layer in self._recurrent())

    def report(self) -> Any:
        """The core's report."""
        return self.cache.report()


def _release(core: Cache, rows: list[Sequence]) -> None:
    core.free(rows)


def _budget(budget: Any, compression_ratio: float | None, keep_ratio: float | None) -> Any:
    given = {"budget": budget, "compression_ratio": compression_ratio, "keep_ratio": keep_ratio}
    said = [name for name, value in given.items() if value is not None]
    if len(said) > 1:
        raise ValueError(f"{' and '.join(said)} say the same thing: give one of them")
    ratio = keep_ratio if compression_ratio is None else 1.0 - compression_ratio
    if ratio is None:
        return budget
    if not 0.0 < ratio <= 1.0:
        raise ValueError(
            f"{said[0]}: expected a share that keeps more than nothing and at most all, got {given[said[0]]}"
        )
    return f"{100.0 * ratio:g}%"


def _shape(facts: Facts) -> Shape:
    for name in ("dtype", "device"):
        found = {str(getattr(fact, name)) for fact in facts.layers}
        if len(found) > 1:
            raise Unsupported(f"{facts.name}: layers of more than one {name}: {sorted(found)}")
    specs = [LayerSpec(fact.kv_heads, fact.q_heads, fact.head_dim, fact.window) for fact in facts.layers]
    return Shape(specs, facts.layers[0].dtype, facts.layers[0].device)
