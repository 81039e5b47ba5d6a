// exp by the device's own power of two, for numbers that are not far above 0.
#pragma once

#include "cuda/device/launch.cuh"

namespace kvstrata::cuda {

// 2^x, relative error 2^-22; results below 2^-126 are 0.
__device__ inline float power_of_two(float x) {
#if defined(KVSTRATA_EMULATE)
    return x < -126.0f ? 0.0f : exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Relative error below 2^-21 (required: 2^-20); 0 from -87.4 down; NaN stays NaN. x log2 e is rounded, and its rest put back.
__device__ inline float exp_fast(float x) {
    constexpr float kLog2E = 1.44269504f, kRest = 1.92596299e-8f, kLog2 = 0.693147181f;
    const float bound = x < -88.0f ? -88.0f : x;  // a NaN passes through
    const float t = bound * kLog2E, rest = fmaf(bound, kRest, fmaf(bound, kLog2E, -t)), y = power_of_two(t);
    return fmaf(y, rest * kLog2, y);
}

}  // namespace kvstrata::cuda
