"""Queries of spans behind what is stored: the most that they saw of each token, in table order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_plan import by_position, feed, made
from torch import Tensor

from kvstrata import Cache
from kvstrata.rows import Rows

SCALE, SPANS = 64**-0.5, [0, 9, 9, 30]


def rows(cache: Cache, *seqs: Any, softcap: float = 0.0) -> Rows:
    ids = [s.id for s in seqs]
    return Rows(cache._store, cache.shape, 0, ids, cache._store.columns(0, ids), (SCALE, softcap))


def queries(n: int, dtype: torch.dtype, width: int = 30) -> Tensor:
    """[R, G, W, D] of n sequences, as a model lays them out: [B, W, Hq, D]."""
    q = torch.randn(n, width, 2, 2, 64, generator=torch.Generator().manual_seed(n))
    return q.to(dtype).permute(0, 2, 3, 1, 4).flatten(0, 1) if n > 1 else q.to(dtype)[0].permute(1, 2, 0, 3)


def expected(cache: Cache, q: Tensor, lse: Tensor, *seqs: Any, softcap: float = 0.0) -> Tensor:
    """From decoded keys, f32 [E, R, N]."""
    columns = max(cache.materialize(0, s)[0].shape[1] for s in seqs)
    out = torch.zeros(len(SPANS) - 1, 2 * len(seqs), columns)
    for r in range(out.shape[1]):
        k, _, positions = cache.materialize(0, seqs[r // 2])
        n = int((positions[r % 2] >= 0).sum())
        z = SCALE * torch.einsum("gwd,nd->gwn", q[r].float(), k[r % 2, :n].float())
        z = softcap * torch.tanh(z / softcap) if softcap else z
        for e in (0, 2):
            out[e, r, :n] = (z - lse[r, ..., None])[:, SPANS[e] : SPANS[e + 1]].amax((0, 1)).exp()
    return out


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_spans_saw_is_in_table_order(dtype: torch.dtype, softcap: float) -> None:
    """Two sequences of different lengths, tokens of every format, evicted ones, an open tail."""
    cache = made(by_position, dtype)
    long, short = cache.new(2)
    feed(cache, [long], 300, 0)
    feed(cache, [short], 70, 1)
    q = queries(2, dtype)
    lse = 4 + torch.rand(4, 2, 30, generator=torch.Generator().manual_seed(3))
    read = rows(cache, long, short, softcap=softcap)
    got = read.score_max(q, lse, SPANS)
    ref = expected(cache, q, lse, long, short, softcap=softcap)
    torch.testing.assert_close(got, ref, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6)
    assert torch.equal(got[1], torch.zeros_like(got[1])), "an empty span"
    assert not torch.equal(got, read.score_max(q, lse.flip(1), SPANS))
    assert torch.equal(got, read.score_max(q.contiguous(), lse, SPANS))
    alone = rows(cache, short, softcap=softcap).score_max(q[2:], lse[2:], SPANS)
    assert torch.equal(got[:, 2:, : alone.shape[2]], alone)


def test_spans_see_the_chunk_of_an_open_step() -> None:
    """Of a layer that has appended it; and leave nothing."""
    cache = made(lambda seen: seen.state, torch.float32)
    (seq,) = cache.new()
    feed(cache, [seq], 100, 0)
    q, lse = queries(1, torch.float32), torch.full((2, 2, 30), 4.0)
    before = rows(cache, seq).score_max(q, lse, SPANS)
    with cache.step([seq], [20]) as step:
        new = [torch.randn(20, h, 64, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2)]
        step.attend(0, *new)
        during = rows(cache, seq).score_max(q, lse, SPANS)
        step.attend(1, *new)
    assert torch.equal(during[..., : before.shape[2]], before) and during.shape[2] == before.shape[2] + 20
    z = SCALE * torch.einsum("hgwd,nhd->hgwn", q, new[1]) - 4.0
    torch.testing.assert_close(during[0, :, -20:], z[:, :, :9].amax((1, 2)).exp(), rtol=1e-4, atol=1e-6)


def test_bad_spans_are_refused() -> None:
    cache = made(by_position, torch.float32)
    (seq,) = cache.new()
    feed(cache, [seq], 40, 0)
    q, lse = queries(1, torch.float32), torch.zeros(2, 2, 30)
    for message, more in [
        (r"score_max: q is torch.float32 \[2, 2, 64\]", {"q": q[:, :, 0]}),
        (r"score_max: q is torch.float32 \[1, 2, 30, 64\] .* expected f32, bf16 or f16 \[2, 2, 30, 64\]", {"q": q[:1]}),
        (r"score_max: q is torch.float64", {"q": q.double()}),
        (
            r"score_max: lse is torch.float32 \[2, 2, 29\] .* expected torch.float32 \[2, 2, 30\]",
            {"lse": lse[..., :29]},
        ),
        (r"score_max: lse is torch.float64", {"lse": lse.double()}),
        (r"score_max: spans has 1 offsets, expected at least 2", {"spans": [0]}),
        (r"score_max: spans\[1\] is 31, expected 0 to 30 \(W\)", {"spans": [0, 31]}),
    ]:
        with pytest.raises(ValueError, match=message):
            rows(cache, seq).score_max(**{"q": q, "lse": lse, "spans": SPANS} | more)
