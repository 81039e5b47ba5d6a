// Products of keys with centroids, in f32: the nearest centroid of each key, or all products.
#pragma once

#include "cuda/device/clusters.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kTile = 64;               // keys, and centroids, of a block at a time
constexpr int kTileDims = 16;           // of them at a time
constexpr int kTileStride = kTile + 4;  // floats: rows of shared memory, 16-byte aligned
constexpr int kEach = 4;                // keys, and centroids, of a thread
constexpr int kTileThreads = kTile / kEach * (kTile / kEach);

// kTileDims dims, from `d` on, of kTile rows from `first` on of [count, dim], 0 beyond; a thread has four dims of one row.
struct TileLoad {
    float4 x;

    __device__ TileLoad(const float* rows, int count, int first, int dim, int d) : x(make_float4(0, 0, 0, 0)) {
        const int row = first + row_of();
        if (row < count) x = *reinterpret_cast<const float4*>(rows + static_cast<int64_t>(row) * dim + d + dim_of());
    }
    __device__ void put(float (&tile)[kTileDims][kTileStride]) const {
        tile[dim_of()][row_of()] = x.x;
        tile[dim_of() + 1][row_of()] = x.y;
        tile[dim_of() + 2][row_of()] = x.z;
        tile[dim_of() + 3][row_of()] = x.w;
    }
    __device__ static int row_of() { return static_cast<int>(threadIdx.x) / 4; }
    __device__ static int dim_of() { return static_cast<int>(threadIdx.x) % 4 * 4; }
};
static_assert(kTileThreads == kTile * kTileDims / 4);

__device__ inline void load_four(const float* from, float (&x)[kEach]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

// Of tile `first` of the keys and all centroids: nearest, ties the lower centroid, or with Keep s. A block per (tile, row).
template <bool Keep>
__global__ void __launch_bounds__(kTileThreads, 2) compare_keys(const ClusterWork* works, int dim) {
    __shared__ __align__(16) float keys[kTileDims][kTileStride];
    __shared__ __align__(16) float centroids[kTileDims][kTileStride];
    const ClusterWork& work = works[blockIdx.y];
    const int n = *work.live, pages = pages_of(n), wide = padded_pages(n);
    const int first = static_cast<int>(blockIdx.x) * kTile;
    if (first >= n) return;
    const int column = static_cast<int>(threadIdx.x) % (kTile / kEach) * kEach;
    const int row = static_cast<int>(threadIdx.x) / (kTile / kEach) * kEach;
    float most[kEach] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    int best[kEach] = {};
    for (int j = 0; j < pages; j += kTile) {
        float sums[kEach][kEach] = {};
        TileLoad next_keys(work.y, n, first, dim, 0), next_centroids(work.z, pages, j, dim, 0);
        for (int d = 0; d < dim; d += kTileDims) {
            __syncthreads();
            next_keys.put(keys);
            next_centroids.put(centroids);
            __syncthreads();
            if (d + kTileDims < dim) {
                next_keys = TileLoad(work.y, n, first, dim, d + kTileDims);
                next_centroids = TileLoad(work.z, pages, j, dim, d + kTileDims);
            }
#pragma unroll
            for (int k = 0; k < kTileDims; ++k) {
                float a[kEach], b[kEach];
                load_four(&keys[k][row], a);
                load_four(&centroids[k][column], b);
#pragma unroll
                for (int r = 0; r < kEach; ++r) {
#pragma unroll
                    for (int c = 0; c < kEach; ++c) sums[r][c] = fmaf(a[r], b[c], sums[r][c]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
#pragma unroll
            for (int c = 0; c < kEach; ++c) {
                const int at = j + column + c;
                if constexpr (Keep) {
                    const int64_t token = first + row + r;
                    if (token < n && at < wide) work.s[token * wide + at] = at < pages ? sums[r][c] : -INFINITY;
                } else if (at < pages && sums[r][c] > most[r]) {
                    most[r] = sums[r][c], best[r] = at;
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kEach && !Keep; ++r) {
#pragma unroll
        for (int step = kTile / kEach / 2; step > 0; step /= 2) {  // the lanes of the same keys
            const float other = __shfl_xor_sync(kAllLanes, most[r], step);
            const int at = __shfl_xor_sync(kAllLanes, best[r], step);
            if (other > most[r] || (other == most[r] && at < best[r])) most[r] = other, best[r] = at;
        }
        if (column == 0 && first + row + r < n) work.nearest[first + row + r] = best[r];
    }
}

}  // namespace
}  // namespace kvstrata::cuda
