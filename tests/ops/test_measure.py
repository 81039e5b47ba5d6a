"""measure against the reference, against the public code's formulas in f64, and the laws its sound variant keeps."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import STATS, STATS_CODE, STATS_QUANTIZED, assert_close
from torch import Tensor
from windows import FULL, Window, make_window

from kvstrata import ops, reference

LENGTHS = [0, 1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64]
NAN = float("nan")
EMULATED = 0.4


def check(case: Window, stats: str, skip: int = 0, window: int = 0) -> Tensor:
    got = case.measure(stats=stats, skip=skip, window=window)
    share, _ = case.shares(window=window)
    past = case.past(skip if stats == "sound" else 0)
    ref = reference.measure(share.nan_to_num(0.0), past, case.queries, stats)
    quantized = case.centre is not None
    for i, tolerance in enumerate(STATS_QUANTIZED if quantized else STATS if stats == "sound" else STATS_CODE):
        assert_close(got[..., i], ref[..., i], tolerance, floor=1e-2)
    return got


@pytest.mark.parametrize("stats", ["sound", "code"])
@pytest.mark.parametrize("masks", ["full", "tail1", "ragged"])
@pytest.mark.parametrize("formats", [("f32",), ("bf16",), ("f16",)], ids=lambda f: f[0])
def test_lengths(isa: str, formats: tuple[str, ...], masks: str, stats: str) -> None:
    check(make_window(LENGTHS, formats=formats, masks=masks, width=16, late=20), stats, skip=5)


@pytest.mark.parametrize("stats", ["sound", "code"])
@pytest.mark.parametrize(
    "formats", [("int8",), ("int4",), ("int2",), ("f32", "f16", "int8", "int4", "int2")], ids="+".join
)
def test_quantized_and_mixed_formats(isa: str, formats: tuple[str, ...], stats: str) -> None:
    check(make_window(LENGTHS, formats=formats, masks="ragged", width=16, late=20), stats, skip=5)


@pytest.mark.parametrize("stats", ["sound", "code"])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 31, 32, 33, 64, 65, 256])
def test_queries(isa: str, width: int, stats: str) -> None:
    check(make_window([5, 9, 2], width=width, group=3, late=20, masks="ragged", seed=width), stats)


@pytest.mark.parametrize("stats", ["sound", "code"])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16])
def test_groups(isa: str, group: int, stats: str) -> None:
    check(make_window([17, 5], group=group, width=9, late=5, seed=group), stats, skip=7)


@pytest.mark.parametrize("stats", ["sound", "code"])
def test_a_real_row(isa: str, stats: str) -> None:
    case = make_window([256, 100], width=32, group=4, dim=128, masks="ragged", holes=0.02, late=60)
    check(case, stats, skip=16)


@pytest.mark.parametrize("stats", ["sound", "code"])
def test_rows_with_fewer_queries(isa: str, stats: str) -> None:
    got = check(make_window([6, 9, 33], queries=[0, 3, 8], formats=FULL, shuffle=True), stats)
    assert torch.all(got[0] == 0)


@pytest.mark.parametrize("stats", ["sound", "code"])
def test_windows(isa: str, stats: str) -> None:
    for window in (7, 100, 2**31 - 1):
        check(make_window([20, 7], width=16, late=30, shuffle=True), stats, skip=5, window=window)


def test_no_past(isa: str) -> None:
    case = make_window([3, 4], late=1000)
    assert torch.all(case.measure() == 0) and torch.all(case.measure(stats="code") == 0)
    assert torch.all(make_window([3, 4]).measure(skip=1000) == 0)
    assert make_window([4, 4]).row(2).measure().shape == (0, 2, 3)


@pytest.mark.parametrize("queries", [1, 32])
def test_code_is_the_public_codes_formulas_in_f64(isa: str, queries: int) -> None:
    """Entropy, torch's variance and clamped kurtosis of the whole attention less the window, summed over everything."""
    case = make_window([40], width=queries, formats=("f32",), late=0)
    attention, _ = case.shares()
    a = attention.flatten(3)  # [1, G, W, N]
    entropy = -torch.sum(a * torch.log(a + 1e-10))
    moved = a - a.mean(-2, keepdim=True)
    m2 = moved.pow(2).mean(-2).clamp_min(1e-8)
    kurtosis = (moved.pow(4).mean(-2) / m2**2).sum()
    variance = a.var(-2).sum() if queries > 1 else torch.zeros(()).double()
    got = case.measure(stats="code").double().sum((0, 1))
    assert_close(got, torch.stack([entropy, variance, kurtosis]), 1e-4, floor=1e-6)


# --- Laws of the sound variant -----------------------------------------------------------------------------------------


def keys_as_logits(z: Tensor, copies: int = 1) -> Window:
    """A row whose logits are z [W, n], W <= D: query t is the unit vector t, key i holds z[:, i]; each key `copies` times."""
    width, tokens = z.shape
    entries = tokens * copies // 16
    case = make_window([entries], formats=("f32",), width=width, group=1, dim=64, late=0)
    k = torch.zeros(tokens, 64)
    k[:, :width] = z.T
    k = k.repeat_interleave(copies, 0).view(entries, 16, 64)
    ops.pack(k, k, case.pages[0], case.pools)
    case.q = torch.eye(64)[:width].view(1, width, 1, 64)
    return case


def sound(case: Window, **more: object) -> list[float]:
    result: list[float] = case.measure(scale=1.0, **more)[0, 0].tolist()
    return result


def test_uniform_attention_has_entropy_one(isa: str) -> None:
    e, v, k = sound(keys_as_logits(torch.zeros(32, 1024)))
    assert abs(e - 1) < 1e-5 and v == 0 and k == 0


def test_equal_queries_vary_by_nothing(isa: str) -> None:
    z = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0)).expand(32, -1)
    _, v, k = sound(keys_as_logits(z))
    assert v == 0 and k == 0


def test_a_spike_of_one_query_has_kurtosis_one(isa: str) -> None:
    """Each key is seen by one query alone, and each query sees as many."""
    z = torch.full((32, 1024), -100.0)
    z[torch.arange(1024) % 32, torch.arange(1024)] = 0.0
    e, v, k = sound(keys_as_logits(z))
    assert abs(k - 1) < 1e-5
    assert abs(e - math.log(32) / math.log(1024)) < 1e-5
    assert abs(v - 31 / 32) < 1e-5


def test_kurtosis_of_many_queries_reaches_the_known_largest(isa: str) -> None:
    assert abs((32 - 2 + 1 / 31) - 30.0323) < 1e-4


def test_doubling_every_key_hardly_moves_it(isa: str) -> None:
    z = torch.randn(32, 4096, generator=torch.Generator().manual_seed(1))
    once, twice = sound(keys_as_logits(z)), sound(keys_as_logits(z, 2))
    assert abs(once[0] - twice[0]) <= 0.08
    assert abs(once[1] - twice[1]) <= 1e-5 and abs(once[2] - twice[2]) <= 1e-5


def test_scaling_a_querys_row_of_shares_changes_nothing(isa: str) -> None:
    """A shift of one query's logits, as another sink or window would give it."""
    z = torch.randn(32, 1024, generator=torch.Generator().manual_seed(2))
    moved = z.clone()
    moved[5] += 3.0
    for a, b in zip(sound(keys_as_logits(z)), sound(keys_as_logits(moved)), strict=True):
        assert abs(a - b) < 1e-5


def test_sinks_and_sink_logits_take_no_part(isa: str) -> None:
    case = make_window([20], formats=("f32",), width=16)
    before = case.measure(skip=40)
    assert torch.equal(case.measure(skip=40, sinks=torch.tensor([[9.0, 3.0]])), before)
    for page, at in zip(case.pages[0], case.positions[0], strict=True):
        k, v = ops.unpack(page.view(1), case.pools)
        k[0, at < 40] = NAN
        ops.pack(k, v, page.view(1), case.pools)
    assert torch.equal(case.measure(skip=40), before)
    assert case.measure(skip=0).isnan().all()


def test_heads_and_batch_mates_are_independent(isa: str) -> None:
    case = make_window([40, 70, 3], width=16, group=5, formats=(*FULL, "int8", "int2"), masks="ragged")
    for stats in ("sound", "code"):
        once = case.measure(stats=stats)
        for threads in (2, 3, 8):
            assert torch.equal(case.measure(stats=stats, threads=threads), once)
        for r, length in enumerate((40, 70, 3)):
            assert torch.equal(case.row(r, length).measure(stats=stats)[0], once[r])
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = make_window([40, 70, 3], width=16, group=5, formats=(*FULL, "int8", "int2"), masks="ragged")
    turned.q = turned.q[:, :, order].contiguous()
    assert torch.equal(turned.measure(), case.measure()[:, order])


def test_order_of_pages_changes_only_rounding(isa: str) -> None:
    case = make_window([40], width=16, masks="ragged")
    before = case.measure()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    case.pages, case.visible = case.pages[:, order], case.visible[:, order]
    assert_close(case.measure(), before, 1e-5)


def test_a_bad_key_shows_in_its_own_row(isa: str) -> None:
    case = make_window([9, 9], formats=("f32",))
    before = case.measure()
    page = case.pages[0, 4]
    k, v = ops.unpack(page.view(1), case.pools)
    k[0, 3, 5] = NAN
    ops.pack(k, v, page.view(1), case.pools)
    assert case.measure()[0].isnan().all() and torch.equal(case.measure()[1], before[1])


def test_bad_input() -> None:
    case = make_window([4, 4])
    with pytest.raises(ValueError, match="measure: stats is 'odd', expected one of sound, code"):
        case.measure(stats="odd")
    with pytest.raises(ValueError, match=r"measure: out is \[2, 3\], expected"):
        case.measure(out=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="q_pos is a NoneType, expected a tensor"):
        ops.measure(case.q, case.pages, case.pools, None)  # type: ignore[arg-type]
