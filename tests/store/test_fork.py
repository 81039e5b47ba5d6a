"""Copy-on-write: pages are shared until written, counted once, and free when the last holder lets go."""

from __future__ import annotations

import pytest
import torch
from oracle import Pair

from kvstrata import Cache, LayerSpec, Sequence, Shape


def pages(cache: Cache) -> int:
    return sum(cache._store.pool(p)["used"] for p in range(cache._store.n_pools))


def pair_of(prompt: int) -> tuple[Pair, Sequence]:
    pair = Pair(Cache(Shape([LayerSpec(1, 1, 16)], torch.float32)), torch.Generator().manual_seed(3))
    (seq,) = pair.new(1)
    pair.feed([seq], [prompt])
    return pair, seq


def fork(pair: Pair, seq: Sequence, n: int) -> list[Sequence]:
    kids = pair.cache.fork(seq, n)
    pair.model |= {kid: pair.model[seq].copy() for kid in kids}
    return kids


def free(pair: Pair, seqs: list[Sequence]) -> None:
    pair.cache.free(seqs)
    for s in seqs:
        del pair.model[s]


@pytest.mark.parametrize(("prompt", "parent_freed", "expected"), [(512, False, 64), (520, True, 80), (520, False, 81)])
def test_sixteen_branches(prompt: int, parent_freed: bool, expected: int) -> None:
    """Prompt 512 shared by 16 branches of 32 tokens: 32 + 16 * 2 pages. With a part-filled page, one copy per writer."""
    pair, seq = pair_of(prompt)
    kids = fork(pair, seq, 16)
    if parent_freed:
        free(pair, [seq])
    for _ in range(32):
        assert pair.feed(kids, [1] * 16) < 2e-5
    assert pages(pair.cache) == expected
    pair.check_contents()
    free(pair, list(pair.model))
    assert pages(pair.cache) == 0


def test_tree() -> None:
    """Full ternary tree of depth 4, 48-token steps, prompt 512: 392 pages."""
    pair, root = pair_of(512)
    level = [root]
    for _ in range(4):
        kids = [kid for node in level for kid in fork(pair, node, 3)]
        pair.feed(kids, [48] * len(kids))
        level = kids
    assert pages(pair.cache) == 392


def test_freed_page_is_taken_in_the_same_step() -> None:
    pair, seq = pair_of(64)
    (kid,) = fork(pair, seq, 1)
    pair.feed([kid], [16])
    pair.cache.trim()
    total = pair.cache._store.pool(0)["total"]
    free(pair, [kid])
    pair.feed([seq], [16])
    assert pair.cache._store.pool(0)["total"] == total


def test_select_keeps_order_and_frees_the_rest() -> None:
    pair = Pair(Cache(Shape([LayerSpec(2, 2, 16)], torch.float32)), torch.Generator().manual_seed(4))
    seqs = pair.new(3)
    pair.feed(seqs, [20, 35, 50])
    sources = [pair.model.pop(s) for s in seqs]
    chosen = pair.cache.select(seqs, [2, 0, 0])
    pair.model = {s: sources[i].copy() for s, i in zip(chosen, [2, 0, 0], strict=True)}
    pair.check_contents()
    pair.check_pools()
    assert pair.feed(chosen, [3, 3, 3]) < 2e-5
    with pytest.raises(ValueError, match="does not exist, or was freed"):
        pair.cache.logical_length(seqs[0])
    with pytest.raises(ValueError, match=r"index has 3, expected 0..2"):
        pair.cache.select(chosen, [3])
    with pytest.raises(ValueError, match="named twice"):
        pair.cache.free([chosen[0], chosen[0]])
    pair.check_contents()
