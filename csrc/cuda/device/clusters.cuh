// What both clusterings of ops/cluster.h share: a row's live keys less their mean. And k-means' centroids.
#pragma once

#include "common/layout.h"
#include "cuda/device/ranks.cuh"
#include "cuda/device/rows.cuh"
#include "ops/cluster.h"

namespace kvstrata::cuda {
namespace {

constexpr int kListThreads = 512;
constexpr int kChunk = 64, kChunkThreads = 128;  // tokens that are summed together
constexpr int kCentroidThreads = 256;            // a warp per centroid
constexpr int kRanks = 4;                        // best pages that a token bids for, one after the other

// A row and what it works in: T tokens, D padded to 16, C pages of all T, W = C padded to 16.
struct ClusterWork {
    ops::ClusterRow row;
    int32_t* live;     // [1] n
    int32_t* tokens;   // [T] the n live ones
    float* parts;      // [ceil(T / kChunk), D] sums of keys
    float* y;          // [T, D]
    float* z;          // [C, D]
    float* s;          // [T, W]; cluster_greedy: [T] of the seed
    int32_t* nearest;  // [T]; tokens that wait for a seat, at the end
    int32_t* wanted;   // [kRanks, T] pages that tokens bid for
    float* priority;   // [kRanks, T]; cluster_greedy: [T] norms
    int32_t* room;     // [C] free seats
};

__device__ inline int pages_of(int tokens) { return (tokens + kSlots - 1) / kSlots; }
__device__ inline int padded_pages(int tokens) { return (pages_of(tokens) + 15) / 16 * 16; }

// Finds the live tokens, and leaves the rows where the other launches read them. A block per row.
__global__ void __launch_bounds__(kListThreads)
    list_live(const __grid_constant__ RowBatch<ClusterWork> batch, ClusterWork* works) {
    __shared__ int counts[kMaxWarps];
    const ClusterWork& work = batch.rows[blockIdx.x];
    const ops::ClusterRow& row = work.row;
    const int n = place_in_order(
        row.tokens, counts, [&](int i) { return !row.live || row.live[i]; },
        [&](int at, int i) { work.tokens[at] = i; });
    for (int i = static_cast<int>(threadIdx.x); i < row.tokens; i += kListThreads) row.page_of[i] = -1;
    for (int j = static_cast<int>(threadIdx.x); j < pages_of(n); j += kListThreads) work.room[j] = kSlots;
    if (threadIdx.x != 0) return;
    *work.live = n;
    if (row.page_count) *row.page_count = pages_of(n);
    works[blockIdx.x] = work;
}

// parts: the sum of each chunk's live keys, one after the other. A block per (chunk, row).
__global__ void __launch_bounds__(kChunkThreads) sum_keys(const ClusterWork* works, int dim) {
    const ClusterWork& work = works[blockIdx.y];
    const int n = *work.live, first = static_cast<int>(blockIdx.x) * kChunk, end = min(n, first + kChunk);
    if (first >= n) return;
    float* const part = work.parts + static_cast<int64_t>(blockIdx.x) * padded_dim(dim);
    for (int d = static_cast<int>(threadIdx.x); d < dim; d += kChunkThreads) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = first; i < end; ++i) sum += work.row.keys[static_cast<int64_t>(work.tokens[i]) * dim + d];
        part[d] = sum;
    }
}

// y of a chunk: its keys less the mean of all, 0 beyond dim. A block per (chunk, row).
__global__ void __launch_bounds__(kChunkThreads) centre_keys(const ClusterWork* works, int dim) {
    const ClusterWork& work = works[blockIdx.y];
    const int n = *work.live, first = static_cast<int>(blockIdx.x) * kChunk, end = min(n, first + kChunk);
    if (first >= n) return;
    const int wide = padded_dim(dim);
    for (int d = static_cast<int>(threadIdx.x); d < wide; d += kChunkThreads) {
        float mean = 0.0f;
#pragma unroll 8
        for (int c = 0; c < (n + kChunk - 1) / kChunk; ++c) {
            mean += d < dim ? work.parts[static_cast<int64_t>(c) * wide + d] : 0.0f;
        }
        mean = __fdiv_rn(mean, static_cast<float>(n));
#pragma unroll 8
        for (int i = first; i < end; ++i) {
            const float key = d < dim ? work.row.keys[static_cast<int64_t>(work.tokens[i]) * dim + d] : mean;
            work.y[static_cast<int64_t>(i) * wide + d] = key - mean;
        }
    }
}

// A vector across a warp: dims lane, lane + 32, ...
constexpr int kLaneDims = kMaxHeadDim / kWarp;
struct Vector {
    float x[kLaneDims];

    __device__ void add(const float* from, int dim) {
#pragma unroll
        for (int s = 0; s < kLaneDims; ++s) {
            if (s * kWarp + lane() < dim) x[s] += from[s * kWarp + lane()];
        }
    }
    // to = x / |x|; if there is no direction, x where `anyway`, else nothing.
    __device__ void put_unit(float* to, int dim, bool anyway) const {
        float square = 0.0f;
#pragma unroll
        for (int s = 0; s < kLaneDims; ++s) square = fmaf(x[s], x[s], square);
        const float length = __fsqrt_rn(warp_sum(square));
        const bool directed = length > 0.0f && isfinite(length);
        if (!directed && !anyway) return;
#pragma unroll
        for (int s = 0; s < kLaneDims; ++s) {
            if (s * kWarp + lane() < dim) to[s * kWarp + lane()] = directed ? __fdiv_rn(x[s], length) : x[s];
        }
    }
};

// The first centroids.
__global__ void __launch_bounds__(kCentroidThreads) seed_centroids(const ClusterWork* works, int dim) {
    const ClusterWork& work = works[blockIdx.y];
    const int n = *work.live, pages = pages_of(n), j = static_cast<int>(blockIdx.x) * warps() + warp();
    if (j >= pages) return;
    const int64_t at = (2 * static_cast<int64_t>(j) + 1) * n / (2 * static_cast<int64_t>(pages));
    Vector y{};
    y.add(work.y + at * dim, dim);
    y.put_unit(work.z + static_cast<int64_t>(j) * dim, dim, true);
}

// Each centroid to the direction of those that are nearest to it, summed in token order.
__global__ void __launch_bounds__(kCentroidThreads) move_centroids(const ClusterWork* works, int dim) {
    const ClusterWork& work = works[blockIdx.y];
    const int n = *work.live, j = static_cast<int>(blockIdx.x) * warps() + warp();
    if (j >= pages_of(n)) return;
    Vector sum{};
#pragma unroll 4
    for (int first = 0; first < n; first += kWarp) {
        const int i = first + lane();
        unsigned mine = __ballot_sync(kAllLanes, i < n && work.nearest[i] == j);
        for (; mine; mine &= mine - 1) {
            sum.add(work.y + static_cast<int64_t>(first + __ffs(static_cast<int>(mine)) - 1) * dim, dim);
        }
    }
    sum.put_unit(work.z + static_cast<int64_t>(j) * dim, dim, false);
}

}  // namespace
}  // namespace kvstrata::cuda
