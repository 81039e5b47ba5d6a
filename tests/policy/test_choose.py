"""choose_states: ranks, pages, and what no plan may do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstrata.ops import choose_states
from kvstrata.policy.base import EVICTED, FULL, INT2, INT4, INT8
from kvstrata.policy.choose import fall

LEVEL = torch.tensor([4, 0, 1, 2, 3])  # of a state: Full, int8, int4, int2, Evicted
NAN, INF = float("nan"), float("inf")


def choose(
    score: list[float],
    now: list[int] | None = None,
    positions: list[int] | None = None,
    protect: list[int] | None = None,
    full: int = 0,
    quant: int = 0,
    target: int = INT4,
) -> list[int]:
    n = len(score)
    at = torch.tensor([range(n) if positions is None else positions], dtype=torch.int32)
    shield = torch.zeros(1, n, dtype=torch.bool)
    shield[0, torch.tensor(protect or [], dtype=torch.int64)] = True
    state = torch.tensor([now or [FULL] * n], dtype=torch.uint8)
    pages = torch.tensor([full]), torch.tensor([quant])
    return choose_states(torch.tensor([score]), state, at, shield, *pages, target)[0].tolist()


def test_by_rank_full_then_quantized_then_evicted() -> None:
    assert choose([float(i) for i in range(40)], full=1, quant=1) == [0] * 8 + [INT4] * 16 + [FULL] * 16


def test_quantized_tokens_take_no_full_page() -> None:
    """The best 16 are int4 already: they stay so, and the Full page goes to the 16 best that are still Full."""
    now = [FULL] * 32 + [INT4] * 16
    got = choose([float(i) for i in range(48)], now, full=1, quant=1)
    assert got == [EVICTED] * 16 + [FULL] * 16 + [INT4] * 16


def test_ties_older_first_whatever_the_table_order() -> None:
    positions = [5, 90, 3, *range(10, 25)]
    got = choose([1.0] * 18, positions=positions, full=1)
    assert got == [FULL, EVICTED, *[FULL] * 15, EVICTED], "the newest two, 90 and 24, go"
    assert choose([0.0, -0.0] * 9, full=1) == [FULL] * 16 + [EVICTED] * 2, "zero has no sign"


def test_what_is_not_finite_ranks_lowest() -> None:
    score = [NAN, INF, -INF, *[-3e38] * 15]
    assert choose(score, full=1) == [FULL, EVICTED, EVICTED, *[FULL] * 15], "among them the older, too"


def test_bits_only_fall_and_the_gone_stay_gone() -> None:
    now = [FULL, INT8, INT4, INT2, EVICTED]
    assert choose([1.0] * 5, now, quant=2, target=INT4) == [INT4, INT4, INT4, INT2, EVICTED]
    assert choose([1.0] * 5, now, quant=9, target=INT8) == [INT8, INT8, INT4, INT2, EVICTED]
    assert choose([1.0] * 5, now, quant=1, target=INT2) == [INT2] * 4 + [EVICTED]


def test_a_second_format_takes_its_own_page_and_fills_it() -> None:
    """int4 by rank 0..9, int2 10..19, int4 20..29: one page takes ten int4 and fills up with six more, no int2."""
    now = [INT4] * 10 + [INT2] * 10 + [INT4] * 10
    score = [float(-i) for i in range(30)]
    assert choose(score, now, quant=1) == [INT4] * 10 + [0] * 10 + [INT4] * 6 + [0] * 4
    assert choose(score, now, quant=2) == [INT4] * 10 + [INT2] * 10 + [INT4] * 6 + [0] * 4
    assert choose(score, now, quant=3) == now


def test_protected_tokens_keep_their_state_and_take_no_page() -> None:
    now = [FULL] * 20
    now[3] = INT2
    got = choose([float(i) for i in range(20)], now, protect=[0, 3], full=1)
    assert got == [FULL, EVICTED, EVICTED, INT2, *[FULL] * 16]


def test_empty_rows_and_places() -> None:
    assert choose([5.0, 1.0], [0, FULL], [-1, 0], full=1) == [EVICTED, FULL]
    none = torch.zeros(2, 0)
    got = choose_states(none, none.to(torch.uint8), none.int(), none.bool(), *[torch.ones(2, dtype=torch.int64)] * 2, 3)
    assert got.shape == (2, 0) and got.dtype == torch.uint8


def random_rows(generator: torch.Generator, rows: int, columns: int) -> tuple[Tensor, ...]:
    """Scores with ties and NaN, mixed states, positions in no order, ragged rows, random pages."""

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    score = whole(0, 30, rows, columns).float() / 7
    score[whole(0, 50, rows, columns) == 0] = NAN
    positions = torch.rand(rows, columns, generator=generator).argsort(1).int() * 3
    gone = torch.arange(columns) >= whole(0, columns + 1, rows, 1)
    positions[gone] = -1
    now = torch.where(gone, EVICTED, whole(1, 5, rows, columns)).to(torch.uint8)
    plain = whole(0, 2, rows, 1).bool() & ~gone
    now[plain & (now > INT4)] = FULL  # half of the rows hold no int2
    protect = (whole(0, 10, rows, columns) == 0) & ~gone
    return score, now, positions, protect, whole(0, 5, rows), whole(0, 5, rows)


def pages(tokens: Tensor) -> Tensor:
    return (tokens + 15) // 16


@pytest.mark.parametrize("target", [INT8, INT4, INT2])
def test_10_000_random_plans_obey(target: int) -> None:
    score, now, positions, protect, full, quant = random_rows(torch.Generator().manual_seed(target), 10_000, 97)
    got = choose_states(score, now, positions, protect, full, quant, target)
    assert torch.equal(got, choose_states(score, now, positions, protect, full, quant, target)), "deterministic"
    assert torch.equal(got[protect], now[protect])
    assert (LEVEL[got.long()] >= LEVEL[now.long()]).all(), "nothing is promoted or revived, no bits rise"
    assert (got[positions < 0] == EVICTED).all()
    free = ~protect
    assert ((got == FULL) & free).sum(1).le(16 * full).all()
    held = torch.stack([pages(((got == s) & free).sum(1)) for s in (INT8, INT4, INT2)])
    assert (held.sum(0) <= quant).all()
    allowed = LEVEL[got.long()] >= LEVEL[target]
    assert allowed[free & (got != FULL)].all(), "what is quantized has the target's bits or fewer"
    movable = free & (positions >= 0)
    still = ((now == FULL) & movable).sum(1)
    assert torch.equal(((got == FULL) & free).sum(1), torch.minimum(still, 16 * full)), "Full pages are used"
    shuffled = torch.randperm(97, generator=torch.Generator().manual_seed(9))
    again = choose_states(*(x[:, shuffled] for x in (score, now, positions, protect)), full, quant, target)
    assert torch.equal(again, got[:, shuffled]), "table order means nothing"


def ranked(score: list[float], positions: list[int]) -> list[int]:
    finite = [s if abs(s) < INF else -INF for s in score]  # NaN is below nothing
    return sorted(range(len(score)), key=lambda i: (-finite[i], positions[i]))


def test_one_format_is_a_direct_top_k() -> None:
    """Against a loop over the rows, in the words of the rule."""
    score, now, positions, protect, full, quant = random_rows(torch.Generator().manual_seed(11), 300, 97)
    now[now > FULL] = INT4
    got = choose_states(score, now, positions, protect, full, quant, INT4)
    for r in range(300):
        want = [EVICTED] * 97
        left = []
        f, q = 16 * int(full[r]), 16 * int(quant[r])
        for i in ranked(score[r].tolist(), positions[r].tolist()):
            if protect[r, i] or positions[r, i] < 0:
                want[i] = int(now[r, i])
            elif now[r, i] == FULL and f > 0:
                want[i], f = FULL, f - 1
            else:
                left.append(i)
        for i in left[:q]:
            want[i] = INT4
        assert got[r].tolist() == want


def test_fall_takes_the_fewer_bits() -> None:
    now, target = torch.cartesian_prod(torch.arange(5), torch.arange(5)).to(torch.uint8).T
    got = fall(now, target)
    assert torch.equal(LEVEL[got.long()], torch.maximum(LEVEL[now.long()], LEVEL[target.long()]))
