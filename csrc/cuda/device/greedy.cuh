// cluster_greedy of ops/cluster.h: one page after the other, by one block per row.
#pragma once

#include "cuda/device/clusters.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kGreedyThreads = 512;

// y_i . y_j, in every lane.
__device__ inline float product(const ClusterWork& work, int dim, int i, int j) {
    const float *const a = work.y + static_cast<int64_t>(i) * dim, *const b = work.y + static_cast<int64_t>(j) * dim;
    float sum = 0.0f;
    for (int d = lane(); d < dim; d += kWarp) sum = fmaf(a[d], b[d], sum);
    return warp_sum(sum);
}

// Norms and products that are no numbers: such a key lands somewhere.
__global__ void __launch_bounds__(kGreedyThreads) fill_pages(const ClusterWork* works, int dim) {
    __shared__ RankRoom room;
    const ClusterWork& work = works[blockIdx.x];
    const int n = *work.live;
    float* const norms = work.priority;
    for (int i = warp(); i < n; i += warps()) {
        const float norm = product(work, dim, i, i);
        if (lane() == 0) norms[i] = isnan(norm) ? 0.0f : norm;
    }
    __syncthreads();
    // Larger for a larger number, ties the lower token; 0 for those that have a page.
    const auto key = [&](float x, int i) {
        if (norms[i] < 0.0f) return uint64_t{0};
        return static_cast<uint64_t>(ordered(isnan(x) ? -INFINITY : x)) << 32 | ~static_cast<uint32_t>(i);
    };
    for (int page = 0, left = n; left > 0; ++page, left -= min(left, kSlots)) {
        const uint64_t first = nth_largest(n, 1, room, [&](int i) { return key(norms[i], i); }).key;
        place_in_order(
            n, room.warps, [&](int i) { return key(norms[i], i) >= first; }, [&](int, int i) { room.digit = i; });
        const int seed = room.digit;
        for (int i = warp(); i < n; i += warps()) {
            if (norms[i] < 0.0f) continue;
            const float s = product(work, dim, i, seed);
            if (lane() == 0) work.s[i] = s;
        }
        __syncthreads();
        const int taken = min(left, kSlots);
        const auto of_seed = [&](int i) { return i == seed ? ~uint64_t{0} : key(work.s[i], i); };
        const uint64_t least = taken == left ? 1 : nth_largest(n, taken, room, of_seed).key;
        for (int i = static_cast<int>(threadIdx.x); i < n; i += kGreedyThreads) {
            if (of_seed(i) < least) continue;
            work.row.page_of[work.tokens[i]] = page;
            norms[i] = -INFINITY;
        }
        __syncthreads();
    }
}

}  // namespace
}  // namespace kvstrata::cuda
