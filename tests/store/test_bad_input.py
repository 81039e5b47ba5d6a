"""Bad input gives the promised error, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvstrata import Budget, BudgetExceeded, Cache, LayerSpec, Policy, Shape, Unsupported, policy

SPEC = LayerSpec(2, 4, 16)
SHAPE = Shape([SPEC, SPEC], torch.float32)


def x(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*size, dtype=dtype)


CONSTRUCTION: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "negative budget": (lambda: Cache(SHAPE, -5, "streaming"), ValueError, r"tokens is -5, expected an int >= 1"),
    "zero budget": (lambda: Cache(SHAPE, 0, "streaming"), ValueError, r"tokens is 0"),
    "bare float": (lambda: Cache(SHAPE, 0.25), ValueError, r"0\.25 is ambiguous, expected one of"),  # type: ignore[arg-type]
    "bool": (lambda: Cache(SHAPE, True), ValueError, r"True is ambiguous"),
    "unit": (lambda: Cache(SHAPE, "2 gigs"), ValueError, r"'2 gigs' is not understood"),
    "share": (lambda: Budget.share(1.5), ValueError, r"share is 1\.5, expected 0 < share <= 1"),
    "below sinks + window, tokens": (
        lambda: Cache(SHAPE, "40tok", policy.streaming(sinks=4, window=64)),
        ValueError,
        r"40 tokens per row, expected at least 83 \(sinks 4 \+ window 64 \+ 15 in the open page\)",
    ),
    "below the least window": (lambda: Cache(SHAPE, "30tok", "streaming"), ValueError, r"expected at least 35"),
    "below sinks + window, bytes": (lambda: Cache(SHAPE, "10KiB", "streaming"), ValueError, r"10240 .* at least"),
    "no budget": (lambda: Cache(SHAPE, None, "streaming"), ValueError, r"needs one, got None"),
    "share of full": (lambda: Cache(SHAPE, "25%", "full"), Unsupported, r"drops nothing"),
    "policy name": (lambda: Cache(SHAPE, None, "lru"), ValueError, r"'lru' is unknown.*full, streaming"),
    "window": (lambda: policy.streaming(window=40), ValueError, r"window is 40, expected a positive multiple of 16"),
    "interval": (lambda: Policy("p", interval=10), ValueError, r"interval is 10"),
    "far": (lambda: Cache(SHAPE, far="64GiB"), Unsupported, r"far is '64GiB', policy 'full' archives nothing"),
    "hold": (lambda: Cache(SHAPE, hold=-1), ValueError, r"hold is -1"),
    "no layers": (lambda: Shape([], torch.float32), ValueError, r"layers is empty"),
    "dtype": (lambda: Shape([SPEC], torch.float64), Unsupported, r"dtype is torch.float64"),
    "device": (lambda: Shape([SPEC], torch.float32, "meta"), Unsupported, r"device is meta"),
    "heads": (lambda: LayerSpec(3, 4, 16), ValueError, r"q_heads is 4, expected a multiple of kv_heads=3"),
    "group": (lambda: LayerSpec(1, 32, 16), Unsupported, r"32 query heads per KV head"),
    "head_dim": (lambda: LayerSpec(1, 1, 1024), Unsupported, r"head_dim is 1024"),
    "no heads": (lambda: LayerSpec(0, 4, 16), ValueError, r"kv_heads is 0"),
    "layer window": (lambda: LayerSpec(1, 1, 16, 0), ValueError, r"window is 0"),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case: str) -> None:
    make, kind, text = CONSTRUCTION[case]
    with pytest.raises(kind, match=text):
        make()


@pytest.mark.parametrize("limit", ["10KiB", "20KiB"])
def test_least_byte_budget_is_the_least(limit: str) -> None:
    """The number in the message works, one byte less does not."""
    with pytest.raises(ValueError, match="expected at least") as error:
        Cache(SHAPE, limit, "streaming")
    least = int(str(error.value).split("at least ")[1])
    assert Cache(SHAPE, Budget.bytes(least), "streaming").policy.window == 16
    with pytest.raises(ValueError, match="expected at least"):
        Cache(SHAPE, Budget.bytes(least - 129), "streaming")


def qkv(tokens: int = 3, q: torch.Tensor | None = None, k: torch.Tensor | None = None, v: torch.Tensor | None = None):  # type: ignore[no-untyped-def]
    """Arguments of a good call, but for what is given."""
    good = (x(tokens, 4, 16), x(tokens, 2, 16), x(tokens, 2, 16))
    return tuple(g if t is None else t for g, t in zip(good, (q, k, v), strict=True))


ATTEND: dict[str, tuple[tuple[object, ...], dict[str, object], str]] = {
    "q dtype": ((0, *qkv(q=x(3, 4, 16).double())), {}, r"q is torch.float64, expected torch.float32"),
    "k dtype": ((0, *qkv(k=x(3, 2, 16).bfloat16())), {}, r"k is torch.bfloat16"),
    "q heads": ((0, *qkv(q=x(3, 2, 16))), {}, r"q is \[3, 2, 16\], expected \[3, 4, 16\]"),
    "v tokens": ((0, *qkv(v=x(2, 2, 16))), {}, r"v is \[2, 2, 16\], expected \[3, 2, 16\]"),
    "head dim": ((0, *qkv(q=x(3, 4, 8))), {}, r"q is \[3, 4, 8\]"),
    "device": ((0, *qkv(q=x(3, 4, 16).to("meta"))), {}, r"q is on meta, expected cpu"),
    "stride": ((0, *qkv(q=x(3, 4, 32)[..., ::2])), {}, r"q has stride 2 in its last dimension"),
    "layer": ((2, *qkv()), {}, r"layer is 2, expected 0..1"),
    "scale": ((0, *qkv()), {"scale": float("nan")}, r"scale is nan, expected a finite number"),
    "softcap": ((0, *qkv()), {"softcap": -1.0}, r"softcap is -1.0"),
    "sinks": ((0, *qkv()), {"sinks": x(3)}, r"sinks is \[3\], expected \[4\]"),
}


def snapshot(cache: Cache, seqs: list) -> tuple:  # type: ignore[type-arg, type-arg]
    rows = [cache._store.row(s.id, layer, h) for s in seqs for layer in range(2) for h in range(2)]
    return rows, [cache.logical_length(s) for s in seqs], [cache._store.pool(0)["used"]]


def started() -> tuple[Cache, list]:  # type: ignore[type-arg]
    cache = Cache(SHAPE)
    seqs = cache.new(2)
    with cache.step(seqs, [20, 3]) as step:
        for layer in range(2):
            step.attend(layer, x(23, 4, 16), x(23, 2, 16), x(23, 2, 16))
    return cache, seqs


@pytest.mark.parametrize("case", ATTEND)
def test_attend(case: str) -> None:
    args, kw, text = ATTEND[case]
    cache, seqs = started()
    before = snapshot(cache, seqs)
    with pytest.raises(ValueError, match=text), cache.step(seqs, [2, 1]) as step:
        step.attend(*args, **kw)  # type: ignore[arg-type]
    assert snapshot(cache, seqs) == before
    with cache.step(seqs, [1, 1]) as step:  # and the cache goes on
        for layer in range(2):
            step.attend(layer, x(2, 4, 16), x(2, 2, 16), x(2, 2, 16))


STEP: dict[str, tuple[Callable[[Cache, list], object], type[Exception], str]] = {  # type: ignore[type-arg]
    "no token": (lambda c, s: c.step(s, [0, 0]), ValueError, r"at least one token"),
    "negative length": (lambda c, s: c.step(s, [-1, 2]), ValueError, r"none negative"),
    "lengths": (lambda c, s: c.step(s, [1]), ValueError, r"lengths has 1 elements, expected 2"),
    "no columns": (lambda c, s: c.step(s, columns=0), ValueError, r"columns is 0"),
    "nothing": (lambda c, s: c.step(s), ValueError, r"give lengths, valid or columns"),
    "valid dtype": (lambda c, s: c.step(s, valid=x(2, 3)), ValueError, r"valid is torch.float32 \[2, 3\]"),
    "valid rows": (lambda c, s: c.step(s, valid=x(3, 3).bool()), ValueError, r"expected torch.bool \[2, T\]"),
    "all padding": (lambda c, s: c.step(s, valid=torch.zeros(2, 3).bool()), ValueError, r"marks no token"),
    "twice": (lambda c, s: c.step([s[0], s[0]], [1, 1]).open(), ValueError, r"named twice"),
    "foreign": (lambda c, s: c.step(Cache(SHAPE).new(9)[-1:], [1]).open(), ValueError, r"does not exist, or was freed"),
    "crop beyond": (lambda c, s: c.crop(s, [21, 3]), ValueError, r"length is 21, expected 0..20"),
    "fork none": (lambda c, s: c.fork(s[0], 0), ValueError, r"n is 0, expected >= 1"),
    "drop shape": (lambda c, s: c.drop(0, s[0], torch.ones(3, 20).bool()), ValueError, r"expected torch.bool \[2, N\]"),
    "drop columns": (lambda c, s: c.drop(0, s[0], torch.ones(2, 19).bool()), ValueError, r"19 columns, expected .* 20"),
}


@pytest.mark.parametrize("case", STEP)
def test_step(case: str) -> None:
    call, kind, text = STEP[case]
    cache, seqs = started()
    before = snapshot(cache, seqs)
    with pytest.raises(kind, match=text):
        call(cache, seqs)
    assert snapshot(cache, seqs) == before
    assert not cache._store.in_step


def test_two_open_steps() -> None:
    cache, seqs = started()
    with pytest.raises(RuntimeError, match="another step of this cache is open"), cache.step(seqs, [1, 1]):
        cache.step(seqs, [1, 1]).open()
    assert not cache._store.in_step


def test_a_layer_left_out_or_twice() -> None:
    cache, seqs = started()
    before = snapshot(cache, seqs)
    with pytest.raises(ValueError, match=r"layers \[1\] did not attend"), cache.step(seqs, [1, 1]) as step:
        step.attend(0, x(2, 4, 16), x(2, 2, 16), x(2, 2, 16))
    assert snapshot(cache, seqs) == before
    with pytest.raises(ValueError, match="layer 0 was attended already"), cache.step(seqs, [1, 1]) as step:
        step.attend(0, x(2, 4, 16), x(2, 2, 16), x(2, 2, 16))
        step.attend(0, x(2, 4, 16), x(2, 2, 16), x(2, 2, 16))
    assert snapshot(cache, seqs) == before


@pytest.mark.parametrize("budget", ["64KiB", "100tok"])
def test_budget_exceeded_changes_nothing(budget: str) -> None:
    cache = Cache(SHAPE, budget, "full")
    seqs = cache.new(1)
    kept = []
    with pytest.raises(BudgetExceeded, match=r"limit is \d+ .*need"):
        for _ in range(300):
            kept = [snapshot(cache, seqs), cache.logical_length(seqs[0])]
            with cache.step(seqs, [1]) as step:
                for layer in range(2):
                    step.attend(layer, x(1, 4, 16), x(1, 2, 16), x(1, 2, 16))
    assert kept == [snapshot(cache, seqs), cache.logical_length(seqs[0])]
    assert kept[1] >= 50, "the budget was used before it ran out"
    if budget == "64KiB":
        assert cache.nbytes() <= 64 << 10


class Promotes:
    def plan(self, seen: policy.Seen) -> policy.Plan:
        return policy.Plan(state=torch.full(seen.positions.shape, 2, dtype=torch.uint8))


class DropsTail:
    def plan(self, seen: policy.Seen) -> policy.Plan:
        return policy.Plan(state=torch.zeros(seen.positions.shape, dtype=torch.uint8))


class Misshapen:
    def plan(self, seen: policy.Seen) -> policy.Plan:
        return policy.Plan(state=torch.ones(1, 1, dtype=torch.uint8))


class Regroups:
    def plan(self, seen: policy.Seen) -> policy.Plan:
        return policy.Plan(group=torch.zeros(seen.positions.shape, dtype=torch.int32))


@pytest.mark.parametrize(
    ("planner", "text"),
    [
        (Promotes(), r"is 2, expected 0 \(Evicted\), 1 \(Full\) or a quantized"),
        (DropsTail(), r"changes position 0, which is protected"),
        (Misshapen(), r"state is torch.uint8 \[1, 1\]"),
        (Regroups(), r"changes position 0, which is protected"),
    ],
)
def test_bad_plan(planner: policy.Planner, text: str) -> None:
    cache = Cache(SHAPE, policy=Policy("bad", planner, sinks=4, window=16))
    seqs = cache.new(2)
    with cache.step(seqs, [14, 3]) as step:
        for layer in range(2):
            step.attend(layer, x(17, 4, 16), x(17, 2, 16), x(17, 2, 16))
    before = snapshot(cache, seqs)
    with pytest.raises(ValueError, match=text):
        cache.compress()
    assert snapshot(cache, seqs) == before


def test_a_tight_limit_never_takes_back_what_a_step_needs() -> None:
    """Two pools under one limit: making room in one for the other leaves both with the pages of the step."""
    shape = Shape([LayerSpec(1, 1, 16), LayerSpec(1, 1, 128), LayerSpec(1, 1, 16)], torch.float32)
    cache = Cache(shape, "200KiB")
    seqs = cache.new(2)
    with pytest.raises(BudgetExceeded):
        for n in range(1, 400):
            with cache.step(seqs, [n % 5, 1]) as step:
                for layer, spec in enumerate(shape.layers):
                    step.attend(layer, *(x(n % 5 + 1, 1, spec.head_dim) for _ in range(3)))
            assert cache.nbytes() <= 200 << 10
            if n % 40 == 0:
                cache.crop([seqs[0]], [cache.logical_length(seqs[0]) // 2])
    assert cache.nbytes() > 150 << 10


class Transposed:
    """The right plan in a layout that the store must copy first."""

    def plan(self, seen: policy.Seen) -> policy.Plan:
        kept = (seen.open | (seen.positions < 4)).to(torch.uint8)
        return policy.Plan(state=kept.T.contiguous().T)


def test_a_plan_may_have_any_strides() -> None:
    cache = Cache(SHAPE, policy=Policy("strided", Transposed(), sinks=4, window=16))
    seqs = cache.new(2)
    with cache.step(seqs, [100, 60]) as step:
        for layer in range(2):
            step.attend(layer, x(160, 4, 16), x(160, 2, 16), x(160, 2, 16))
    for seq, first, last in zip(seqs, (80, 32), (100, 60), strict=True):
        _, _, positions = cache.materialize(0, seq)
        assert positions[0].tolist() == [*range(4), *range(first, last)]
