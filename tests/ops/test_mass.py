"""mass against the reference, and the accuracy of the exponential behind every op."""

from __future__ import annotations

import pytest
import torch
from tolerances import EXP_RELATIVE, MASS, TANH_ABSOLUTE, assert_close
from torch import Tensor

from kvstrata import ops, reference

EMULATED = 1.0

INF, NAN = float("inf"), float("nan")


def logits(rows: int, group: int, queries: int, entries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(rows, group, queries, entries, 16, generator=g)
    z[torch.rand(z.shape, generator=g) < 0.3] = -INF
    lse = z.flatten(3).logsumexp(3).transpose(1, 2) if entries else torch.full((rows, queries, group), -INF)
    return z, lse.contiguous()


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("entries", [0, 1, 7, 63, 64, 65, 200])
def test_parity(isa: str, reduce: str, entries: int) -> None:
    z, lse = logits(3, 4, 5, entries, seed=entries)
    out = torch.full((3, entries, 16), NAN)
    mass = ops.mass(z, lse, reduce, out=out)  # type: ignore[arg-type]
    assert mass is out
    assert_close(mass, reference.mass(z.double(), lse.double(), reduce), MASS, floor=1e-3)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_nothing_seen_has_no_mass(isa: str, reduce: str) -> None:
    z, lse = logits(2, 2, 3, 9)
    z[0], lse[0] = -INF, -INF
    z[1, 0, 0], lse[1, 0, 0] = -INF, -INF
    z[1, 1, 2] = -INF  # though others of its query saw something
    mass = ops.mass(z, lse, reduce)  # type: ignore[arg-type]
    assert torch.all(mass[0] == 0)
    assert_close(mass, reference.mass(z.double(), lse.double(), reduce), MASS, floor=1e-3)


def test_shapes_of_one_query(isa: str) -> None:
    z, lse = logits(2, 4, 1, 9)
    assert torch.equal(ops.mass(z, lse[:, 0]), ops.mass(z, lse))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_bits_do_not_depend_on_threads(isa: str, reduce: str) -> None:
    z, lse = logits(3, 2, 2, 200)
    once = ops.mass(z, lse, reduce, threads=1)  # type: ignore[arg-type]
    for threads in (2, 3, 8):
        assert torch.equal(ops.mass(z, lse, reduce, threads=threads), once)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("query", [0, 1])
def test_nan_shows_in_its_own_slot_only(isa: str, reduce: str, query: int) -> None:
    z, lse = logits(2, 2, 2, 9)
    clean = ops.mass(z, lse, reduce)  # type: ignore[arg-type]
    z[1, 0, query, 3, 5] = NAN
    mass = ops.mass(z, lse, reduce)  # type: ignore[arg-type]
    assert mass[1, 3, 5].isnan()
    mass[1, 3, 5] = clean[1, 3, 5]
    assert torch.equal(mass, clean)


def test_mass_of_all_slots_is_one(isa: str) -> None:
    z, lse = logits(2, 3, 4, 50)
    total = ops.mass(z, lse, "mean").sum((1, 2))
    assert_close(total, torch.ones(2), 1e-5)


# --- The functions behind it -----------------------------------------------------------------------------------------


def exp(x: Tensor) -> Tensor:
    """exp as the kernels compute it: the mass of one query with lse 0."""
    padded = torch.nn.functional.pad(x, (0, -len(x) % 16))
    return ops.mass(padded.view(1, 1, 1, -1, 16), torch.zeros(1, 1, 1)).flatten()[: len(x)]


def test_exp(isa: str) -> None:
    x = torch.cat([torch.linspace(-87, 0, 200_001), -torch.logspace(-40, 1.9, 10_000), torch.linspace(0, 88, 1000)])
    x = x[x >= -87]
    exact = torch.exp(x.double())
    assert ((exp(x) - exact).abs() / exact).max() <= EXP_RELATIVE
    edges = torch.tensor([0.0, -0.0, -87.1, -1e4, -3e38, -INF])
    assert torch.equal(exp(edges), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    assert torch.equal(exp(torch.tensor([100.0, INF])), torch.tensor([INF, INF]))
    assert exp(torch.tensor([NAN])).isnan().all()


def test_tanh(isa: str) -> None:
    """Through attend: with D = 1, q = 1 and scale = softcap = 1 a logit is tanh of the key."""
    x = torch.cat([torch.linspace(-12, 12, 20_000), torch.logspace(-30, 38, 2000), -torch.logspace(-30, 38, 2000)])
    x = x[: len(x) // 16 * 16]
    pool = ops.Pool.allocate("f32", 1, len(x) // 16)
    k = x.view(-1, 16, 1)
    pages = torch.arange(len(k), dtype=torch.int32)
    ops.pack(k, k, pages, [pool])
    z = ops.attend(torch.ones(1, 1, 1), pages.view(1, -1), [pool], scale=1.0, softcap=1.0, want_logits=True)[2]
    exact = torch.tanh(x.double())
    got = z.flatten().double()
    assert (got - exact).abs().max() <= TANH_ABSOLUTE
    assert ((got - exact).abs() / exact.abs())[x.abs() < 0.5].max() <= 1e-6, "no cancellation near 0"
