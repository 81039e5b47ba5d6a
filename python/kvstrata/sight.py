"""What the roles of a policy see of one layer of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstrata.policy.base import Seen
from kvstrata.rows import Rows, Spans

if TYPE_CHECKING:
    from kvstrata.cache import Cache


def see(
    cache: Cache,
    layer: int,
    ids: list[int],
    ends: list[int],
    arithmetic: tuple[float, float] | None,
    spans: Spans | None = None,
) -> Seen | None:
    """The stored tokens of some sequences, of so many tokens each, in a layer; None where there are none to plan.

    arithmetic: scale of q . k and softcap, as the model last used them; spans: queries beside the one sequence's own.
    """
    spec = cache.shape.layers[layer]
    columns = cache._store.columns(layer, ids)
    if spec.window is not None or columns == 0:
        return None
    size, archives = (len(ids) * spec.kv_heads, columns), cache.policy.archives
    positions = torch.empty(size, dtype=torch.int32)
    tail, state = torch.empty(size, dtype=torch.bool), torch.empty(size, dtype=torch.uint8)
    tier, grouped = (torch.empty(size, dtype=torch.uint8) if archives else None for _ in range(2))
    entry = torch.empty(size, dtype=torch.int32) if archives else None
    where = positions.data_ptr(), tail.data_ptr(), state.data_ptr(), 0, address(tier), address(grouped), address(entry)
    cache._store.look(layer, ids, *where, columns)
    return Seen(
        layer,
        positions,
        torch.tensor(ends).repeat_interleave(spec.kv_heads),
        tail,
        state,
        cache.policy.sinks,
        read=Rows(cache._store, cache.shape, layer, ids, columns, arithmetic or (spec.head_dim**-0.5, 0.0), spans),
        tier=tier,
        grouped=grouped,
        entry=entry,
    )


def sets_of(cache: Cache, seen: Seen, ids: list[int]) -> Tensor:
    """u16 [R, N]: the set of each token's page now."""
    sets = torch.empty(seen.positions.shape, dtype=torch.uint16)
    cache._store.look_sets(seen.layer, ids, sets.data_ptr(), sets.shape[1])
    return sets


def address(column: Tensor | None) -> int:
    """Of its first element; 0: none."""
    return 0 if column is None else column.data_ptr()
