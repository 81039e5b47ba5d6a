// Lanes, warps, and reductions over fixed trees: the same bits for the same values, whatever else runs. Blocks are
// one-dimensional and made of whole warps.
#pragma once

#include "cuda/device/launch.cuh"

namespace kvstrata::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int warp() { return static_cast<int>(threadIdx.x / kWarp); }
__device__ inline int warps() { return static_cast<int>(blockDim.x / kWarp); }

// The larger; NaN wins.
__device__ inline float larger(float a, float b) { return isnan(a) || a > b ? a : b; }

// Over all 32 lanes, in every lane. Every lane takes part. `Width` lanes (a power of two) form a group of their own.
template <int Width = kWarp>
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int step = Width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}
template <int Width = kWarp>
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int step = Width / 2; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

namespace {

// Over the block, in every thread; every thread calls it, and a barrier closes it: it may be called again at once.
template <class Fold>
__device__ inline float block_fold(float of_warp, float none, Fold fold) {
    __shared__ float parts[kWarp];
    if (lane() == 0) parts[warp()] = of_warp;
    __syncthreads();
    const float all = fold(lane() < warps() ? parts[lane()] : none);
    __syncthreads();
    return all;
}
__device__ inline float block_sum(float x) {
    return block_fold(warp_sum(x), 0.0f, [](float y) { return warp_sum(y); });
}
__device__ inline float block_max(float x) {
    return block_fold(warp_max(x), -INFINITY, [](float y) { return warp_max(y); });
}

}  // namespace
}  // namespace kvstrata::cuda
