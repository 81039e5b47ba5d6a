// How the walk of attend ends: sums become partials in the workspace, or results.
#pragma once

#include "cuda/attend_walk.cuh"

namespace kvstrata::cuda {

// What brings a sum that is relative to `own` to `all`. The same where nothing was read, or nothing but NaN, which stays.
__device__ inline float weight_of(float own, float all) { return own == all ? 1.0f : exp_(own - all); }

// The total of each row, in all of its lanes.
template <class S>
__device__ __forceinline__ void total_rows(Sums<S>& sums) {
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
#pragma unroll
        for (int step = 4; step < kWarp; step *= 2) sums.total[q] += __shfl_xor_sync(kAllLanes, sums.total[q], step);
    }
}

// visit(row of the warp, dim, p v) for dims 2 a and 2 a + 1 of each tile.
template <class S, class Visit>
__device__ __forceinline__ void each_sum(const Sums<S>& sums, int dim, Visit visit) {
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
            if (16 * t >= dim) break;
            const float* const x = sums.acc[q][t];
            visit(4 * q + lane_b(), 16 * t + 2 * lane_a(), x[0] + x[1]);
            visit(4 * q + lane_b(), 16 * t + 2 * lane_a() + 1, x[2] + x[3]);
        }
    }
}

// The sums of the warps of a block, as they lie in its rings, and their stats as one part. All threads call it.
template <class S>
__device__ inline void add_walkers(const float2 (*stats)[S::kWarpRows], const float* sums, int warp_floats,
                                   float* workspace, Partials partials, int part, int first_row) {
    const int stride = partials.stride, rows = min(S::kRows, partials.rows - first_row);
    for (int n = 0; n < rows; ++n) {
        float maximum = kNothing, total = 0.0f, weights[S::kWarps];
        for (int w = 0; w < S::kWarps; ++w) maximum = fmaxf(maximum, stats[w][n].x);
#pragma unroll
        for (int w = 0; w < S::kWarps; ++w) {
            weights[w] = weight_of(stats[w][n].x, maximum);
            total += weights[w] * stats[w][n].y;
        }
        if (threadIdx.x == 0) {
            float* const stat = workspace + partials.stat(part, first_row + n);
            stat[0] = maximum, stat[1] = total;
        }
        float* const to = workspace + partials.sums(part, first_row + n);
        for (int d = static_cast<int>(threadIdx.x); d < stride; d += S::kThreads) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < S::kWarps; ++w) sum = fmaf(weights[w], sums[w * warp_floats + n * stride + d], sum);
            to[d] = sum;
        }
    }
}

// Joins what the warps of a block have of the same rows, from the first on, as one part. All threads call it; the rings are free.
template <class S>
__device__ __forceinline__ void join_walkers(Sums<S>& sums, const AttendArgs& args, const Place<S>& place,
                                             float* workspace, const Partials& partials, int part, int first_row) {
    auto* const own = reinterpret_cast<float*>(place.ring);
    const float* const all = own - warp() * (args.ring_bytes / 4);
    total_rows(sums);
    each_sum(sums, partials.stride, [&](int n, int d, float x) { own[n * partials.stride + d] = x; });
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q)
        if (lane_a() == 0) place.block.stats[warp()][4 * q + lane_b()] = {sums.maximum[q], sums.total[q]};
    __syncthreads();
    add_walkers<S>(place.block.stats, all, args.ring_bytes / 4, workspace, partials, part, first_row);
}

// A part that holds nothing.
template <class S>
__device__ inline void write_nothing(float* workspace, const Partials& partials, int part, int first_row) {
    const int n = static_cast<int>(threadIdx.x);
    if (n >= S::kRows || first_row + n >= partials.rows) return;
    float* const stat = workspace + partials.stat(part, first_row + n);
    stat[0] = kNothing, stat[1] = 0.0f;
}

// A team's rows as a part. `first_row`: the warp's.
template <class S>
__device__ inline void write_partial(Sums<S>& sums, float* workspace, const Partials& partials, int part,
                                     int first_row) {
    total_rows(sums);
    each_sum(sums, partials.stride, [&](int n, int d, float x) {
        if (first_row + n < partials.rows) workspace[partials.sums(part, first_row + n) + d] = x;
    });
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        const int n = first_row + 4 * q + lane_b();
        if (lane_a() != 0 || n >= partials.rows) continue;
        float* const stat = workspace + partials.stat(part, n);
        stat[0] = sums.maximum[q], stat[1] = sums.total[q];
    }
}

// Rotates back a team's sums, which then go on over full pages. A warp has `room` for a quad of rows to itself; all lanes call it.
template <class S>
__device__ inline void rotate_back(Sums<S>& sums, const AttendArgs& args, float* room) {
    constexpr int kEach = S::kDims / kWarp;
    const int dim = dim_of<S>(args);
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
            if (16 * t >= dim) break;
            const float* const x = sums.acc[q][t];
            float* const to = room + lane_b() * dim + 16 * t + 2 * lane_a();
            to[0] = x[0] + x[1], to[1] = x[2] + x[3];
        }
        __syncwarp();
        for (int r = 0; r < 4; ++r) {
            float x[kEach];
#pragma unroll
            for (int s = 0; s < kEach; ++s) x[s] = s * kWarp + lane() < dim ? room[r * dim + s * kWarp + lane()] : 0.0f;
            rotate(x, args.rotation, true);
#pragma unroll
            for (int s = 0; s < kEach; ++s)
                if (s * kWarp + lane() < dim) room[r * dim + s * kWarp + lane()] = x[s];
        }
        __syncwarp();
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
            if (16 * t >= dim) break;
            const float* const from = room + lane_b() * dim + 16 * t + 2 * lane_a();
            float (&x)[4] = sums.acc[q][t];
            x[0] = from[0], x[1] = 0.0f, x[2] = from[1], x[3] = 0.0f;
        }
        __syncwarp();
    }
}

__device__ inline void store_as(DType type, void* to, int64_t i, float x) {
    if (type == DType::bf16) return store(static_cast<__nv_bfloat16*>(to) + i, x);
    if (type == DType::f16) return store(static_cast<__half*>(to) + i, x);
    store(static_cast<float*>(to) + i, x);
}

// The result of a query row whose parts are summed up: what its sums are multiplied with and divided by, and lse.
struct Result {
    float factor, divisor, lse;
};
__device__ inline Result finish_row(const ops::AttendRow& row, float maximum, float total, int head) {
    const float sink = row.sinks ? row.sinks[head] : -INFINITY;
    const float most = fmaxf(maximum, sink), weight = weight_of(maximum, most);
    const float all = total * weight + (sink == -INFINITY ? 0.0f : weight_of(sink, most));
    if (all == 0.0f) return {0.0f, 1.0f, -INFINITY};
    return {weight, all, most + logf(all)};
}

// Where query row n of a row has its results.
__device__ inline int64_t out_at(const ops::AttendRow& row, int group, int n) {
    const int t = n / group;
    return (row.tokens ? row.tokens[t] : t) * row.out_stride_t + n % group * row.out_stride_g;
}
__device__ inline void write_lse(const ops::AttendRow& row, int group, int n, float lse) {
    const int t = n / group;
    if (row.lse) row.lse[(row.tokens ? row.tokens[t] : t) * row.lse_stride_t + n % group * row.lse_stride_g] = lse;
}

// A team's rows as results. `first_row`: the warp's.
template <class S>
__device__ inline void write_results(Sums<S>& sums, const AttendArgs& args, const ops::AttendRow& row, int first_row) {
    total_rows(sums);
    const int rows = row.queries * args.group;
    Result results[S::kQuads];
    int64_t at[S::kQuads];
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        const int n = first_row + 4 * q + lane_b();
        if (n >= rows) continue;
        results[q] = finish_row(row, sums.maximum[q], sums.total[q], n % args.group);
        at[q] = out_at(row, args.group, n);
        if (lane_a() == 0) write_lse(row, args.group, n, results[q].lse);
    }
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        if (first_row + 4 * q + lane_b() >= rows) continue;
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int d = 16 * t + 2 * lane_a() + j;
                if (d >= dim_of<S>(args)) break;
                const float x = (sums.acc[q][t][2 * j] + sums.acc[q][t][2 * j + 1]) * results[q].factor;
                store_as(args.out_dtype, row.out, at[q] + d, x / results[q].divisor);
            }
        }
    }
}

}  // namespace kvstrata::cuda
