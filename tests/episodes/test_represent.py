"""Representatives equal a search by hand; the patched prompt keeps time order and never passes its tokens."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstrata.episodes import fit, represent
from kvstrata.episodes.vectors import TIE


def case(seed: int, n: int, episodes: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors f32 [n, d], some of them equal and one zero, labels and unit centroids."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, d, generator=generator)
    vectors[torch.randint(n, (n // 3,), generator=generator)] = torch.randn(d, generator=generator)
    vectors[n // 2] = 0
    labels = torch.randint(episodes, (n,), generator=generator)
    labels[torch.randperm(n, generator=generator)[:episodes]] = torch.arange(episodes)
    centroids = torch.stack([vectors[labels == e].mean(0) for e in range(episodes)])
    return vectors, labels.to(torch.int32), torch.nn.functional.normalize(centroids, dim=-1)


def cosines(vectors: Tensor, others: Tensor) -> Tensor:
    return (
        torch.nn.functional.normalize(vectors.double(), dim=-1)
        @ torch.nn.functional.normalize(others.double(), dim=-1).T
    )


def by_hand(vectors: Tensor, labels: Tensor, centroids: Tensor, n: int, pick: str) -> list[list[int]]:
    """Section 2.2 over Python lists: each pick is the first window that no other beats."""
    cos, to_centroid = cosines(vectors, vectors).tolist(), cosines(vectors, centroids).tolist()
    found = []
    for e in range(len(centroids)):
        members = [k for k in range(len(vectors)) if labels[k] == e]
        picked: list[int] = []
        while len(picked) < min(n, len(members)):
            left = [j for j in members if j not in picked]
            if pick == "closest":
                worth = {j: to_centroid[j][e] for j in left}
            else:
                worth = {j: sum(max(cos[k][i] for i in [*picked, j]) for k in members) / len(members) for j in left}
            picked.append(next(j for j in left if worth[j] >= max(worth.values()) - TIE))
        found.append(picked)
    return found


@pytest.mark.parametrize("pick", ["coverage", "closest"])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_equals_a_search_by_hand(pick: str, n: int) -> None:
    for seed in range(12):
        given = case(seed, n=6 + 3 * seed, episodes=1 + seed % 5, d=2 + seed)
        assert represent(*given, n, pick) == by_hand(*given, n, pick)  # type: ignore[arg-type]


def test_blocks_of_candidates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(0, n=50, episodes=2, d=6)
    whole = represent(*given, 8)
    monkeypatch.setattr(sys.modules["kvstrata.episodes.represent"], "BLOCK", 7)
    assert represent(*given, 8) == whole


def test_coverage_takes_from_each_corner_what_the_closest_miss() -> None:
    # Three alike about the middle, and two pairs apart from them.
    spread = torch.tensor(
        [[1, 0, 0], [0.99, 0.1, 0], [0.99, -0.1, 0], [0.3, 1, 0], [0.3, 1, 0], [0.3, 0, 1], [0.3, 0, 1]]
    )
    labels = torch.zeros(7, dtype=torch.int32)
    centroid = torch.tensor([[1.0, 0.0, 0.0]])
    assert represent(spread, labels, centroid, 3, "closest") == [[0, 1, 2]]
    assert {3, 5} <= set(represent(spread, labels, centroid, 3)[0])  # the earlier of each pair


def test_equal_windows_are_picked_by_time() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in range(2, 40):
        vectors = torch.randn(1, 384, generator=generator).expand(n, 384)
        for pick in ("coverage", "closest"):
            assert represent(vectors, torch.zeros(n, dtype=torch.int32), vectors[:1], 4, pick) == [
                list(range(min(4, n)))
            ]  # type: ignore[arg-type]


def letters(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def text_of(ids: Tensor) -> str:
    return bytes(ids.tolist()).decode()


TEXTS = ["aaaa", "bb", "ccc", "d"]


@pytest.mark.parametrize(
    ("picked", "tokens", "instruction", "prompt"),
    [
        ([2, 0, 3, 1], 99, "", "aaaa\nbb\nccc\nd"),  # time order, whatever the order of picking
        ([2, 0, 3, 1], 13, "", "aaaa\nbb\nccc\nd"),  # to the token
        ([2, 0, 3, 1], 12, "", "aaaa\nccc\nd"),  # the last picked goes
        ([2, 0, 3, 1], 9, "", "aaaa\nccc"),
        ([2, 0, 3, 1], 7, "", "ccc"),
        ([2, 0, 3, 1], 2, "", "cc"),  # a lone one is cut
        ([1], 1, "", "b"),
        ([2, 0], 12, "Ask", "Ask\naaaa\nccc"),
        ([2, 0], 11, "Ask", "Ask\nccc"),
        ([2, 0], 5, "Ask", "Ask\nc"),
    ],
)
def test_the_prompt_is_cut_to_its_tokens(picked: list[int], tokens: int, instruction: str, prompt: str) -> None:
    ids = fit(TEXTS, picked, letters, tokens, instruction)
    assert ids.dtype == torch.int64 and text_of(ids) == prompt


@settings(deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=6), st.integers(1, 40), st.randoms())
def test_a_prompt_is_never_too_long_and_as_long_as_it_can_be(texts: list[str], tokens: int, random) -> None:  # type: ignore[no-untyped-def]
    picked = list(range(len(texts)))
    random.shuffle(picked)
    got = text_of(fit(texts, picked, letters, tokens))
    whole = ["\n".join(texts[i] for i in sorted(picked[:kept])) for kept in range(len(picked), 0, -1)]
    assert got == next((text for text in whole if len(text) <= tokens), whole[-1][:tokens])


def test_bad_input() -> None:
    given = case(0, 10, 2, 4)
    with pytest.raises(ValueError, match="n is 0"):
        represent(*given, 0)
    with pytest.raises(ValueError, match="pick is 'best', expected 'coverage' or 'closest'"):
        represent(*given, pick="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"vectors \[10, 4\] has 40 NaN"):
        represent(given[0] * float("nan"), *given[1:])
    for picked in ([], [4], [-1], [1, 1]):
        with pytest.raises(ValueError, match="picked is"):
            fit(TEXTS, picked, letters, 5)
    with pytest.raises(ValueError, match="tokens is 0"):
        fit(TEXTS, [0], letters, 0)
    with pytest.raises(ValueError, match=r"encode gave torch.int64 \[1, 4\], expected integers \[T\]"):
        fit(TEXTS, [0], lambda text: letters(text).unsqueeze(0), 5)
    with pytest.raises(ValueError, match="no token for 'aaaa'"):
        fit(TEXTS, [0], lambda text: letters(""), 5)
