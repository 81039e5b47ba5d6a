"""Rows read out and put back: the same bytes; what is no row is refused, and nothing changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from feeding import check_pages, drawn

from kvstrata import Cache, LayerSpec, Shape, stored, testing
from kvstrata.policy.epicache import epicache
from kvstrata.stored import StoredRow

SHAPE = Shape([LayerSpec(2, 4, 32), LayerSpec(1, 4, 64), LayerSpec(2, 2, 32, window=48)], torch.float32)

OTHER = 1
"""The pool of another head dimension than the first layer's."""


def made(far: str | None = "auto") -> tuple[Cache, Any]:
    cache = Cache(SHAPE, policy=epicache(128, recent=32, private="int8"), far=far)
    (seq,) = cache.new()
    return cache, seq


def filled() -> tuple[Cache, Any]:
    """230 tokens, compacted by two prompts, the first one's set shown."""
    cache, seq = made()
    generator = torch.Generator().manual_seed(1)
    for tokens, spans in ((200, [8, 8]), (30, [])):
        with cache.read(seq, tokens, spans, compact=bool(spans)) as step:
            for layer, (q, k, v) in enumerate(drawn(cache, tokens + sum(spans), generator)):
                step.attend(layer, q, k, v)
    cache.view(seq, [1])
    return cache, seq


def read(cache: Cache, seq: Any) -> tuple[list[StoredRow], list[tuple[torch.Tensor, torch.Tensor]]]:
    rows, pages = [], []
    for place in stored.places(cache):
        row = stored.row_of(cache, seq.id, *place)
        found = [stored.pages_of(cache, seq.id, *place, [e], pool) for e, pool in enumerate(row.pools)]
        rows.append(row)
        pages.append((torch.cat([p.flatten() for p, _ in found]), torch.cat([at for _, at in found])))
    return rows, pages


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(x, y)
        for layer in range(len(SHAPE.layers))
        for x, y in zip(a[0].materialize(layer, a[1]), b[0].materialize(layer, b[1]), strict=True)
    )


@pytest.mark.parametrize("far", ["auto", None])
def test_rows_come_back(far: str | None) -> None:
    cache, seq = filled()
    rows, pages = read(cache, seq)
    assert {1, 2} <= {tag & 0x7FFF for row in rows for tag in row.sets} and any(row.frozen for row in rows)
    assert cache.report().far_tokens > 0
    other, twin = made(far)
    names, there = stored.kinds(cache), stored.kinds(other)
    rows = [replace(row, pools=[there.index(names[p]) for p in row.pools]) for row in rows]
    other.view(twin, [1])
    stored.restore(other, twin.id, rows, lambda n, _: pages[n], cache.logical_length(seq), cache.crop_floor(seq))
    assert same((cache, seq), (other, twin)) and read(other, twin)[0] == rows
    assert other.logical_length(twin) == 230 and other.crop_floor(twin) == cache.crop_floor(seq)
    check_pages(other)
    assert (other.report().far_tokens > 0) == (far is not None)
    for c, s in ((cache, seq), (other, twin)):
        c.view(s, [2])
        with c.step([s], [3]) as step:
            for layer, (q, k, v) in enumerate(drawn(c, 3, torch.Generator().manual_seed(2))):
                step.attend(layer, q, k, v)
    assert same((cache, seq), (other, twin))


def test_unused_slots_are_not_read_out() -> None:
    """What was evicted, and what stood in memory before, is in no page that leaves."""
    cache, seq = filled()
    seen = 0
    for place in stored.places(cache):
        row = stored.row_of(cache, seq.id, *place)
        for e, (pool, alive) in enumerate(zip(row.pools, row.alive, strict=True)):
            payload, at = stored.pages_of(cache, seq.id, *place, [e], pool)
            dead = torch.tensor([not alive >> slot & 1 for slot in range(16)])
            assert bool((at[0, dead] == -1).all()) and bool((at[0, ~dead] >= 0).all())
            if stored.kinds(cache)[pool].startswith("f32"):
                k, v = payload[0].view(torch.float32).view(2, -1)
                assert not k.view(-1, 16)[:, dead].any() and not v.view(16, -1)[dead].any()
                seen += int(dead.sum())
    assert seen > 0


def changed(rows: list[StoredRow], **what: Any) -> list[StoredRow]:
    """With the first row's last sealed entry, or the row itself, otherwise."""
    row = rows[0]
    for name, value in what.items():
        old = getattr(row, name)
        if isinstance(old, list):
            value = [*old[: row.sealed - 1], value, *old[row.sealed :]]
        row = replace(row, **{name: value})
    return [row, *rows[1:]]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ({"alive": 0}, "holds no token"),
        ({"sets": 0x8000}, "is of set 32768, expected a set"),
        ({"sealed": 99}, "sealed is 99"),
        ({"sealed": 0}, "expected 65535 in the open tail|of full pages"),
        ({"pools": OTHER}, f"is of pool {OTHER}, expected one of layer 0"),
        ({"mean": (float("nan"),) * 32, "frozen": True}, "expected 32 finite ones"),
        ({"mean": (1.0,), "frozen": True}, "has 1 means, expected 32"),
        ({"mean": (1.0,) * 32, "frozen": False}, "has 32 means"),
    ],
)
def test_what_is_no_row_is_refused(what: dict[str, Any], text: str) -> None:
    cache, seq = filled()
    rows, pages = read(cache, seq)
    other, twin = made()
    assert stored.kinds(other)[OTHER] == "f32x64"
    with pytest.raises(ValueError, match=text):
        stored.restore(other, twin.id, changed(rows, **what), lambda n, _: pages[n], 230, cache.crop_floor(seq))
    refused_whole(other, twin)


def refused_whole(cache: Cache, seq: Any) -> None:
    assert cache.logical_length(seq) == 0 and cache._store.columns(0, [seq.id]) == 0
    check_pages(cache)


def test_pages_that_do_not_fit_are_refused() -> None:
    cache, seq = filled()
    rows, pages = read(cache, seq)
    floor = cache.crop_floor(seq)
    payload, at = pages[0]
    twice, behind, below = at.clone(), at.clone(), at.clone()
    twice[0, 1] = twice[0, 0]
    behind[-1, 1] = behind[-1, 0] - 1
    below[0, 0] = -5
    for first, text in (
        ((payload[:-64], at), "payload has"),
        ((payload, at[:-1]), "positions is"),
        ((payload, twice), "is there twice"),
        ((payload, behind), "rising in the open tail"),
        ((payload, below), "has position -5"),
    ):
        other, twin = made()
        with pytest.raises(ValueError, match=text):
            stored.restore(other, twin.id, rows, lambda n, _, first=first: pages[n] if n else first, 230, floor)
        refused_whole(other, twin)
    for length, low, text in (
        (229, floor, "position 229, expected below the length of 229"),
        (230, 231, "floor is 231"),
    ):
        other, twin = made()
        with pytest.raises(ValueError, match=text):
            stored.restore(other, twin.id, rows, lambda n, _: pages[n], length, low)
        refused_whole(other, twin)
    with pytest.raises(ValueError, match="holds tokens, expected none"):
        other = cache
        other._store.restore_row(seq.id, 0, 0, [], [], [], 0, 0, 0, 0, (False, []))


def test_faults_while_rows_come_back() -> None:
    cache, seq = filled()
    rows, pages = read(cache, seq)
    for point in ("far.write", "slab.lend"):
        other, twin = made()
        other.view(twin, [1])
        with testing.fault(point, 2), pytest.raises(RuntimeError, match="fault injected"):
            stored.restore(other, twin.id, rows, lambda n, _: pages[n], 230, cache.crop_floor(seq))
        refused_whole(other, twin)
        stored.restore(other, twin.id, rows, lambda n, _: pages[n], 230, cache.crop_floor(seq))
        assert same((cache, seq), (other, twin))
