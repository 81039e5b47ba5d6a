"""Selectors of one's own in torch: what they see, what they may return, and that it is what is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from archived import ALL, EXACT, Fed, fed, small, worst
from choosing import seen, table
from torch import Tensor

from kvstrata import LayerSpec, Sequence, Shape
from kvstrata.policy.base import Policy
from kvstrata.recall import Bounds, Chooser, PageMeans, Summaries

SHAPE = Shape([LayerSpec(2, 4, 64)] * 2, torch.float32)
BUDGET = 32 + 16 + 15 + 4 * 16
PAGES, SINKS = 4, 32


class ByMean(Chooser):
    def choose(self, q: Tensor, pages: Summaries) -> Tensor:
        return pages.best((q.sum(1, keepdim=True) @ pages.mean.mT)[:, 0])


class Whole(Chooser):
    """As PageMeans has it, w = 1, aggregate sum."""

    def choose(self, q: Tensor, pages: Summaries) -> Tensor:
        x = pages.scale * q.double() @ pages.mean.double().mT + pages.count.double().log().unsqueeze(1)
        x = x + 0.5 * pages.scale**2 * (q.double() ** 2).sum(-1, keepdim=True) * pages.spread.unsqueeze(1)
        z = torch.logaddexp(x.logsumexp(-1), pages.base.double())
        return pages.best((x - z.unsqueeze(-1)).exp().sum(1))


class Same(Chooser):
    """What a test hands it."""

    answer: Callable[[Tensor, Summaries], Any]

    def choose(self, q: Tensor, pages: Summaries) -> Tensor:
        return type(self).answer(q, pages)


def chosen_by(selector: Any, **more: Any) -> Policy:
    return replace(small(PAGES, **more), selector=selector)


def begun(selector: Any, **more: Any) -> tuple[Fed, Sequence]:
    pair = fed(chosen_by(selector), SHAPE, **more)
    (seq,) = pair.new()
    pair.feed([seq], [700])
    return pair, seq


@pytest.mark.parametrize("far", ["auto", None])
def test_what_is_chosen_is_read(far: str | None) -> None:
    pair, seq = begun(ByMean(BUDGET), far=far)
    for _ in range(20):
        rows = [[table(pair.cache, seq, layer, h) for h in range(2)] for layer in range(2)]
        found = pair.step([seq], [1])
        for layer, (q, out) in enumerate(found):
            for h in range(2):
                row, heads = rows[layer][h], slice(2 * h, 2 * h + 2)
                k, v = (x[0, h] for x in pair.pieces[seq][layer][-1])
                first = SINKS // 16
                mean = row.k[first : row.sealed].mean(1)  # pages are whole
                vote = q[0, heads].double().sum(0) @ mean.T
                order = vote.sort(descending=True)
                if order.values[PAGES - 1] - order.values[PAGES] < 0.05:
                    continue  # means to 8 bits may choose another one
                chosen = sorted((order.indices[:PAGES] + first).tolist())
                steady = [*range(first), *range(row.sealed, len(row.pages))]
                keys, values = seen(row, torch.tensor(steady + chosen), (k, v))
                want = (q[0, heads].double() @ keys.T * 64**-0.5).softmax(-1) @ values
                assert float((out[0, heads].double() - want).abs().max()) < 1e-4
    recall = pair.cache.report().recall
    assert recall is not None and recall.selections == 0, "nothing is known of what is not read"


def test_page_means_written_in_torch() -> None:
    """The same pages as by the native selector: the same bits."""
    (mine, a), (ours, b) = begun(Whole(BUDGET)), begun(PageMeans(BUDGET))
    for _ in range(8):
        for x, y in zip(mine.feed([a], [1]), ours.feed([b], [1]), strict=True):
            assert torch.equal(x, y)


def test_all_may_be_read_and_none() -> None:
    everything = fed(chosen_by(ByMean(BUDGET + 16 * ALL)), SHAPE)
    (seq,) = everything.new()
    everything.feed([seq], [500])
    assert worst(everything, [seq], [1]) < EXACT
    Same.answer = staticmethod(lambda q, pages: torch.full((len(q), pages.most), -1))  # type: ignore[assignment]
    pair, seq = begun(Same(BUDGET))
    assert all(x.isfinite().all() for x in pair.feed([seq], [1]))


def test_sequences_of_other_lengths_and_forks() -> None:
    """A row's answer does not depend on its batch mates: what is beyond its pages is not there."""
    pair, seq = begun(ByMean(BUDGET))
    (short,) = pair.new()
    pair.feed([short], [200])
    kid = pair.fork(seq)[0]
    drawn = [[pair.drawn(layer, 3)[x] for x in range(3)] for layer in range(2)]

    def step(seqs: list[Sequence], rows: list[int]) -> list[Tensor]:
        with pair.cache.step(seqs, [1] * len(seqs)) as one:
            return [one.attend(layer, *(x[rows] for x in drawn[layer])) for layer in range(2)]

    together = step([seq, short], [0, 1])
    alone = step([kid], [0])
    assert all(torch.equal(a[:1], b) for a, b in zip(together, alone, strict=True))


def test_summaries_are_of_the_pages() -> None:
    caught: list[tuple[Tensor, Summaries]] = []

    def look(q: Tensor, pages: Summaries) -> Tensor:
        caught.append((q, pages))
        return pages.best(-torch.arange(pages.count.shape[1]).expand(pages.count.shape).float())

    Same.answer = staticmethod(look)  # type: ignore[assignment]
    pair, seq = begun(Same(BUDGET))
    rows = [table(pair.cache, seq, 0, h) for h in range(2)]
    (queries, _), _ = pair.step([seq], [1])
    q, pages = caught[0]
    assert torch.equal(q.flatten(0, 1), queries[0]) and pages.most == PAGES and pages.scale == pytest.approx(64**-0.5)
    for h, row in enumerate(rows):
        assert pages.count[h, : row.sealed].tolist() == [0, 0] + [16] * (row.sealed - 2)
        k, mean = row.k[2 : row.sealed], pages.mean[h, 2 : row.sealed].double()
        assert float((mean - k.mean(1)).abs().max()) < 0.1
        away = (k - mean.unsqueeze(1)).norm(dim=-1)
        assert torch.allclose(pages.radius[h, 2 : row.sealed].double(), away.amax(1), rtol=1e-3)
        assert torch.allclose(pages.spread[h, 2 : row.sealed].double(), (away**2).mean(1) / 64, rtol=1e-3)


BAD: list[tuple[Callable[[Tensor, Summaries], Any], str]] = [
    (lambda q, p: [0, 1], r"Same: choose gave list, expected torch.int64 or torch.int32 \[2, 4\]"),
    (lambda q, p: torch.zeros(2, 4), r"Same: choose gave torch.float32 \[2, 4\], expected torch.int64"),
    (lambda q, p: torch.full((2, 3), -1), r"Same: choose gave torch.int64 \[2, 3\], expected .*\[2, 4\]"),
    (lambda q, p: torch.full((1, 4), -1), r"Same: choose gave torch.int64 \[1, 4\], expected .*\[2, 4\]"),
    (lambda q, p: p.best(p.radius).index_fill(1, torch.tensor([0]), 9999), "gave page 9999 in row 0, expected -1"),
    (lambda q, p: p.best(p.radius).index_fill(1, torch.tensor([0]), -2), "gave page -2 in row 0, expected -1"),
    (lambda q, p: torch.tensor([[3, 4, 5, 3]] * 2), "gave page 3 twice in row 0, expected each once"),
    (lambda q, p: torch.tensor([[3, 4, 5, 1]] * 2), "gave page 1 in row 0, expected one with readable tokens"),
    (lambda q, p: p.best(p.radius[:1]), r"best: vote is \[1, \d+\], expected \[2, \d+\]"),
]


@pytest.mark.parametrize(("answer", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_bad_answers(answer: Callable[[Tensor, Summaries], Any], message: str) -> None:
    """The step is refused and withdrawn; the next one goes on as if it had not been."""
    Same.answer = staticmethod(lambda q, pages: pages.best(pages.radius))  # type: ignore[assignment]
    (pair, seq), (twin, other) = begun(Same(BUDGET)), begun(Same(BUDGET))
    Same.answer = staticmethod(answer)  # type: ignore[assignment]
    tokens = [pair.drawn(layer, 1) for layer in range(2)]
    with pytest.raises(ValueError, match=message), pair.cache.step([seq], [1]) as step:
        step.attend(0, *tokens[0])
    Same.answer = staticmethod(lambda q, pages: pages.best(pages.radius))  # type: ignore[assignment]
    assert pair.cache.logical_length(seq) == 700
    for _ in range(2):
        twin.drawn(0, 1)
    outs = []
    for one, which in ((pair, seq), (twin, other)):
        with one.cache.step([which], [1]) as step:
            outs.append([step.attend(layer, *tokens[layer]) for layer in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_a_page_of_no_numbers_is_refused() -> None:
    pair, seq = begun(ByMean(BUDGET))
    drawn = [pair.drawn(layer, 40) for layer in range(2)]
    drawn[1][1][3, 1, 5] = torch.nan
    with pair.cache.step([seq], [40]) as step:
        for layer in range(2):
            step.attend(layer, *drawn[layer])
    with pytest.raises(ValueError, match="ByMean: the keys of page .* are not finite"):
        pair.feed([seq], [1])


def test_one_after_another() -> None:
    """set_selector takes them like any other, and back."""
    (pair, seq), (twin, other) = begun(PageMeans(BUDGET)), begun(PageMeans(BUDGET))
    pair.cache.set_selector(Whole(BUDGET))
    x, y = (one.feed([which], [1]) for one, which in ((pair, seq), (twin, other)))
    pair.cache.set_selector(PageMeans(BUDGET))
    z, w = (one.feed([which], [1]) for one, which in ((pair, seq), (twin, other)))
    assert all(torch.equal(a, b) for a, b in zip([*x, *z], [*y, *w], strict=True))
    with pytest.raises(ValueError, match="ranks by bounds, pages have summaries of kind mean"):
        pair.cache.set_selector(Bounds(BUDGET))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="ByMean: budget is 40 tokens, expected at least 79"):
        chosen_by(ByMean(40))
    with pytest.raises(ValueError, match="ByMean: audit is 5, expected 0"):
        chosen_by(ByMean(BUDGET, audit=5))
    pair, seq = begun(Chooser(BUDGET))
    with pytest.raises(NotImplementedError, match=r"Chooser: choose\(q, pages\) is not written"):
        pair.feed([seq], [1])
