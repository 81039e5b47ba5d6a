"""What quantized keys are relative to, by a policy's word."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvstrata import Cache, LayerSpec, Shape
from kvstrata.policy import arkv, kivi

SHAPE = Shape([LayerSpec(2, 4, 64)], torch.bfloat16)


def errors(centre: bool) -> tuple[bool, float]:
    """Whether a centre is frozen, and the relative error of keys of which two channels stand far off zero."""
    cache = Cache(SHAPE, policy=replace(kivi("int4", window=32, sinks=0), centre=centre))
    (seq,) = cache.new(1)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(512, heads, 64, generator=generator) for heads in (4, 2, 2))
    k[..., [5, 40]] += 12
    q, k, v = (x.bfloat16() for x in (q, k, v))
    with cache.step([seq], [512]) as step:
        step.attend(0, q, k, v)
    frozen, _ = cache._store.centre(seq.id, 0, 0)
    held = cache.materialize(0, seq)[0].float().reshape(2, 512, 64)
    return frozen, ((held - k.float().transpose(0, 1)).norm() / k.float().norm()).item()


def test_without_a_centre_outlier_channels_cost_more() -> None:
    on, off = errors(True), errors(False)
    assert (on[0], off[0]) == (True, False)
    assert on[1] < 0.6 * off[1]


def test_arkv_takes_it() -> None:
    assert not arkv(centre=False).centre and arkv().centre
    with pytest.raises(ValueError, match="arkv: legacy with"):
        arkv(legacy=True, centre=False)
