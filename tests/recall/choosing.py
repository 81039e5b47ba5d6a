"""What a step of one token should read of a row, and what comes of it: from k, v and positions, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstrata import Cache, Sequence, reference

SLOTS = 16


@dataclass
class Table:
    """The page table of one row: k, v f64 [M, 16, D], slots bool and positions i32 [M, 16], page ids, sealed entries."""

    k: Tensor
    v: Tensor
    slots: Tensor
    positions: Tensor
    pages: list[int]
    sealed: int


@dataclass
class Read:
    """A row's step: the output f64 [G, D], the entries that were selected, by how much of its vote the last of them was ahead
    of the next, and the share of the mass that was read as summaries estimate it [G]."""

    out: Tensor
    entries: list[int]
    margin: float
    captured: Tensor


def table(cache: Cache, seq: Sequence, layer: int, head: int) -> Table:
    """As the row stands now."""
    k, v, positions = (x[head] for x in cache.materialize(layer, seq))
    pages, alive, _, sealed = cache._store.row(seq.id, layer, head)
    slots = (torch.tensor(alive, dtype=torch.int64)[:, None] >> torch.arange(SLOTS) & 1).bool()
    n, entries = int(slots.sum()), len(pages)
    wide = [torch.zeros(entries, SLOTS, x.shape[-1], dtype=torch.float64) for x in (k, v)]
    for to, x in zip(wide, (k, v), strict=True):
        to[slots] = x[:n].double()
    places = torch.full((entries, SLOTS), -1, dtype=torch.int32)
    places[slots] = positions[:n]
    return Table(wide[0], wide[1], slots, places, pages, sealed)


def read(
    row: Table,
    q: Tensor,
    own: tuple[Tensor, Tensor],
    sinks: int,
    most: int,
    weight: float = 1.0,
    aggregate: str = "sum",
    born: Table | None = None,
) -> Read:
    """The step of one token: q [G, D], own k, v [D], pages that hold the first ``sinks`` positions are always read.

    born: the row at an earlier time, before slots left its pages: summaries are of what those held when they were sealed.
    """
    first, scale = sinks // SLOTS, q.shape[-1] ** -0.5
    indexed = torch.arange(row.sealed)[first:]
    steady = torch.cat([torch.arange(min(first, row.sealed)), torch.arange(row.sealed, len(row.pages))])
    base_k, base_v = seen(row, steady, own)
    lse_base = torch.logsumexp(q.double() @ base_k.T * scale, -1)
    made_k, made_slots = (row.k, row.slots) if born is None else as_sealed(row, born)
    blocks = reference.recall.summarize(made_k[indexed][None], made_slots[indexed][None])
    visible = (row.slots[indexed].long() << torch.arange(SLOTS)).sum(1).to(torch.uint16)
    x = reference.recall.score_pages(q[None], blocks, visible[None], spread_weight=weight)
    chosen, count, rest = reference.recall.select(x, most, lse_base[None], aggregate)
    entries = indexed[chosen[0, : int(count[0])].long()].tolist()
    k, v = seen(row, torch.cat([steady, torch.tensor(entries, dtype=torch.int64)]), own)
    z = q.double() @ k.T * scale
    captured = 1 / (1 + torch.exp(rest[0] - torch.logsumexp(z, -1)))
    return Read(z.softmax(-1) @ v, entries, margin(x, lse_base, most, aggregate), captured)


def as_sealed(row: Table, born: Table) -> tuple[Tensor, Tensor]:
    """k, slots of the row's pages, of those that it had in an earlier table as they were then."""
    k, slots = row.k.clone(), row.slots.clone()
    for e, page in enumerate(row.pages):
        then = born.pages.index(page) if page in born.pages else None
        if then is not None and torch.equal(born.k[then][row.slots[e]], row.k[e][row.slots[e]]):
            k[e], slots[e] = born.k[then], born.slots[then]
    return k, slots


def seen(row: Table, entries: Tensor, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """k, v f64 [n, D] of the tokens of some entries and of the step's own."""
    slots = row.slots[entries]
    k, v = ([x[entries][slots], y[None].double()] for x, y in zip((row.k, row.v), own, strict=True))
    return torch.cat(k), torch.cat(v)


def margin(x: Tensor, lse_base: Tensor, most: int, aggregate: str) -> float:
    """By what share of its vote the last selected page is ahead of the first that is not; inf where all are selected."""
    vote = reference.recall.page_votes(x, lse_base[None], aggregate)[0].sort(descending=True).values
    return float(1 - vote[most] / vote[most - 1]) if len(vote) > most else torch.inf
