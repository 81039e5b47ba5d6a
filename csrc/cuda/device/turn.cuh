// R of a vector in shared memory, by one warp: rotate.cuh on its registers.
#pragma once

#include "cuda/device/rotate.cuh"

namespace kvstrata::cuda {

template <int N>
__device__ void turn_registers(float* x, const Rotation& r, bool inverse) {
    float v[N];
#pragma unroll
    for (int s = 0; s < N; ++s) v[s] = s * kWarp + lane() < r.dim ? x[s * kWarp + lane()] : 0.0f;
    rotate(v, r, inverse);
#pragma unroll
    for (int s = 0; s < N; ++s) {
        if (s * kWarp + lane() < r.dim) x[s * kWarp + lane()] = v[s];
    }
}

// x [D] = R x, or back. Lane l reads and writes dims l, 32 + l, ...; what other lanes wrote needs a barrier before. A function
// of its own: unrolled as it is, it would be most of the code wherever it is called.
__device__ __attribute__((noinline)) inline void turn(float* x, const Rotation& r, bool inverse) {
    if (r.dim <= 4 * kWarp) return turn_registers<4>(x, r, inverse);
    turn_registers<kMaxHeadDim / kWarp>(x, r, inverse);
}

}  // namespace kvstrata::cuda
