"""KVCache: the transformers face of a kvstrata.Cache."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch

from kvstrata.cache import Cache, Sequence
from kvstrata.config import LayerSpec, Shape, Unsupported
from kvstrata.hf.batch import Batch
from kvstrata.hf.decoder import facts_of
from kvstrata.hf.facts import Facts
from kvstrata.hf.layers import FedCache, RecurrentLayer, layer_of, refuse_early_initialization
from kvstrata.hf.report import KVReport

_REFUSED = "a KVCache holds pages, not tensors per layer: KVCache.materialize(layer) gives keys, values and positions"


class KVCache(FedCache):
    """A paged KV cache for one patched decoder, passed to `generate` or `forward` as `past_key_values`.

    Made by `KVCache.for_model`. Rows of the batch are sequences of the underlying `kvstrata.Cache` (`.cache`,
    `.sequences`); they come into being with the first forward. `layer` arguments are the model's layer indices.
    """

    def __init__(self, facts: Facts, core: Cache) -> None:
        self.cache = core
        self._batch = batch = Batch(facts, core)
        super().__init__(batch)
        weakref.finalize(self, batch.discard).atexit = False

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
        far: "auto", None, "64GiB" or a Far. hold: tokens that stay revocable while assisted decoding records. ledger: None, or
        a `kvstrata.budget.Ledger` that limits several caches together; its scope is `.cache.scope`.

        RuntimeError if the model is not patched; ValueError for a budget or policy that cannot work; Unsupported for
        a shape the core does not serve.
        """
        _, facts = facts_of(model)
        budget = _budget(budget, compression_ratio, keep_ratio)
        core = Cache(shape_of(facts), budget=budget, policy=policy, far=far, ledger=ledger, hold=hold)
        return cls(facts, core)

    # -- what transformers asks -----------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward."""
        return len(self._batch.rows) or -1

    @property
    def is_croppable(self) -> bool:
        """True while no lossy event lies past the confirmed length; False with recurrent layers."""
        if self._recurrent():
            return False
        floors = [self.cache.crop_floor(s) < max(1, self.cache.logical_length(s)) for s in self._batch.rows]
        return self._batch.feed.recording or all(floors)

    def activate_past_recording(self) -> None:
        """From now on the last `hold` tokens are neither sealed nor planned until `crop` confirms them."""
        self._batch.feed.record(True)

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
        return f"KVCache({self._batch.facts.name}, {len(self._batch.rows)} rows, {self._batch.feed.columns} columns)"

    def _recurrent(self) -> list[RecurrentLayer]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]

    # -- verbs ----------------------------------------------------------------------------------------------------

    def append(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        queries: list[torch.Tensor] | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        """Store tokens that were computed elsewhere, as a dense cache holds them: one [B, H, T, D] per attention layer.

        keys after rotary embedding; queries [B, Hq, T, D], for policies that score by them, with the model's scale (D^-1/2 if
        None) and softcap. No padding. May be called chunk by chunk; `end_prefill` ends the prompt. ValueError for other
        layers, shapes or dtypes, without queries that are needed, and where padding is cached; Unsupported for a model with
        recurrent layers, whose states keys do not hold.
        """
        if self._recurrent():
            raise Unsupported("append: the model has recurrent layers, whose states keys and values do not hold")
        self._batch.append(keys, values, queries, scale, softcap)

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Withdraw the last -n columns (n <= 0, int or 0-d tensor) and confirm the rest.

        ValueError: n > 0; more than is cached; below the crop floor of a row or past what a window still holds.
        """
        n = int(tokens_to_remove)
        if n > 0:
            raise ValueError(f"crop({n}): a positive length is not supported; crop(-{n}) withdraws {n} columns")
        self._batch.settle()
        if -n > self._batch.feed.columns:
            raise ValueError(f"crop({n}): only {self._batch.feed.columns} columns are cached")
        if n and self._recurrent():
            raise ValueError(f"crop({n}): recurrent states cannot be taken back")
        self._batch.crop(-n)

    def select(self, rows: Any) -> None:
        """Row i of the result continues row rows[i]; rows named twice fork, rows not named are freed.

        rows: list of int or an i64 tensor [n]. ValueError for one that does not exist.
        """
        index = [int(i) for i in (rows.tolist() if isinstance(rows, torch.Tensor) else rows)]
        self._batch.settle()
        index = [i + len(self._batch.rows) if i < 0 else i for i in index]
        if not all(0 <= i < len(self._batch.rows) for i in index):
            raise ValueError(f"select: rows must be in [0, {len(self._batch.rows)}), got {index}")
        self._batch.select(index)
        for layer in self._recurrent():
            layer.batch_select_indices(torch.tensor(index, dtype=torch.long))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues row beam_idx[i] (i64 [B])."""
        if self._batch.rows:
            self.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep rows `indices`: i64 [n], or a bool mask [B]."""
        if isinstance(indices, torch.Tensor) and indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        if self._batch.rows:
            self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, next to each other; pages are shared."""
        if self._batch.rows:
            self.select([i for i in range(len(self._batch.rows)) for _ in range(repeats)])

    def repeat(self, n: int) -> None:
        """As batch_repeat_interleave: after a prefill, n continuations of each row that share its pages."""
        self.batch_repeat_interleave(n)

    def fork(self) -> KVCache:
        """Another KVCache that continues from here and shares the pages; as copy.deepcopy."""
        self._batch.settle()
        other = KVCache(self._batch.facts, self.cache)
        self._batch.fork_to(other._batch)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, RecurrentLayer):
                other.layers[i] = layer.clone(other._batch.feed)
        return other

    def __copy__(self) -> KVCache:
        return self.fork()  # two caches over one set of rows would end them twice

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        memo[id(self)] = other = self.fork()
        return other

    def reset(self) -> None:
        """Pages back to the pools, lengths 0; a broken cache works again."""
        self._batch.settle(broken=True)
        self._batch.release()
        self._batch.feed.clear()
        for i, layer in enumerate(self.layers):
            if isinstance(layer, RecurrentLayer):
                self.layers[i] = layer_of(self._batch, i)

    def end_prefill(self) -> None:
        """For own loops of chunked prefill: the prompt ends here."""
        self._batch.settle()
        self.cache.end_prefill(self._batch.rows)

    def compress(self) -> None:
        """Plan and apply now."""
        self._batch.settle()
        self.cache.compress()

    def trim(self) -> None:
        """Give free slabs back to the allocator."""
        self.cache.trim()

    # -- numbers --------------------------------------------------------------------------------------------------

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The rows' handles in `.cache`."""
        return tuple(self._batch.rows)

    @property
    def attention_layers(self) -> frozenset[int]:
        """The model's layer indices that have keys and values here."""
        return self._batch.attention_layers

    @property
    def columns(self) -> int:
        """Padded positions fed so far."""
        return self._batch.feed.columns

    def _row(self, seq: int | Sequence) -> Sequence:
        return self._batch.rows[seq] if isinstance(seq, int) else seq

    def logical_length(self, seq: int | Sequence) -> int:
        """Real tokens that a row (its number or its handle) has seen."""
        return self.cache.logical_length(self._row(seq))

    def stored_length(self, layer: int, seq: int | Sequence, head: int) -> int:
        """Slots resident of one layer, row and KV head."""
        return self.cache.stored_length(self._batch.index[layer], self._row(seq), head)

    def materialize(self, layer: int) -> list[Any]:
        """For debugging: per row, dense keys [H, N, D], values and positions of a layer."""
        return [self.cache.materialize(self._batch.index[layer], row) for row in self._batch.rows]

    def nbytes(self) -> int:
        """Bytes held: pages, metadata, recurrent states."""
        return self.cache.nbytes() + sum(layer.nbytes() for layer in self._recurrent())

    def report(self) -> KVReport:
        """What the cache holds, as data and as a rich table. Sequences of forks that share its pages are in it too."""
        states = sum(layer.nbytes() for layer in self._recurrent())
        return KVReport.of(self.cache.report(), self.columns, states)


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


def shape_of(facts: Facts) -> Shape:
    """A cache's shape for a decoder. Unsupported: layers of more than one dtype or device, or what the core refuses."""
    for name in ("dtype", "device"):
        found = {str(getattr(fact, name)) for fact in facts.layers}
        if len(found) > 1:
            raise Unsupported(f"{facts.name}: layers of more than one {name}: {sorted(found)}")
    specs = [LayerSpec(fact.kv_heads, fact.q_heads, fact.head_dim, fact.window) for fact in facts.layers]
    return Shape(specs, facts.layers[0].dtype, facts.layers[0].device)
