from __future__ import annotations

import pytest

from kvstrata import Budget


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
