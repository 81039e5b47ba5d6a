"""Every tolerance of the op tests, once, with its reason. ‖out − ref‖ / ‖ref‖ is taken per (row, query, head)."""

from __future__ import annotations

import torch
from torch import Tensor

# f32 queries, outputs and pages: sums of up to 32k terms in f32, exp and tanh within 2^-20. Measured: below 2e-6.
OUT_F32 = 1e-5
# 16-bit pages, against a reference on the decoded pages: the house's gate for decoding. The output's own rounding to bf16
# is up to 2^-9 per element, hence about 1.1e-3 in norm; measured below 1e-5 with an f32 output.
OUT_16 = 1e-3
OUT_BF16_OUTPUT = 4e-3
# Quantized pages, against a reference on the dequantized pages: queries, and p * s of a block of pages, are rounded to 16
# bits of their largest element, 2^-16 each, and an output of random values is a sum in which much cancels. Measured below 2e-4.
OUT_QUANTIZED = 1e-3
OUT_F16_OUTPUT = 5e-4
# log-sum-exp: absolute, for logits of a few units; half an ulp of the sum and of the maximum.
LSE = 5e-6
# Logits: relative to the largest; f32 dot products of up to 512 terms.
LOGITS = 2e-6
# Levels with bf16 products (avx512_bf16 and up) read bf16 pages so: p, and a query that is not bf16 itself, are two terms of 8
# bits, off by up to 2^-17 of each factor. Measured: logits 1.4e-5, outputs 3e-6.
LOGITS_PAIRS = 3e-5
OUT_PAIRS = 1e-5
# Logits of quantized pages: sqrt D terms, each off by up to max |R q| / 65278 times its code's value; and log-sum-exps of
# them.
LOGITS_QUANTIZED = 5e-4
# Attention mass: exp within 2^-20 and up to G * T = 64 additions.
MASS = 5e-6
# Window scores, relative to the row's largest hundredth: exp of logits that are themselves within LOGITS, and the square of
# a share's distance from its mean, weighted up to 264-fold. Measured: below 2e-6.
SHARE = 2e-5
# Over quantized pages, whose queries are rounded to 16 bits of their largest element: logits are off by some 1e-5 of it.
# Measured: below 2e-4, and 5e-5 for log-sum-exps.
SHARE_QUANTIZED = 5e-4
LSE_QUANTIZED = 1e-4
# Pooled scores: f32 sums of the neighbours, thousands of them with the largest kernel, then of the heads.
POOL = 5e-6
# Norms and cosines: f32 sums of up to 512 squares or products, directions of up to 4,096 tokens.
KEYS = 5e-6
# E, V, K. sound: ratios of f32 sums of up to W * N terms; K's fourth powers count twice. code: sums; where the clamp of its
# kurtosis begins, a term is the fourth power of a share over the square of its variance.
STATS = (1e-5, 1e-5, 5e-5)
STATS_CODE = (1e-5, 2e-5, 1e-4)
STATS_QUANTIZED = (1e-4, 5e-4, 5e-4)
# Summaries: f32 means and mean squares of 16 slots, in the rotated space; relative, above a thousandth.
# Measured: below 5e-7.
SUMMARY = 1e-5
# How near to the middle between two codes a mean may lie, in codes, so that the op may round it either way.
CODE_TIE = 1e-3
# x of score_pages, in units of a logit: the dot is exact, its factors are off by an ulp or two; log n and the spread's term.
# Measured: below 1e-6.
PAGE_SCORE = 1e-4
# Outputs of estimate: weights are exp of such x, value means are exact codes. Measured: 1e-6.
ESTIMATE = 1e-5
# Codes of a query are of f32 values: so near to the middle, in codes, the op may round either way.
QUERY_TIE = 1e-4
# Votes: exp of such x, relative. Entries whose votes are closer to the K-th may change places.
VOTE_TIE = 1e-5
# How far the cohesion of pages (the sum over tokens of y . unit(mean y of its page)) may move where near-ties fall otherwise.
# Measured: none did.
COHESION = 5e-3
# Merging associates to 4 ulp of f32.
MERGE_ULP = 4 * 2.0**-23
# The elementary functions, as specified.
EXP_RELATIVE = 2.0**-20
TANH_ABSOLUTE = 2.0**-20


def out_tolerance(formats: tuple[str, ...], out_dtype: torch.dtype) -> float:
    if out_dtype == torch.bfloat16:
        return OUT_BF16_OUTPUT
    if out_dtype == torch.float16:
        return OUT_F16_OUTPUT
    if any(f.startswith("int") for f in formats):
        return OUT_QUANTIZED
    return OUT_F32 if formats == ("f32",) else OUT_16


def assert_close_rows(out: Tensor, ref: Tensor, tolerance: float) -> None:
    """Relative error in norm over the last dimension; the same places of NaN and inf; the worst row is shown."""
    assert out.shape == ref.shape
    out, ref = out.double(), ref.double()
    assert torch.equal(out.isfinite(), ref.isfinite()), "NaN or inf in other places"
    out, ref = out.nan_to_num(), ref.nan_to_num()
    error = (out - ref).norm(dim=-1) / ref.norm(dim=-1).clamp_min(1e-30)
    zero = ref.norm(dim=-1) == 0
    assert torch.all(out[zero] == 0), "an empty row is not zero"
    error = error.masked_fill(zero, 0)
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= tolerance, f"relative error {worst:.3g} > {tolerance:.3g} at {divmod_index(error)}"


def assert_close(out: Tensor, ref: Tensor, tolerance: float, floor: float = 1.0) -> None:
    """|out − ref| <= tolerance * max(|ref|, floor), the same infinities and NaNs; the worst element is shown."""
    assert out.shape == ref.shape
    out, ref = out.double(), ref.double()
    special = ~ref.isfinite()
    assert torch.equal(
        torch.where(special, out, 0.0).nan_to_num(7e300), torch.where(special, ref, 0.0).nan_to_num(7e300)
    )
    error = (out - ref).masked_fill(special, 0).abs() / ref.masked_fill(special, 0).abs().clamp_min(floor)
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= tolerance, f"error {worst:.3g} > {tolerance:.3g} at {divmod_index(error)}"


def divmod_index(t: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(t.argmax(), t.shape)) if t.dim() else ()
