"""A dense cache in plain torch: per sequence, layer and head a list of (position, key, value). What the store must equal."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvstrata import Cache, LayerSpec, Sequence, Shape


@dataclass
class Row:
    positions: list[int] = field(default_factory=list)
    k: list[torch.Tensor] = field(default_factory=list)
    v: list[torch.Tensor] = field(default_factory=list)

    def copy(self) -> Row:
        return Row(list(self.positions), list(self.k), list(self.v))

    def keep(self, flags: list[bool]) -> None:
        self.positions = [x for x, f in zip(self.positions, flags, strict=True) if f]
        self.k = [x for x, f in zip(self.k, flags, strict=True) if f]
        self.v = [x for x, f in zip(self.v, flags, strict=True) if f]


@dataclass
class Dense:
    """One sequence."""

    shape: Shape
    length: int = 0
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, spec in enumerate(self.shape.layers):
            for head in range(spec.kv_heads):
                self.rows.setdefault((layer, head), Row())

    def copy(self) -> Dense:
        return Dense(self.shape, self.length, {key: row.copy() for key, row in self.rows.items()})

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [n, H, D]: the layer's next tokens, from position ``length`` on."""
        for head in range(k.shape[1]):
            row = self.rows[layer, head]
            row.positions += range(self.length, self.length + k.shape[0])
            row.k += list(k[:, head])
            row.v += list(v[:, head])

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        first: int,
        scale: float,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [n, Hq, D] at positions first.. -> [n, Hq, D] in f64."""
        spec = self.shape.layers[layer]
        group = spec.q_heads // spec.kv_heads
        out = torch.zeros(q.shape, dtype=torch.float64)
        pos_q = torch.arange(first, first + q.shape[0])[:, None]
        for g in range(spec.q_heads):
            row = self.rows[layer, g // group]
            if not row.k:
                continue
            pos_k = torch.tensor(row.positions)[None]
            z = q[:, g].double() @ torch.stack(row.k).double().T * scale
            if softcap:
                z = (z / softcap).tanh() * softcap
            hidden = pos_k > pos_q
            if spec.window is not None:
                hidden |= pos_k <= pos_q - spec.window
            z = z.masked_fill(hidden, -torch.inf)
            lse = z.logsumexp(-1, keepdim=True)
            if sinks is not None:
                lse = torch.logaddexp(lse, sinks[g].double())
            out[:, g] = (z - lse).exp().nan_to_num(0.0) @ torch.stack(row.v).double()
        return out


@dataclass
class Pair:
    """A cache and its oracle, fed the same tokens."""

    cache: Cache
    generator: torch.Generator
    softcap: float = 0.0
    sinks: bool = False
    model: dict[Sequence, Dense] = field(default_factory=dict)

    def new(self, n: int) -> list[Sequence]:
        seqs = self.cache.new(n)
        self.model |= {s: Dense(self.cache.shape) for s in seqs}
        return seqs

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator).to(self.cache.shape.dtype)

    def feed(self, seqs: list[Sequence], lengths: list[int], *, padded: bool = False, left: bool = True) -> float:
        """One step of random tokens through every layer; returns the largest relative error of an output row."""
        if padded:
            width = max(lengths)
            valid = torch.zeros(len(seqs), width, dtype=torch.bool)
            for b, n in enumerate(lengths):
                valid[b, width - n if left else 0 : width if left else n] = True
            step = self.cache.step(seqs, valid=valid)
        else:
            valid = None
            step = self.cache.step(seqs, lengths)
        worst = 0.0
        with step:
            for layer, spec in enumerate(self.cache.shape.layers):
                worst = max(worst, self._layer(step, layer, spec, seqs, lengths, valid))
        for s, n in zip(seqs, lengths, strict=True):
            self.model[s].length += n
        return worst

    def _layer(self, step, layer: int, spec: LayerSpec, seqs, lengths, valid) -> float:  # type: ignore[no-untyped-def]
        n = sum(lengths)
        q, k, v = (self.random(n, h, spec.head_dim) for h in (spec.q_heads, spec.kv_heads, spec.kv_heads))
        sinks = self.random(spec.q_heads) if self.sinks else None
        scale = spec.head_dim**-0.5
        if valid is None:
            got = step.attend(layer, q, k, v, softcap=self.softcap or None, sinks=sinks)
        else:
            padded = [torch.full((*valid.shape, *x.shape[1:]), torch.nan, dtype=x.dtype) for x in (q, k, v)]
            for p, x in zip(padded, (q, k, v), strict=True):
                p[valid] = x
            out = step.attend(layer, *padded, softcap=self.softcap or None, sinks=sinks)
            assert not out[~valid].any(), "padding must read zeros"
            got = out[valid]
        worst, start = 0.0, 0
        for s, count in zip(seqs, lengths, strict=True):
            here = slice(start, start + count)
            dense = self.model[s]
            dense.append(layer, k[here], v[here])
            want = dense.attend(layer, q[here], dense.length, scale, self.softcap, sinks)
            error = (got[here].double() - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-6)
            worst = max(worst, float(error.max()) if count else 0.0)
            assert torch.isfinite(got[here]).all()
            start += count
        return worst

    def check_contents(self) -> None:
        """Stored tokens, their order and their bytes."""
        for s, dense in self.model.items():
            assert self.cache.logical_length(s) == dense.length
            for layer, spec in enumerate(self.cache.shape.layers):
                k, v, positions = self.cache.materialize(layer, s)
                for h in range(spec.kv_heads):
                    row = dense.rows[layer, h]
                    n = len(row.positions)
                    assert self.cache.stored_length(layer, s, h) == n
                    assert positions[h, :n].tolist() == row.positions
                    assert (positions[h, n:] == -1).all()
                    if n:
                        assert torch.equal(k[h, :n], torch.stack(row.k))
                        assert torch.equal(v[h, :n], torch.stack(row.v))

    def sealed_pages(self) -> dict[tuple[int, int, int, int], bytes]:
        """Payload and positions of every sealed page, by sequence, layer, head and page: a page that one row frees may be
        taken by the next."""
        store, out = self.cache._store, {}
        for s in self.model:
            for layer, spec in enumerate(self.cache.shape.layers):
                for h in range(spec.kv_heads):
                    pages, _, _, sealed = store.row(s.id, layer, h)
                    out |= {(s.id, layer, h, page): self._payload(page) for page in pages[:sealed]}
        return out

    def _payload(self, page: int) -> bytes:
        pool, slab, index = page >> 28, page >> 16 & 0xFFF, page & 0xFFFF
        block = self.cache._slabs._tensors[pool, slab].numpy()
        size = self.cache._store.pool(pool)["page_bytes"]
        n = len(block) // (size + 64)
        return (
            block[index * size : (index + 1) * size].tobytes()
            + block[n * size :][index * 64 : (index + 1) * 64].tobytes()
        )

    def check_pools(self) -> None:
        """free + used = total, and used is exactly the pages that tables hold."""
        store = self.cache._store
        held: dict[int, set[int]] = {p: set() for p in range(store.n_pools)}
        for s in self.model:
            for layer, spec in enumerate(self.cache.shape.layers):
                for h in range(spec.kv_heads):
                    pages, alive, hidden, sealed = store.row(s.id, layer, h)
                    assert 0 <= sealed <= len(pages)
                    assert all(alive), "an entry without a slot must leave the table"
                    assert not any(hidden)
                    held[store.pool_of(layer)].update(pages)
        for p, pages in held.items():
            state = store.pool(p)
            assert state["used"] == len(pages)
            assert state["free"] + state["used"] == state["total"]
            slabs = store.slabs(p)
            assert sum(n for _, n, _ in slabs) == state["total"]
            assert sum(f for _, _, f in slabs) == state["free"]
