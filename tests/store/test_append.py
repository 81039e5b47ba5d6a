"""Tokens stored without attending: as if they had been attended."""

from __future__ import annotations

import pytest
import torch
from feeding import drawn, feed

from kvstrata import Cache, LayerSpec, Shape
from kvstrata.policy import arkv, keydiff, snapkv

LAYERS = [LayerSpec(2, 4, 64), LayerSpec(2, 4, 64, 40)]


def stored(cache: Cache, seqs: list, lengths: list[int], generator: torch.Generator, queries: bool = True) -> None:  # type: ignore[type-arg]
    """As ``feed``, by ``append``."""
    with cache.step(seqs, lengths) as step:
        for layer, (q, k, v) in enumerate(drawn(cache, sum(lengths), generator)):
            step.append(layer, k, v, q if queries else None)


@pytest.mark.parametrize("name", ["full", "streaming", "h2o", "snapkv", "arkv", "kivi"])
@pytest.mark.parametrize("lengths", [[300, 7], [20, 0], [5, 2]])
def test_appended_is_as_attended(name: str, lengths: list[int]) -> None:
    """The same tokens in the same states, the same bytes, and the same outputs afterwards."""
    outputs, reports = [], []
    for put in (feed, stored):
        cache = Cache(Shape(LAYERS, torch.bfloat16), None if name == "full" else "400KiB", name)
        seqs, generator = cache.new(2), torch.Generator().manual_seed(3)
        for n in (lengths, [90, 90], [1, 1]):
            put(cache, seqs, n, generator)
        with cache.step(seqs, [1, 1]) as step:
            x = torch.randn(2, 8, 64, generator=generator).bfloat16()
            outputs.append([step.attend(layer, x[:, :4], x[:, 4:6], x[:, 6:]) for layer in range(2)])
        reports.append((cache.report().states, cache.nbytes(), [cache.logical_length(s) for s in seqs]))
    assert reports[0] == reports[1]
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def test_queries_are_asked_for_where_a_policy_scores_by_them() -> None:
    shape = Shape(LAYERS, torch.bfloat16)
    for policy in (arkv(), snapkv()):
        cache = Cache(shape, "1MiB", policy)
        seqs = cache.new(1)
        with pytest.raises(
            ValueError, match=f"append: q is None, expected the queries: policy {policy.name} scores by them"
        ):
            stored(cache, seqs, [20], torch.Generator(), queries=False)
        assert cache.logical_length(seqs[0]) == 0
    cache = Cache(shape, "1MiB", keydiff())
    seqs = cache.new(1)
    stored(cache, seqs, [900], torch.Generator(), queries=False)
    assert cache.report().states["evicted"] > 0


def test_what_is_refused() -> None:
    cache = Cache(Shape(LAYERS[:1], torch.float32))
    seqs = cache.new(1)
    x = torch.zeros(3, 2, 64)
    step = cache.step(seqs, [3])
    with pytest.raises(RuntimeError, match="append: the step is not open"):
        step.append(0, x, x)
    with (
        pytest.raises(ValueError, match=r"append: v is \[3, 1, 64\], expected \[3, 2, 64\]"),
        cache.step(seqs, [3]) as step,
    ):
        step.append(0, x, x[:, :1])
    with pytest.raises(ValueError, match="append: layer 0 was attended already"), cache.step(seqs, [3]) as step:
        step.append(0, x, x)
        step.append(0, x, x)
    assert cache.logical_length(seqs[0]) == 0


def test_a_failed_append_leaves_older_scores() -> None:
    """Under a policy that scores by mass, too, where no layer is cut."""
    cache = Cache(Shape(LAYERS[:1] * 2, torch.float32), "2MiB", "h2o")
    seqs, generator = cache.new(1), torch.Generator().manual_seed(1)
    stored(cache, seqs, [40], generator)

    def scores() -> torch.Tensor:
        found = torch.empty(2, cache._store.columns(0, [seqs[0].id]))
        cache._store.look(0, [seqs[0].id], 0, 0, 0, found.data_ptr(), 0, 0, 0, found.shape[1])
        return found

    before = scores()
    assert before.abs().sum() > 0
    x = torch.randn(3, 8, 64, generator=generator)
    with pytest.raises(KeyError), cache.step(seqs, [3]) as step:
        step.append(0, x[:, 4:6], x[:, 6:], x[:, :4])
        raise KeyError("a failed step")
    assert torch.equal(scores(), before)


def test_scale_and_softcap_are_those_of_later_plans() -> None:
    cache = Cache(Shape(LAYERS[:1], torch.float32), "1MiB", "snapkv")
    seqs, x = cache.new(1), torch.randn(20, 8, 64)
    with cache.step(seqs, [20]) as step:
        step.append(0, x[:, 4:6], x[:, 6:], x[:, :4], scale=0.5, softcap=20.0)
    assert cache._plans.arithmetic[0] == (0.5, 20.0)
    with (
        pytest.raises(ValueError, match="append: scale is inf, expected a finite number"),
        cache.step(seqs, [20]) as step,
    ):
        step.append(0, x[:, 4:6], x[:, 6:], x[:, :4], scale=float("inf"))
