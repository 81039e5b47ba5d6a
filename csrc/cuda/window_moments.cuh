// Moments of the shares that a head's queries have of each slot, by one warp: a lane adds up its own queries' of each tile, two by
// two, then the four lanes of a slot are joined. Equal shares vary by exactly nothing.
#pragma once

#include "cuda/device/warp.cuh"
#include "cuda/window.cuh"

namespace kvstrata::cuda {

// Of some values: sums of powers of their distance from the mean. Fourth: m3 and m4 too.
template <bool Fourth>
struct Moments {
    float mean = 0.0f, m2 = 0.0f, m3 = 0.0f, m4 = 0.0f;
};

// Parts of n and more values as they enter the moments of both (Chan, Golub, LeVeque 1979; Pebay 2008).
struct Weights {
    float n;     // values of the first,
    float own;   // its share of all,
    float more;  // the other's
};
__device__ inline Weights weights_of(float n, float more) {
    const float share = more == 0.0f ? 0.0f : __fdiv_rn(more, n + more);
    return {n, 1.0f - share, share};
}

template <bool Fourth>
__device__ inline void join(Moments<Fourth>& x, const Moments<Fourth>& y, Weights w) {
    const float d = y.mean - x.mean, square = d * d;
    const float cross = w.n * w.more;  // n m / (n + m)
    if constexpr (Fourth) {
        const float spread = w.own * w.own - w.own * w.more + w.more * w.more;
        x.m4 += y.m4 + square * square * cross * spread +
                6.0f * square * (w.own * w.own * y.m2 + w.more * w.more * x.m2) +
                4.0f * d * (w.own * y.m3 - w.more * x.m3);
        x.m3 += y.m3 + square * d * cross * (w.own - w.more) + 3.0f * d * (w.own * y.m2 - w.more * x.m2);
    }
    x.m2 += y.m2 + square * cross;
    x.mean = fmaf(d, w.more, x.mean);
}

// Of one value, or of two.
template <bool Fourth>
__device__ inline Moments<Fourth> moments_of(float a, float b, bool two) {
    if (!two) return {a};
    const float half = 0.5f * (b - a), square = 2.0f * half * half;
    return {0.5f * (a + b), square, 0.0f, Fourth ? 0.5f * square * square : 0.0f};
}

// Values of a lane, and moments of each of its slots [page][slot].
template <bool Fourth>
struct SlotMoments {
    float count = 0.0f;
    Moments<Fourth> of[kPair][2];

    // All lanes: those of a slot together.
    __device__ void join_lanes() {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            const float more = __shfl_xor_sync(kAllLanes, count, step);
            const Weights w = weights_of(count, more);
#pragma unroll
            for (int i = 0; i < 2 * kPair; ++i) {
                Moments<Fourth>&x = of[i / 2][i % 2], y;
                y.mean = __shfl_xor_sync(kAllLanes, x.mean, step);
                y.m2 = __shfl_xor_sync(kAllLanes, x.m2, step);
                if constexpr (Fourth) {
                    y.m3 = __shfl_xor_sync(kAllLanes, x.m3, step);
                    y.m4 = __shfl_xor_sync(kAllLanes, x.m4, step);
                }
                join(x, y, w);
            }
            count += more;
        }
    }
};

}  // namespace kvstrata::cuda
