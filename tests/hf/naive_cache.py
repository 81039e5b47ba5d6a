"""A dense, plain-torch kvstrata.Cache: the same contract, no pages, no native code.

An oracle: every sequence keeps every key and value it was given as one tensor per layer, with positions and a mask of
what is alive; attention is a softmax over a dense mask.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from kvstrata.config import BudgetExceeded, Shape


class Sequence:
    def __init__(self, shape: Shape) -> None:
        self.length = 0
        self.floor = 0
        self.dead = False
        self.layers = [
            (
                torch.empty(s.kv_heads, 0, s.head_dim, dtype=shape.dtype),
                torch.empty(s.kv_heads, 0, s.head_dim, dtype=shape.dtype),
                torch.empty(0, dtype=torch.long),
                torch.empty(s.kv_heads, 0, dtype=torch.bool),
            )
            for s in shape.layers
        ]

    def copy(self, shape: Shape) -> Sequence:
        out = Sequence(shape)
        out.length, out.floor, out.layers = self.length, self.floor, list(self.layers)
        return out


class Step:
    def __init__(self, cache: Cache, seqs: list[Sequence], lengths, valid, columns) -> None:
        self.cache, self.seqs, self.closed, self.opened = cache, seqs, False, False
        self.packed = lengths is not None
        if self.packed:
            width = max(lengths)
            self.lengths = list(lengths)
            valid = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        elif valid is None:
            valid = torch.ones(len(seqs), columns, dtype=torch.bool)
        self.valid = valid
        self.positions_padded = torch.where(
            valid, valid.long().cumsum(1) - 1 + torch.tensor([s.length for s in seqs])[:, None], 0
        )
        self.positions = self.positions_padded[valid] if self.packed else self.positions_padded
        self.done: dict[int, list] = {}

    def open(self) -> Step:
        if any(s.dead for s in self.seqs):
            raise ValueError("sequence was freed")
        tokens = max(s.length + int(v.sum()) for s, v in zip(self.seqs, self.valid, strict=True))
        if self.cache.budget is not None and tokens > self.cache.budget:
            raise BudgetExceeded(f"step needs {tokens} tokens per row, the budget is {self.cache.budget}")
        self.opened = True
        self.cache.open_steps += 1
        return self

    def attend(self, layer, q, k, v, *, scale=None, softcap=None, sinks=None):
        assert self.opened and not self.closed and layer not in self.done
        if self.packed:
            q, k, v = (self._pad(x) for x in (q, k, v))
        spec = self.cache.shape.layers[layer]
        assert q.shape[2:] == (spec.q_heads, spec.head_dim) and k.shape[2:] == (spec.kv_heads, spec.head_dim)
        scale = spec.head_dim**-0.5 if scale is None else scale
        rows, out = [], torch.zeros_like(q, memory_format=torch.contiguous_format)
        for b, seq in enumerate(self.seqs):
            ok, pos = self.valid[b], self.positions_padded[b]
            old_k, old_v, old_pos, alive = seq.layers[layer]
            keys = torch.cat([old_k, k[b][ok].transpose(0, 1)], 1)
            values = torch.cat([old_v, v[b][ok].transpose(0, 1)], 1)
            at = torch.cat([old_pos, pos[ok]])
            alive = torch.cat([alive, torch.ones(spec.kv_heads, int(ok.sum()), dtype=torch.bool)], 1)
            rows.append((keys, values, at, alive))
            if ok.any():
                out[b][ok] = self._rows(q[b][ok], keys, values, at, alive, pos[ok], spec, scale, softcap, sinks)
        self.done[layer] = rows
        return out[self.valid] if self.packed else out

    @staticmethod
    def _rows(q, keys, values, at, alive, pos, spec, scale, softcap, sinks):
        group = spec.q_heads // spec.kv_heads
        keys, values = keys.repeat_interleave(group, 0).float(), values.repeat_interleave(group, 0).float()
        scores = torch.einsum("thd,hnd->htn", q.float(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        see = at[None] <= pos[:, None]
        if spec.window is not None:
            see = see & (at[None] > pos[:, None] - spec.window)
        see = see[None] & alive.repeat_interleave(group, 0)[:, None]
        scores = scores.masked_fill(~see, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)], 2)
        probs = scores.softmax(-1).nan_to_num(0.0)[..., : keys.shape[1]]
        return torch.einsum("htn,hnd->thd", probs, values).to(q.dtype)

    def _pad(self, x):
        out = x.new_zeros(*self.valid.shape, *x.shape[1:])
        out[self.valid] = x
        return out

    def commit(self) -> None:
        assert self.opened and not self.closed
        assert set(self.done) == set(range(len(self.cache.shape.layers)))
        for layer, rows in self.done.items():
            for seq, row in zip(self.seqs, rows, strict=True):
                seq.layers[layer] = row
        for seq, ok in zip(self.seqs, self.valid, strict=True):
            seq.length += int(ok.sum())
        self._close()

    def rollback(self) -> None:
        self.done.clear()
        self._close()

    def _close(self) -> None:
        self.closed = True
        self.cache.open_steps -= 1

    def __enter__(self):
        return self.open()

    def __exit__(self, kind, *_):
        self.commit() if kind is None else self.rollback()


@dataclass(frozen=True)
class Report:
    policy: str
    nbytes: int

    def to_dict(self):
        return asdict(self)


class _Full:
    name = "full"


class Cache:
    def __init__(self, shape, budget=None, policy=None, far="auto", ledger=None, hold=64) -> None:
        self.shape, self.budget, self.hold, self.policy = shape, budget, hold, policy or _Full()
        self.live: list[Sequence] = []
        self.open_steps = 0
        self.recording = False

    def new(self, n):
        seqs = [Sequence(self.shape) for _ in range(n)]
        self.live += seqs
        return seqs

    def step(self, seqs, lengths=None, *, valid=None, columns=None):
        return Step(self, list(seqs), lengths, valid, columns)

    def free(self, seqs) -> None:
        for seq in seqs:
            assert not seq.dead, "freed twice"
            seq.dead = True
            self.live.remove(seq)

    def fork(self, seq, n):
        out = [seq.copy(self.shape) for _ in range(n)]
        self.live += out
        return out

    def select(self, seqs, index):
        out = [seqs[i].copy(self.shape) for i in index]
        self.live += out
        self.free(seqs)
        return out

    def crop(self, seqs, lengths) -> None:
        for seq, length in zip(seqs, lengths, strict=True):
            if length < self.crop_floor(seq) or length > seq.length:
                raise ValueError(f"crop to {length}: the length is {seq.length}, the floor {self.crop_floor(seq)}")
        for seq, length in zip(seqs, lengths, strict=True):
            seq.layers = [
                (k[:, p < length], v[:, p < length], p[p < length], a[:, p < length]) for k, v, p, a in seq.layers
            ]
            seq.length = length

    def crop_floor(self, seq) -> int:
        return seq.floor

    def set_recording(self, on) -> None:
        self.recording = on

    def confirm(self, seqs) -> None: ...
    def end_prefill(self, seqs) -> None: ...
    def compress(self) -> None: ...
    def trim(self) -> None: ...

    def logical_length(self, seq) -> int:
        return seq.length

    def stored_length(self, layer, seq, head) -> int:
        return int(seq.layers[layer][3][head].sum())

    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for s in self.live for k, v, _, _ in s.layers)

    def reset(self) -> None:
        for seq in list(self.live):
            self.free([seq])

    def report(self):
        return Report(self.policy.name, self.nbytes())

    def materialize(self, layer, seq):
        k, v, p, a = seq.layers[layer]
        return k, v, p.expand(k.shape[0], -1), a

    def drop(self, layer, seq, keep) -> None:
        k, v, p, a = seq.layers[layer]
        seq.layers[layer] = (k, v, p, a & keep)
        seq.floor = seq.length
