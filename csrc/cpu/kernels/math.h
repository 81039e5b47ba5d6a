// exp, tanh and the log of small numbers over V.
#pragma once

#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// Relative error about 1e-7 (required: 2^-20); 1 at 0 exactly; 0 below -87; inf above 88.8; NaN stays NaN.
KV_INLINE V exp(V x) {
    const V bound = min(set1(89.0f), max(set1(-88.0f), x));  // constants first: a NaN passes through
    const V n = round_even(mul(bound, set1(1.44269504088896341f)));
    V r = fma(n, set1(-0.693359375f), bound);  // ln 2 in two parts, the first exact in n's few bits
    r = fma(n, set1(2.12194440e-4f), r);
    V y = set1(1.9875691500e-4f);
    y = fma(y, r, set1(1.3981999507e-3f));
    y = fma(y, r, set1(8.3334519073e-3f));
    y = fma(y, r, set1(4.1665795894e-2f));
    y = fma(y, r, set1(1.6666665459e-1f));
    y = fma(y, r, set1(5.0000001201e-1f));
    y = add(fma(mul(r, r), y, r), set1(1.0f));
    return blend(less(x, set1(-87.0f)), zero(), scale2(y, n));
}

// Absolute error about 1e-7 (required: 2^-20); a polynomial near 0, where 1 - exp would cancel.
KV_INLINE V tanh(V x) {
    const V size = bits_and(x, 0x7FFFFFFFu);
    const V t = exp(mul(size, set1(-2.0f)));
    const V large = bits_or(div(sub(set1(1.0f), t), add(set1(1.0f), t)), bits_and(x, 0x80000000u));
    const V s = mul(x, x);
    V y = set1(-5.70498872745e-3f);
    y = fma(y, s, set1(2.06390887954e-2f));
    y = fma(y, s, set1(-5.37397155531e-2f));
    y = fma(y, s, set1(1.33314422036e-1f));
    y = fma(y, s, set1(-3.33332819422e-1f));
    const V small = fma(mul(y, s), x, x);
    return blend(less(size, set1(0.625f)), small, large);
}

// Of 1 <= x <= 16, absolute error about 1e-7; NaN stays NaN. Halved to within a factor sqrt 2 of 1, then by 2 atanh.
KV_INLINE V log_small(V x) {
    constexpr float kLog2 = 0.693147180559945f, kRoot = 1.41421356f;
    V n = zero();
    const auto halve = [&x, &n](float from, float factor, float by) {
        const uint16_t large = less(set1(from), x);
        x = blend(large, mul(x, set1(factor)), x);
        n = blend(large, add(n, set1(by)), n);
    };
    halve(4 * kRoot, 0.125f, 3 * kLog2);
    halve(2 * kRoot, 0.25f, 2 * kLog2);
    halve(kRoot, 0.5f, kLog2);
    const V z = div(sub(x, set1(1.0f)), add(x, set1(1.0f))), s = mul(z, z);  // |z| <= 0.172
    V y = set1(2.0f / 9);
    y = fma(y, s, set1(2.0f / 7));
    y = fma(y, s, set1(2.0f / 5));
    y = fma(y, s, set1(2.0f / 3));
    y = fma(y, s, set1(2.0f));
    return fma(y, z, n);
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
