"""States of tokens through plans: what is kept stays whole and is read, and only the transitions of the table are reachable."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test_plan import LAYERS, feed, made, table

from kvstrata import Cache, Shape
from kvstrata.policy import AccumulatedMass, Plan, Policy, Seen
from kvstrata.policy.base import EVICTED, FULL, INT2, INT4, INT8
from kvstrata.rows import Rows


def mass_of(cache: Cache, seq: object, layer: int, n: int) -> torch.Tensor:
    """Mass of each token of a layer by position, f32 [H, n]; 0 where it is not stored."""
    i = seq.id  # type: ignore[attr-defined]
    columns = cache._store.columns(layer, [i])
    found = Rows(cache._store, cache.shape, layer, [i], columns, (64**-0.5, 0.0)).mass()
    places = cache.materialize(layer, seq)[2]  # type: ignore[arg-type]
    whole = torch.zeros(2, max(n, int(places.max()) + 1) + 1)
    whole.scatter_(1, torch.where(places < 0, whole.shape[1] - 1, places).long(), found)
    return whole[:, :n]


def test_what_plans_keep_is_read_and_whole() -> None:
    """200 appends, 12 plans: Full tokens are the model's bytes, quantized ones their first codes and scales, and each still
    gets the attention mass of its key."""

    def choose(seen: Seen) -> torch.Tensor:
        aim = torch.tensor([FULL, INT8, INT4, EVICTED])[(seen.positions % 4).clamp_min(0).long()]
        return torch.where(seen.state > FULL, seen.state, aim)

    cache = made(choose, scorer=AccumulatedMass())
    (seq,) = cache.new()
    keys, values = feed(cache, [seq], 200, 0)
    first = [table(cache, seq, layer, head) for layer in range(2) for head in range(2)]
    masses = torch.stack([mass_of(cache, seq, layer, 200) for layer in range(2)])
    plans = cache.report().counts["plans"]
    for i in range(200):
        feed(cache, [seq], 1, i + 1)
    assert cache.report().counts["plans"] - plans >= 2 * 5
    for r, before in enumerate(first):
        layer, head = r // 2, r % 2
        now = table(cache, seq, layer, head)
        old = [p for p in before if 16 <= p < 150]
        assert {before[p][0] for p in old} == {1, 3, 4}
        for p in old:
            assert now[p] == before[p]
            if p % 4 == 0:
                pair = [x[layer, p, head].view(torch.uint8) for x in (keys, values)]
                assert now[p] == (1, bytes(torch.cat(pair).tolist()))
        assert (mass_of(cache, seq, layer, 200)[head][old] > masses[layer, head][old]).all()
    before, stored = mass_of(cache, seq, 0, 401), cache.materialize(0, seq)
    generator = torch.Generator().manual_seed(77)
    with cache.step([seq], [1]) as step:
        q, k, v = (torch.randn(1, h, 64, generator=generator).bfloat16() for h in (4, 2, 2))
        step.attend(0, q, k, v)
        step.attend(1, q, k, v)
    got = mass_of(cache, seq, 0, 401) - before
    for head in range(2):
        own = torch.cat([stored[0][head], k[0, head : head + 1]]).float()
        share = (q[0, 2 * head : 2 * head + 2].float() @ own.T * 64**-0.5).softmax(-1).mean(0)
        expected = torch.zeros(401)
        expected[stored[2][head].long()] = share[:-1]
        expected[400] = share[-1]
        torch.testing.assert_close(got[head], expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("now", [FULL, INT8, INT4, INT2])
@pytest.mark.parametrize("then", [EVICTED, FULL, INT8, INT4, INT2])
def test_only_the_transitions_of_the_table_are_reachable(now: int, then: int) -> None:
    """Bits only fall: what a plan may say of a token in each state, and that nothing else changes anything."""
    aim = {"state": now}
    cache = made(lambda seen: torch.full_like(seen.state, aim["state"]))
    (seq,) = cache.new()
    feed(cache, [seq], 100, 0)
    rows = [(layer, head) for layer in range(2) for head in range(2)]
    before = [table(cache, seq, *row) for row in rows]
    aim["state"] = then
    formats = {FULL: 1, INT8: 3, INT4: 4, INT2: 5}
    if then != EVICTED and then < now:
        with pytest.raises(ValueError, match="expected"):
            cache.compress()
        assert before == [table(cache, seq, *row) for row in rows]
        return
    cache.compress()
    for found in (table(cache, seq, *row) for row in rows):
        assert {p: c[0] for p, c in found.items() if 4 <= p < 48} == (
            {} if then == EVICTED else dict.fromkeys(range(4, 48), formats[then])
        )


@dataclass(frozen=True)
class Floods:
    """Every place that is not protected becomes int4, places beyond a row's last too."""

    def plan(self, seen: Seen) -> Plan:
        return Plan(state=torch.where(seen.protected, seen.state, INT4).to(torch.uint8))


def test_evicted_has_no_way_back() -> None:
    """A plan can only speak of places: those without a token stay without, and what was evicted stays so."""
    policy = Policy("floods", Floods(), formats=("int4",), sinks=4, window=32, interval=16, chunk=64)
    cache = Cache(Shape(LAYERS, torch.bfloat16), policy=policy)
    seqs = cache.new(2)
    with cache.step(seqs, [120, 60]) as step:
        for layer in range(2):
            step.attend(layer, *(torch.randn(180, h, 64).bfloat16() for h in (4, 2, 2)))
    columns = cache._store.columns(0, [seqs[0].id])
    cache.drop(0, seqs[0], torch.arange(columns).expand(2, -1) % 3 != 1)
    kept = [[sorted(table(cache, s, layer, 0)) for s in seqs] for layer in range(2)]
    assert len(kept[0][0]) == 80 and len(kept[0][1]) == 60, "rows differ in length: there are places without a token"
    before = cache.report()
    cache.compress()
    assert kept == [[sorted(table(cache, s, layer, 0)) for s in seqs] for layer in range(2)]
    assert cache.report().states == before.states
    assert before.states["int4"] > 0
