"""accumulate against the reference."""

from __future__ import annotations

import pytest
import torch

from kvstrata import ops, reference

NAN = float("nan")
EMULATED = 0.5


@pytest.mark.parametrize("combine", ["sum", "max"])
@pytest.mark.parametrize("decay", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7), (2, 33, 16), (5, 16_400)])
def test_is_the_reference_bit_for_bit(isa: str, shape: tuple[int, ...], decay: float, combine: str) -> None:
    g = torch.Generator().manual_seed(len(shape))
    score, mass = torch.rand(shape, generator=g), torch.rand(shape, generator=g)
    expected = score.clone()
    reference.accumulate(expected, mass, decay, combine)
    for threads in (1, 3):
        got = score.clone()
        ops.accumulate(got, mass, decay, combine=combine, threads=threads)  # type: ignore[arg-type]
        assert torch.equal(got, expected)


def test_nan_stays(isa: str) -> None:
    for combine in ("sum", "max"):
        score, mass = torch.tensor([NAN, 1.0, 2.0]), torch.tensor([1.0, NAN, 3.0])
        ops.accumulate(score, mass, combine=combine)  # type: ignore[arg-type]
        assert score.isnan().tolist() == [True, True, False]


def test_bad_input() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"mass is \[3\], expected \[4\]"):
        ops.accumulate(x, torch.zeros(3))
    with pytest.raises(ValueError, match="combine is 'mean', expected one of sum, max"):
        ops.accumulate(x, x, combine="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay is nan, expected a finite number"):
        ops.accumulate(x, x, NAN)
    with pytest.raises(ValueError, match="mass has dtype f16, expected f32"):
        ops.accumulate(x, torch.zeros(4, dtype=torch.float16))
    with pytest.raises(ValueError, match="expected contiguous"):
        ops.accumulate(torch.zeros(4, 4).T, torch.zeros(4, 4))
