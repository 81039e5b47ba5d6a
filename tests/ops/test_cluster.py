"""cluster: pages of keys that belong together; every live token once, 16 to a page; and what that is worth to recall."""

from __future__ import annotations

import pytest
import torch
from tolerances import COHESION
from torch import Tensor
from vectors import full_pages

from kvstrata import ops, reference

SIZES = [1, 15, 16, 17, 256, 1040]
DIMS = [8, 64, 96, 128]
NAN, INF = float("nan"), float("inf")
EMULATED, TOO_LONG = 0.35, "1040"


def keys_of(kind: str, tokens: int, dim: int, rows: int = 2) -> Tensor:
    """f32 [R, T, D]; duplicated: five different keys, over and over."""
    g = torch.Generator().manual_seed(tokens * 1000 + dim)
    if kind == "zero":
        return torch.zeros(rows, tokens, dim)
    keys = torch.randn(rows, tokens, dim, generator=g)
    if kind == "equal":
        return keys[:, :1].expand(-1, tokens, -1).contiguous()
    if kind == "duplicated":
        return keys[:, torch.randint(min(5, tokens), (tokens,), generator=g)]
    return keys


def planted(topics: int, dim: int, noise: float, *, shuffled: bool = True, seed: int = 0) -> tuple[Tensor, Tensor]:
    """keys f32 [16 topics, D] about `topics` Gaussian centres, which are also returned."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(topics, dim, generator=g)
    label = torch.arange(topics).repeat_interleave(16)
    if shuffled:
        label = label[torch.randperm(len(label), generator=g)]
    return centres[label] + noise * torch.randn(len(label), dim, generator=g), centres


def check_pages(page_of: Tensor, pages: Tensor, live: Tensor | None = None) -> None:
    """Each live token in one page, at most 16 in a page, ceil(n / 16) pages, none of them empty."""
    assert page_of.dtype == torch.int32 and pages.dtype == torch.int32
    for r, row in enumerate(page_of):
        here = torch.ones(len(row), dtype=torch.bool) if live is None else live[r]
        assert torch.all(row[~here] == -1)
        assert pages[r] == -(-int(here.sum()) // 16)
        held = torch.bincount(row[here].long(), minlength=int(pages[r]))
        assert len(held) == pages[r] and torch.all((held >= 1) & (held <= 16))


def cohesion(keys: Tensor, page_of: Tensor) -> float:
    """How much of each centred key lies along its page's mean, summed, of keys [T, D]."""
    y = keys.double() - keys.double().mean(0)
    total = torch.zeros(int(page_of.max()) + 1, y.shape[1], dtype=torch.float64).index_add_(0, page_of.long(), y)
    return float(total.norm(dim=1).sum())


# --- The rules --------------------------------------------------------------------------------------------------------


CASES = [*((dim, "random") for dim in DIMS), (64, "equal"), (64, "zero"), (96, "duplicated")]


@pytest.mark.parametrize(("dim", "kind"), CASES)
@pytest.mark.parametrize("tokens", SIZES)
def test_every_token_has_one_seat(isa: str, tokens: int, dim: int, kind: str) -> None:
    keys = keys_of(kind, tokens, dim)
    page_of, pages = ops.cluster(keys, threads=1)
    check_pages(page_of, pages)
    for threads in (1, 4):
        again = ops.cluster(keys, threads=threads)
        assert torch.equal(again[0], page_of) and torch.equal(again[1], pages)
    if kind == "zero":
        want, _ = reference.cluster(keys)
        assert torch.equal(page_of, want), "ties: the lower page, the lower token"


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 17, 333, 512])
def test_any_head_dim(isa: str, dim: int) -> None:
    check_pages(*ops.cluster(keys_of("random", 100, dim)))


@pytest.mark.parametrize("tokens", [3, 7, 8, 31, 32, 33, 63, 64, 65, 240, 272, 527])
def test_other_sizes(isa: str, tokens: int) -> None:
    """Up to 34 pages: register tiles of every fill."""
    check_pages(*ops.cluster(keys_of("random", tokens, 40)))


@pytest.mark.parametrize("iters", [0, 1, 4])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("topics", "dim"), [(2, 8), (16, 128), (65, 64)])
def test_keys_well_apart_are_as_the_reference(isa: str, topics: int, dim: int, shuffled: bool, iters: int) -> None:
    keys, _ = planted(topics, dim, 0.1, shuffled=shuffled, seed=topics)
    page_of, _ = ops.cluster(keys.unsqueeze(0), iters=iters)
    want, _ = reference.cluster(keys.double().unsqueeze(0), iters=iters)
    assert torch.equal(page_of, want)
    if not shuffled:  # every topic holds one seed
        assert torch.equal(page_of[0], torch.arange(topics, dtype=torch.int32).repeat_interleave(16))


@pytest.mark.parametrize("tokens", [100, 256, 1040])
def test_random_keys_are_as_close_as_the_references(isa: str, tokens: int) -> None:
    keys = keys_of("random", tokens, 64, rows=1)
    got = cohesion(keys[0], ops.cluster(keys)[0][0])
    want = cohesion(keys[0], reference.cluster(keys.double())[0][0])
    assert abs(got - want) <= COHESION * want


def test_a_full_page_passes_the_rest_on(isa: str) -> None:
    """20 keys at +1 and 12 at -1: the first 16 of equal priority stay, the last 4 go to their next best page."""
    keys = torch.tensor([1.0] * 20 + [-1.0] * 12)
    page_of, _ = ops.cluster(keys.view(1, 32, 1))
    assert page_of[0].tolist() == [0] * 16 + [1] * 16


def test_who_prefers_its_page_most_stays(isa: str) -> None:
    """Page 0 is wanted by 17: the one that would lose least by going to page 1 goes, whatever its index."""
    g = torch.Generator().manual_seed(0)
    side = torch.tensor([1.0] * 17 + [-1.0] * 15)
    keys = torch.stack([side, torch.zeros(32)], 1) + 0.01 * torch.randn(32, 2, generator=g)
    keys[5, 0] = 0.5  # s(0) - s(1) is the least here
    page_of, _ = ops.cluster(keys.unsqueeze(0))
    assert page_of[0].tolist() == [0] * 5 + [1] + [0] * 11 + [1] * 15


# --- Rows and masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("poison", [NAN, INF, 3e38])
def test_tokens_that_are_not_live_do_not_matter(isa: str, tokens: int, poison: float) -> None:
    keys = keys_of("random", tokens, 64, rows=4)
    live = torch.rand(keys.shape[:2], generator=torch.Generator().manual_seed(tokens)) < 0.7
    live[0], live[1] = False, True
    keys[~live] = poison
    page_of, pages = ops.cluster(keys, live)
    check_pages(page_of, pages, live)
    for r, here in enumerate(live):
        alone, count = ops.cluster(keys[r : r + 1, here].contiguous())
        assert torch.equal(page_of[r, here], alone[0]) and pages[r] == count[0]


def test_a_row_is_the_same_alone(isa: str) -> None:
    keys = keys_of("random", 300, 96, rows=5)
    page_of, pages = ops.cluster(keys, threads=3)
    for r in range(5):
        alone = ops.cluster(keys[r : r + 1])
        assert torch.equal(alone[0][0], page_of[r]) and alone[1][0] == pages[r]


def test_a_shift_of_all_keys_changes_nothing(isa: str) -> None:
    keys, _ = planted(16, 64, 0.1)
    shift = 5 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    once, _ = ops.cluster(keys.unsqueeze(0))
    moved, _ = ops.cluster((keys + shift).unsqueeze(0))
    assert torch.equal(once, moved)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_key_takes_a_seat_like_any(isa: str, bad: float) -> None:
    keys = keys_of("random", 100, 64, rows=3)
    want, _ = ops.cluster(keys)
    keys[1, 50, 7] = bad
    page_of, pages = ops.cluster(keys)
    check_pages(page_of, pages)
    assert torch.equal(page_of[0], want[0]) and torch.equal(page_of[2], want[2])


def test_no_tokens_and_no_rows(isa: str) -> None:
    page_of, pages = ops.cluster(torch.zeros(2, 0, 64))
    assert page_of.shape == (2, 0) and pages.tolist() == [0, 0]
    page_of, pages = ops.cluster(torch.zeros(0, 5, 64))
    assert page_of.shape == (0, 5) and pages.shape == (0,)


REFUSALS = [
    ({"keys": torch.zeros(2, 5)}, r"cluster: keys is \[2, 5\], expected \[R, T, D\]"),
    ({"keys": torch.zeros(2, 5, 8, dtype=torch.bfloat16)}, r"cluster: keys has dtype .*bf.*16, expected .*f.*32"),
    ({"keys": torch.zeros(2, 5, 513)}, r"cluster: .*513, expected 1 to 512"),
    ({"keys": torch.zeros(2, 5, 16)[..., ::2]}, r"cluster: keys .*contiguous"),
    ({"live": torch.ones(2, 6, dtype=torch.bool)}, r"cluster: live is \[2, 6\], expected \[R=2, T=5\]"),
    ({"live": torch.ones(2, 5)}, r"cluster: live has dtype .*f.*32, expected .*bool"),
    ({"iters": -1}, r"cluster: iters is -1, expected (at least 0|0 or more)"),
    ({"threads": -1}, r"cluster: threads is -1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"keys": torch.zeros(2, 5, 8)} | change
    keys, live = arguments.pop("keys"), arguments.pop("live", None)
    with pytest.raises(ValueError, match=message):
        ops.cluster(keys, live, **arguments)  # type: ignore[arg-type]
    if "iters" not in change:
        with pytest.raises(ValueError, match=message.replace("cluster:", "cluster_greedy:")):
            ops.cluster_greedy(keys, live, **arguments)  # type: ignore[arg-type]


# --- Greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "kind"), CASES)
@pytest.mark.parametrize("tokens", SIZES)
def test_greedy_seats_every_token_once(isa: str, tokens: int, dim: int, kind: str) -> None:
    keys = keys_of(kind, tokens, dim)
    page_of, pages = ops.cluster_greedy(keys, threads=1)
    check_pages(page_of, pages)
    again = ops.cluster_greedy(keys, threads=4)
    assert torch.equal(again[0], page_of) and torch.equal(again[1], pages)
    for r in range(len(keys)):
        assert torch.equal(ops.cluster_greedy(keys[r : r + 1])[0][0], page_of[r])
    if kind == "zero":
        assert torch.equal(page_of, reference.cluster_greedy(keys)[0]), "ties: the lower token"


@pytest.mark.parametrize(("tokens", "dim"), [(3, 1), (31, 17), (33, 3), (100, 333), (272, 40), (300, 512)])
def test_greedy_as_the_reference(isa: str, tokens: int, dim: int) -> None:
    """Random keys have no near-ties here; some are not live, and hold what would show."""
    keys = keys_of("random", tokens, dim, rows=3)
    live = torch.rand(3, tokens, generator=torch.Generator().manual_seed(tokens)) < 0.7
    live[0], live[1] = True, False
    keys[~live] = NAN
    page_of, pages = ops.cluster_greedy(keys, live)
    check_pages(page_of, pages, live)
    want, count = reference.cluster_greedy(keys.double(), live)
    assert torch.equal(page_of, want) and torch.equal(pages, count)


@pytest.mark.parametrize(("topics", "dim"), [(2, 8), (16, 64), (65, 128)])
def test_greedy_finds_keys_well_apart(isa: str, topics: int, dim: int) -> None:
    keys, _ = planted(topics, dim, 0.05, seed=topics)
    page_of, _ = ops.cluster_greedy(keys.unsqueeze(0))
    assert torch.equal(page_of, reference.cluster_greedy(keys.double().unsqueeze(0))[0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_greedy_seats_a_bad_key_like_any(isa: str, bad: float) -> None:
    keys = keys_of("random", 100, 64, rows=3)
    want, _ = ops.cluster_greedy(keys)
    keys[1, 50, 7] = bad
    page_of, pages = ops.cluster_greedy(keys)
    check_pages(page_of, pages)
    assert torch.equal(page_of[0], want[0]) and torch.equal(page_of[2], want[2])


def test_greedy_of_nothing(isa: str) -> None:
    page_of, pages = ops.cluster_greedy(torch.zeros(2, 0, 64))
    assert page_of.shape == (2, 0) and pages.tolist() == [0, 0]
    assert ops.cluster_greedy(torch.zeros(0, 5, 64))[0].shape == (0, 5)


# --- What it is worth: the acceptance of specs/recall.md ------------------------------------------------------------

DIM, TOPICS, QUERIES, READ = 64, 256, 200, 4


def captured(keys: Tensor, order: Tensor, q: Tensor, entries: Tensor) -> float:
    """The mean true share of attention mass in the pages [Q, K] that 16 keys each of `order` make, for queries [Q, D]."""
    share = torch.softmax(q.double() @ keys[order].double().T * DIM**-0.5, -1)
    return float(share.view(len(q), -1, 16).sum(-1).gather(1, entries.long()).sum(1).mean())


def pages_read(keys: Tensor, order: Tensor, q: Tensor) -> Tensor:
    """entries [Q, READ] that the summaries of these pages make each query choose."""
    count = len(keys) // 16
    pool = ops.Pool.allocate("f32", DIM, count)
    full_pages(pool, 0, keys[order], keys[order])
    blocks = ops.summarize(torch.arange(count, dtype=torch.int32).unsqueeze(0), [pool])
    visible = torch.full((len(q), count), 0xFFFF).to(torch.uint16)
    entries, _, _ = ops.select(q.unsqueeze(1), blocks.expand(len(q), -1, -1).contiguous(), visible, READ)
    return entries


@pytest.mark.parametrize("seed", range(8))
def test_planted_topics_are_found_by_their_pages(seed: int) -> None:
    """16: clustered pages capture what a query seeks, greedy ones nearly, pages in order of position do not."""
    keys, centres = planted(TOPICS, DIM, 1.0, seed=seed)
    g = torch.Generator().manual_seed(100 + seed)
    sought = torch.randint(TOPICS, (QUERIES,), generator=g)
    q = 2 * centres[sought] + 0.5 * torch.randn(QUERIES, DIM, generator=g)
    page_of, _ = ops.cluster(keys.unsqueeze(0))
    clustered, position = page_of[0].long().argsort(stable=True), torch.arange(len(keys))
    assert captured(keys, clustered, q, pages_read(keys, clustered, q)) >= 0.90
    assert captured(keys, position, q, pages_read(keys, position, q)) <= 0.30
    greedy = ops.cluster_greedy(keys.unsqueeze(0))[0][0].long().argsort(stable=True)
    assert captured(keys, greedy, q, pages_read(keys, greedy, q)) >= 0.80
    chance = torch.rand(QUERIES, TOPICS, generator=g).argsort(1)[:, :READ]
    assert captured(keys, clustered, q, chance) <= 0.05
