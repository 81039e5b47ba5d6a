"""Two levels of a long row: groups of pages are ranked first. What a cache keeps of them is as if it were made anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from archived import Fed, fed, small
from torch import Tensor

from kvstrata import LayerSpec, Shape
from kvstrata.recall import Archive, Bounds, MassThreshold, PageMeans, Position

SHAPE = Shape([LayerSpec(1, 2, 32)] * 2, torch.float32)
BUDGET = 32 + 16 + 15 + 4 * 16
LONG = 4200
"""Tokens of more than 4 groups of 512."""


def levels(flat_pages: int = 0, **more: Any) -> PageMeans:
    return PageMeans(BUDGET, flat_pages=flat_pages, **more)


def begun(selector: Any, seed: int = 0, **more: Any) -> tuple[Fed, list[Any]]:
    pair = fed(replace(small(4, chunk=2048, **more), selector=selector), SHAPE, seed)
    seqs = pair.new()
    pair.feed(seqs, [LONG])
    return pair, seqs


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_all_groups_are_as_one_level() -> None:
    (flat, a), (all_of_them, b), (some, c) = (begun(s) for s in (levels(1 << 20), levels(expand=1.0), levels()))
    outs = [
        [x for _ in range(12) for x in pair.feed(seqs, [1])] for pair, seqs in ((flat, a), (all_of_them, b), (some, c))
    ]
    assert same(outs[0], outs[1])
    assert not same(outs[0], outs[2]), "a quarter of the groups leaves something out"
    captured = [pair.cache.report().recall.captured for pair in (flat, all_of_them, some)]  # type: ignore[union-attr]
    assert captured[1] == pytest.approx(captured[0], rel=1e-5)
    tables = [pair.cache.report().bytes_by_kind["tables"] for pair in (flat, some)]
    assert 0 < tables[1] - tables[0] <= 2 * (16 * (32 + 12) + 64 + 16), "one block of groups for each row"


@pytest.mark.parametrize("selector", [levels(), levels(estimate=0.5), MassThreshold(BUDGET, mass=0.9, flat_pages=0)])
def test_kept_groups_are_as_made_anew(selector: PageMeans) -> None:
    """Through appends, plans, forks and crops: a twin whose groups are thrown away before each step answers the same."""
    (pair, seqs), (twin, others) = begun(selector), begun(selector)

    def step(lengths: list[int]) -> None:
        twin.cache.set_selector(replace(selector, flat_pages=1 << 20))
        twin.cache.set_selector(selector)
        assert same(pair.feed(seqs, lengths), twin.feed(others, lengths))

    for _ in range(3):
        step([1])
    seqs += pair.fork(seqs[0])
    others += twin.fork(others[0])
    step([1, 1])
    step([300, 1])
    for one, which in ((pair, seqs), (twin, others)):
        one.crop(which[1], 3000)  # entries narrow and leave, also inside groups
    for _ in range(17):  # over the end of an interval
        step([1, 1])
    step([1, 700])
    step([1, 1])
    pair.check_contents()
    pair.check_pools()


def test_short_rows_and_bounds_have_no_groups() -> None:
    for selector, other in ((levels(300), levels(1 << 20)), (Bounds(BUDGET), Bounds(BUDGET))):
        (pair, a), (twin, b) = begun(selector), begun(other)
        assert same(pair.feed(a, [1]), twin.feed(b, [1]))
        assert pair.cache.report().bytes_by_kind["tables"] == twin.cache.report().bytes_by_kind["tables"]


def test_pages_in_the_order_of_position() -> None:
    """Rows that nothing packs anew have groups as well; a limit counts them."""
    policy = replace(small(4), planner=Archive(Position(), segment=256, segment_min=256), selector=levels())
    pair = fed(policy, SHAPE, budget="1MiB")
    seqs = pair.new()
    for _ in range(10):
        pair.feed(seqs, [500])
        pair.feed(seqs, [1])
        assert pair.cache.nbytes() <= 1 << 20
    pair.check_pools()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="PageMeans: flat_pages is -1, expected 0 .all rows have groups. to"):
        levels(-1)
    with pytest.raises(ValueError, match=r"PageMeans: expand is 1\.5, expected 0 to 1"):
        levels(expand=1.5)
