"""Pools and slabs through the bare store: what is lent, taken, moved and returned."""

from __future__ import annotations

import pytest
import torch

from kvstrata._C import Store

DIM, PAGE = 16, 2 * 16 * 16 * 4  # f32 pages of head_dim 16


class Lender:
    """A store of one layer with one head, and the memory it was lent."""

    def __init__(self) -> None:
        self.store = Store([(1, 1, DIM, 0)], 0, 16, 0, 0)
        self.memory: dict[int, torch.Tensor] = {}

    def lend(self, pages: int) -> int:
        block = torch.zeros(pages * (PAGE + 64), dtype=torch.uint8)
        slab = self.store.lend(0, block.data_ptr(), block.data_ptr() + pages * PAGE, pages)
        self.memory[slab] = block
        return slab

    def feed(self, seq: int, n: int) -> None:
        x = torch.randn(n, DIM)
        self.store.begin([seq], [0, n], list(range(n)))
        self.store.append(0, (x.data_ptr(), 0, DIM, DIM), (x.data_ptr(), 0, DIM, DIM), 0, n, 1)
        self.store.commit()

    def slabs_of(self, seq: int) -> list[int]:
        return [page >> 16 & 0xFFF for page in self.store.row(seq, 0, 0)[0]]


def test_pages_come_from_the_lowest_slab() -> None:
    lender = Lender()
    assert [lender.lend(2), lender.lend(3)] == [0, 1]
    (a, b) = lender.store.create(2)
    lender.feed(a, 48)
    assert lender.slabs_of(a) == [0, 0, 1]
    lender.feed(b, 16)
    assert lender.slabs_of(b) == [1]
    lender.store.free([a])
    (c,) = lender.store.create(1)
    lender.feed(c, 16)
    assert lender.slabs_of(c) == [0], "a freed page of a low slab is taken first"
    assert lender.store.pool(0) | {"free": 3, "used": 2, "total": 5} == lender.store.pool(0)


def test_taking_more_than_is_free_changes_nothing() -> None:
    lender = Lender()
    lender.lend(2)
    (a,) = lender.store.create(1)
    lender.feed(a, 20)
    x = torch.randn(40, DIM)
    lender.store.begin([a], [0, 40], list(range(40)))
    assert lender.store.missing(0, 1, 0, 40) == [2]
    with pytest.raises(RuntimeError, match="needs 2 pages of pool 0, 0 are free; the step did not reserve them"):
        lender.store.append(0, (x.data_ptr(), 0, DIM, DIM), (x.data_ptr(), 0, DIM, DIM), 0, 40, 1)
    lender.store.rollback()
    assert lender.store.stored(a, 0, 0) == 20
    assert lender.store.pool(0)["used"] == 2


def test_empty_out_moves_live_pages() -> None:
    lender = Lender()
    first, second = lender.lend(4), lender.lend(4)
    a, b = lender.store.create(2)
    lender.feed(a, 48)
    lender.feed(b, 32)
    before = torch.empty(2, 32, DIM)
    lender.store.read(b, 0, 0, before[0].data_ptr(), before[1].data_ptr())
    kid = lender.store.fork(b, 1)[0]
    assert lender.slabs_of(b) == [0, 1]
    with pytest.raises(ValueError, match=f"slab {second} still holds pages"):
        lender.store.give_back(0, second)
    assert not lender.store.empty_out(0, first), "three live pages and a shared one, three places: no room for four"
    lender.store.free([a])
    assert lender.store.empty_out(0, first)
    assert lender.slabs_of(b) == lender.slabs_of(kid) == [second, second]
    assert lender.store.row(b, 0, 0)[0] == lender.store.row(kid, 0, 0)[0], "holders follow together"
    lender.store.give_back(0, first)
    lender.memory.pop(first).fill_(255)
    after = torch.empty(2, 32, DIM)
    lender.store.read(kid, 0, 0, after[0].data_ptr(), after[1].data_ptr())
    assert torch.equal(before, after)
    assert lender.store.pool(0)["total"] == 4
    assert lender.lend(1) == first, "a vacant index is used again"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: s.lend(1, 64, 64, 1), r"pool is 1, expected 0..0"),
        (lambda s: s.lend(0, 65, 64, 1), r"not a multiple of 64 bytes"),
        (lambda s: s.lend(0, 64, 64, 0), r"n_pages is 0, expected 1..65536"),
        (lambda s: s.lend(0, 64, 64, 65537), r"n_pages is 65537"),
        (lambda s: s.give_back(0, 3), r"slab is 3, expected a lent slab"),
        (lambda s: s.empty_out(0, 7), r"slab 7 is not lent"),
    ],
)
def test_bad_calls(call, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=text):
        call(Lender().store)


def test_seal_follows_the_window() -> None:
    """A page seals once 16 newer tokens exist (the tail holds 16 to 31), and no earlier."""
    lender = Lender()
    lender.lend(8)
    (a,) = lender.store.create(1)
    for length in range(1, 100):
        lender.feed(a, 1)
        assert lender.store.row(a, 0, 0)[3] == max(0, (length - 16) // 16)
