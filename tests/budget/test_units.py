from __future__ import annotations

import pytest
import torch

from kvstrata import Budget, Cache, LayerSpec, Shape, Unsupported
from kvstrata.budget import Schedule
from kvstrata.budget.protect import limit_bytes, page_bytes


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("2GiB", Budget("bytes", 2 << 30)),
        ("2GB", Budget("bytes", 2 * 10**9)),
        ("512MiB", Budget("bytes", 512 << 20)),
        ("1.5GiB", Budget("bytes", 3 << 29)),
        ("25%", Budget("share", 0.25)),
        ("6.25%", Budget("share", 0.0625)),
        ("256tok", Budget("tokens", 256)),
        (256, Budget("tokens", 256)),
        (Budget.bytes("1MB"), Budget("bytes", 10**6)),
        (None, None),
    ],
)
def test_spellings(spec: object, expected: Budget | None) -> None:
    assert Budget.parse(spec) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [0.25, True, "2 gigs", "0%", "120%", "-3GiB", 0, -5, "0tok", "", [1]])
def test_refused(spec: object) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(spec)  # type: ignore[arg-type]


FALLING = Schedule("rex", interval=64, horizon=640, end=1000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget.share(0.5, schedule=FALLING), "schedule: a share grows with the sequences, expected at=N"),
        (lambda: Budget.bytes("2GiB", disk="1TiB"), "there is no disk tier yet"),
        (lambda: Budget.bytes("2GiB", per="sequence", schedule=FALLING), "one for all sequences yet"),
    ],
)
def test_what_is_not_honoured_is_refused_with_its_reason(make: object, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget.bytes("2GiB", near=0), "near is 0"),
        (lambda: Budget.bytes("2GiB", near="2 gigs"), "'2 gigs' is not understood"),
        (lambda: Budget.bytes("2GiB", far=0), "budget: far is 0, expected None, an int >= 1 or a string"),
        (lambda: Budget.bytes("2GiB", far=0.5), "budget: far is 0.5"),
        (lambda: Budget.bytes("2GiB", far="2 gigs"), "'2 gigs' is not understood"),
        (lambda: Budget.bytes("2GiB", per="layer"), "per is 'layer'"),
        (lambda: Budget.share(0.5, at=0), "at is 0"),
        (lambda: Budget("tokens", 5, at=5), "at belongs to a share"),
        (lambda: Budget("bytes", 5, count=True), "count belongs to tokens"),
        (lambda: Budget("tokens", 5, per="sequence"), "per='sequence' belongs to bytes"),
    ],
)
def test_refused_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_what_is_honoured() -> None:
    assert Budget.bytes("2GiB", near="1GiB") == Budget.bytes("1GiB") == Budget.bytes("1GiB", near="2GiB")
    assert Budget.bytes("1MB", far=None, schedule=Schedule()).value == 10**6
    assert str(Budget.share(0.25, at=4096)) == "25% of 4096tok"


def test_units_agree_where_they_mean_the_same() -> None:
    shape = Shape([LayerSpec(2, 8, 64)] * 3 + [LayerSpec(1, 8, 128)], torch.bfloat16)
    page = sum(spec.kv_heads * page_bytes(shape, i) for i, spec in enumerate(shape.layers))
    tokens = Budget.tokens(100)
    assert limit_bytes(tokens, shape, [5000]) == 7 * page, "of 100 tokens: seven pages of every row"
    assert limit_bytes(tokens, shape, [5000, 9]) == 14 * page
    assert limit_bytes(Budget.bytes(7 * page), shape, [5000]) == limit_bytes(tokens, shape, [1])
    assert limit_bytes(Budget.bytes(7 * page, per="sequence"), shape, [1, 9]) == 14 * page
    dense = shape.token_bytes()
    assert limit_bytes(Budget.share(0.25), shape, [4000, 96]) == 1024 * dense
    assert limit_bytes(Budget.share(0.25, at=4096), shape, [7]) == 1024 * dense
    assert limit_bytes(Budget.share(0.25, at=4096), shape, [7, 8]) == 2048 * dense
    assert limit_bytes(Budget.share(0.29, at=100), shape, [1]) == 29 * dense, "not a byte less by rounding"
    assert limit_bytes(Budget.share(1.0), shape, [3]) == 3 * dense
    assert Budget.bytes("2GB") != Budget.bytes("2GiB")


def test_a_cache_has_one_limit_however_it_is_said() -> None:
    """In tokens, bytes and a share of a length: the same policy, and as many tokens stored."""
    shape = Shape([LayerSpec(2, 4, 64)] * 2, torch.bfloat16)
    tokens = Budget.tokens(512)
    limit = limit_bytes(tokens, shape, [1])
    found = []
    for budget in (tokens, Budget.bytes(limit), Budget.share(1 / shape.token_bytes(), at=limit)):
        cache = Cache(shape, budget, "keydiff")
        seqs, generator = cache.new(), torch.Generator().manual_seed(0)
        with cache.step(seqs, [900]) as step:
            for layer in range(2):
                step.attend(layer, *(torch.randn(900, h, 64, generator=generator).bfloat16() for h in (4, 2, 2)))
        report = cache.report()
        assert report.limit_bytes == limit
        found.append((cache.policy, report.stored))
    assert found[0] == found[1] == found[2]


def test_a_cache_refuses_a_share_of_a_length() -> None:
    with pytest.raises(Unsupported, match="share"):
        Cache(Shape([LayerSpec(1, 1, 16)], torch.float32), Budget.share(0.5, at=4096), "streaming")
