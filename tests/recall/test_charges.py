"""What a cache that archives charges to a ledger: plans as they fall, and the bytes of its files."""

from __future__ import annotations

import gc

import pytest
import torch
from archived import fed, small
from waiting import put_off

from kvstrata import LayerSpec, Shape
from kvstrata.budget import Ledger
from kvstrata.config import BudgetExceeded


@pytest.mark.parametrize("layers", [1, 3, 20])
def test_as_many_plans_are_reserved_as_fall(layers: int) -> None:
    """Layers are planned one after another, prompts at the end of each chunk: not one plan more is reserved, nor less."""
    pair = fed(small(), Shape([LayerSpec(1, 2, 32)] * layers, torch.float32), ledger=Ledger())
    cache, reserved = pair.cache, list[int]()
    begin = cache._charges.begin

    def noted(near_bytes: int, spare: int, counts: list[int], plans: int) -> None:
        reserved.append(plans)
        begin(near_bytes, spare, counts, plans)

    cache._charges.begin = noted  # type: ignore[method-assign]
    seqs = pair.new(2)
    found = []
    for lengths in ([100, 700], *[[1, 1]] * 40, [17, 1], *[[1, 0]] * 20, [600, 90], *[[1, 1]] * 20):
        before = cache.report().counts["plans"]
        pair.feed(seqs, lengths)
        found.append(cache.report().counts["plans"] - before)
    assert reserved == found
    assert sum(found[1:41]) > layers


def test_files_are_charged_to_the_byte() -> None:
    ledger = Ledger()
    pair = fed(small(), ledger=ledger)
    scope, generator = pair.cache.scope, torch.Generator().manual_seed(1)
    assert scope is not None
    seqs = pair.new(2)
    for i in range(60):
        verb = int(torch.randint(0, 8, (1,), generator=generator))
        if verb == 0:
            pair.feed(seqs, [300, 1])
        elif verb == 1:
            pair.free(seqs[:1])
            seqs = [*seqs[1:], *pair.new()]
        elif verb == 2:
            pair.cache.trim()
        else:
            pair.feed(seqs, [verb, 1 + i % 20])
        far = ledger.report(scope).far_bytes
        assert (far.used, far.reserved) == (pair.cache.report().far_bytes, 0) and far.used == far.own
    assert ledger.report().far_bytes.used > 0
    del pair
    gc.collect()
    assert ledger.report().far_bytes.used == 0


def test_a_ledger_bounds_the_far_tier_of_several_caches() -> None:
    """A prompt that has no room is withdrawn; after decoded tokens the plan is put off; what another gives back serves."""
    ledger = Ledger(far="1MiB")
    one, two = fed(small(), ledger=ledger), fed(small(), ledger=ledger)
    first, second = one.new()[0], two.new()[0]
    one.feed([first], [440])
    two.feed([second], [100])
    with pytest.raises(BudgetExceeded, match=r"far_bytes: limit is 1048576, used \d+, reserved 0, asked \d+"):
        two.feed([second], [600])
    assert two.cache.logical_length(second) == 100
    for _ in range(60):
        two.feed([second], [1])
        one.feed([first], [1])
        assert ledger.report().far_bytes.used <= 1 << 20
    assert put_off(one)[0] + put_off(two)[0] > 0 and put_off(one)[1] == put_off(two)[1] == 0
    one.free([first])
    one.cache.trim()
    two.feed([second], [250])
    assert ledger.report().far_bytes.used == two.cache.report().far_bytes > 0
    two.check_contents()
    two.check_pools()
