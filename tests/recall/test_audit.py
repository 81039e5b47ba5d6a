"""A selector with ``audit``: now and then a row is read whole, and its true share stands beside the estimate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from archived import ALL, Fed, fed, small
from choosing import read, seen, table

from kvstrata import LayerSpec, Policy, Shape
from kvstrata.recall import PageMeans

ONE = Shape([LayerSpec(1, 2, 64)], torch.float32)


def audited(pages: int, audit: int) -> Policy:
    policy = small(pages)
    assert isinstance(policy.selector, PageMeans)
    return replace(policy, selector=replace(policy.selector, audit=audit))


@pytest.mark.parametrize("far", ["auto", None])
def test_what_is_audited_is_the_true_share(far: str | None) -> None:
    """Of one layer and row, every second step: what the tokens themselves say."""
    pair = fed(audited(4, 1), ONE, far=far)
    (seq,) = pair.new()
    pair.feed([seq], [700])
    exact, estimated = [], []
    for step in range(1, 41):
        row = table(pair.cache, seq, 0, 0)
        ((q, _),) = pair.step([seq], [1])
        k, v = (x[-1, 0] for x in pair.tokens(seq, 0))
        found = read(row, q[0], (k, v), 32, 4)
        if step % 2:
            continue
        entries = torch.tensor([0, 1, *range(row.sealed, len(row.pages)), *found.entries])
        z = [
            torch.logsumexp(q[0].double() @ seen(row, some, (k, v))[0].T / 8, -1)
            for some in (entries, torch.arange(len(row.pages)))
        ]
        exact += (z[0] - z[1]).exp().tolist()
        estimated += found.captured.tolist()
    recall = pair.cache.report().recall
    assert recall is not None and recall.audited == len(exact) == 40
    assert recall.audited_exact == pytest.approx(sum(exact) / 40, abs=2e-3)
    assert recall.audited_estimate == pytest.approx(sum(estimated) / 40, abs=2e-3)
    assert 0.5 < recall.audited_exact < recall.audited_estimate - 0.1, "the estimate leans optimistic, the audit tells"


def outputs(pair: Fed) -> list[torch.Tensor]:
    seqs = pair.new(2)
    found = pair.feed(seqs, [700, 430])
    for _ in range(30):
        found += pair.feed(seqs, [1, 1])
    return found


def test_an_audit_changes_no_bit() -> None:
    plain, watched = fed(small(4)), fed(audited(4, 2))
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain), outputs(watched), strict=True))
    recall = watched.cache.report().recall
    assert recall is not None and recall.audited == 2 * (30 * 2 // 5), "every fifth call of two layers, two heads"
    unwatched = plain.cache.report().recall
    assert unwatched is not None and unwatched.audited == 0
    assert (recall.captured, recall.selections) == (unwatched.captured, unwatched.selections)


def test_of_rows_that_read_all() -> None:
    pair = fed(audited(ALL, 1))
    outputs(pair)
    recall = pair.cache.report().recall
    assert recall is not None and recall.audited > 0
    assert recall.audited_exact == pytest.approx(1.0, abs=1e-6) and recall.audited_estimate == 1.0


def test_refused() -> None:
    with pytest.raises(ValueError, match="audit is -1, expected at least 0 steps"):
        PageMeans(audit=-1)
