// exp and tanh: the polynomials of csrc/cpu/kernels/math.h, operation by operation.
#pragma once

#include "cuda/device/launch.cuh"

namespace kvstrata::cuda {

// Relative error about 1e-7 (required: 2^-20); 1 at 0 exactly; 0 below -87; inf above 88.3; NaN stays NaN.
__device__ inline float exp_(float x) {
    const float low = x < -88.0f ? -88.0f : x, bound = low > 89.0f ? 89.0f : low;  // a NaN passes through
    // Added to 1.5 * 2^23, a number is rounded to the nearest whole one, which its low bits then hold.
    const float shifted = bound * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
    float r = fmaf(n, -0.693359375f, bound);  // ln 2 in two parts, the first exact in n's few bits
    r = fmaf(n, 2.12194440e-4f, r);
    float y = 1.9875691500e-4f;
    y = fmaf(y, r, 1.3981999507e-3f);
    y = fmaf(y, r, 8.3334519073e-3f);
    y = fmaf(y, r, 4.1665795894e-2f);
    y = fmaf(y, r, 1.6666665459e-1f);
    y = fmaf(y, r, 5.0000001201e-1f);
    y = fmaf(r * r, y, r) + 1.0f;
    const float power = __uint_as_float((__float_as_uint(shifted) + 127u) << 23);  // 2^n, n from -127 to 128
    return x < -87.0f ? 0.0f : y * power;
}

// Absolute error about 1e-7 (required: 2^-20); a polynomial near 0, where 1 - exp would cancel.
__device__ inline float tanh_(float x) {
    const float size = fabsf(x);
    if (size < 0.625f) {
        const float s = x * x;
        float y = -5.70498872745e-3f;
        y = fmaf(y, s, 2.06390887954e-2f);
        y = fmaf(y, s, -5.37397155531e-2f);
        y = fmaf(y, s, 1.33314422036e-1f);
        y = fmaf(y, s, -3.33332819422e-1f);
        return fmaf(y * s, x, x);
    }
    const float t = exp_(size * -2.0f);
    return copysignf(__fdiv_rn(1.0f - t, 1.0f + t), x);
}

}  // namespace kvstrata::cuda
