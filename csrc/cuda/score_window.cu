// score_window on CUDA: log-sum-exps, then shares, reduced over each head's queries where they are made. The formula is in
// ops/score_window.h, the walk and what bounds it in window.cuh. Writes 4 bytes per slot and head.
#include "cuda/api.h"
#include "cuda/window_logits.cuh"
#include "cuda/window_moments.cuh"

namespace kvstrata::cuda {
namespace {

struct ScoreArgs {
    WindowRows batch;
    WindowCall call;
    ops::Spread spread;
    float weight;
    float* score;  // [R, G, M, 16]
    int64_t stride_r, stride_g;
};

// Shares of a pair of pages that a head's queries have.
struct HeadShares {
    float sums[kPair][2] = {};
    SlotMoments<false> moments;
};

// Adds tile j of a group, `queries` of whose 8 are there.
__device__ void add_tile(HeadShares& head, const Logits& z, int j, const float* lse, int queries, bool varies) {
    const int first = 2 * query_lane(), count = min(2, max(0, queries - first));
    const float lses[2] = {count > 0 ? lse[first] : 0.0f, count > 1 ? lse[first + 1] : 0.0f};
    const Weights w = weights_of(head.moments.count, static_cast<float>(count));
#pragma unroll
    for (int i = 0; i < 2 * kPair; ++i) {
        const int p = i / 2, s = i % 2;
        const float a = count > 0 ? share_of(z[p][j][2 * s], lses[0]) : 0.0f;
        const float b = count > 1 ? share_of(z[p][j][2 * s + 1], lses[1]) : 0.0f;
        head.sums[p][s] += a + b;
        if (varies && count) join(head.moments.of[p][s], moments_of<false>(a, b, count > 1), w);
    }
    head.moments.count += static_cast<float>(count);
}

// Scores of the pair's slots, to `out` [M, 16] of the head, from the unit's first entry on.
__device__ void put_scores(HeadShares& head, const PagePair& pages, float queries, ops::Spread spread, float weight,
                           float* out) {
    const bool varies = spread != ops::Spread::none;
    if (varies) head.moments.join_lanes();
#pragma unroll
    for (int p = 0; p < kPair; ++p) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            float score = __fdiv_rn(warp_sum<4>(head.sums[p][s]), queries);
            if (varies) {
                const float variance = queries > 1.0f ? __fdiv_rn(head.moments.of[p][s].m2, queries - 1.0f) : 0.0f;
                score += weight * (spread == ops::Spread::std ? __fsqrt_rn(variance) : variance);
            }
            if (query_lane() == 0 && pages.entry[p] >= 0) out[pages.entry[p] * kSlots + 2 * slot_lane() + s] = score;
        }
    }
}

// A block: one chunk of a row's entries under the queries of some heads. A warp has all of these for its pairs of pages.
__global__ void __launch_bounds__(kUnitThreads, kUnitsPerSm) score_units(const __grid_constant__ ScoreArgs args) {
    __shared__ UnitPages pages;
    const WindowCall& call = args.call;
    const ops::WindowRow& row = args.batch.rows[blockIdx.y];
    const int chunk = static_cast<int>(blockIdx.x) % call.chunks, entry = chunk * kUnitEntries;
    const int heads = heads_of_block(row.queries, call.group);
    const int first_head = static_cast<int>(blockIdx.x) / call.chunks * heads;
    const int end_head = min(call.group, first_head + heads);
    if (entry >= row.entries || first_head >= end_head) return;
    const int64_t r = args.batch.first + static_cast<int64_t>(blockIdx.y);
    float* const out = args.score + r * args.stride_r + entry * kSlots;
    if (warp() == 0) find_pages(pages, call.pools, row, call.head_dim, chunk, {}, call.window);
    __syncthreads();
    clear_others(pages, min(kUnitEntries, row.entries - entry), first_head, end_head, args.stride_g, out);
    const bool varies = args.spread != ops::Spread::none;
    reduce_heads<HeadShares>(
        pages, call, row, r, first_head, end_head,
        [&](HeadShares& head, const Logits& z, int j, const float* lse, int queries) {
            add_tile(head, z, j, lse, queries, varies);
        },
        [&](HeadShares& head, const PagePair& pair, int g) {
            put_scores(head, pair, static_cast<float>(row.queries), args.spread, args.weight, out + g * args.stride_g);
        });
}

int score(const ops::ScoreWindowParams& p, cudaStream_t stream) {
    Places places(p.workspace);
    const WindowCall call = lay_out_window(p, false, places);
    return in_batches(p.rows, p.n_rows, [&](const WindowRows& rows) {
        if (const int code = fill_operands("score_window", rows, p, call.operands, stream)) return code;
        const LseOut lse{p.lse, p.lse_stride_r, p.lse_stride_g};
        if (const int code = find_lse("score_window", rows, call, {}, true, lse, stream)) return code;
        const unsigned blocks = head_blocks(rows, p.group) * static_cast<unsigned>(call.chunks);
        if (!blocks) return 0;
        const ScoreArgs args{rows, call, p.spread, p.weight, p.score, p.score_stride_r, p.score_stride_g};
        return launch("score_window", score_units, dim3(blocks, static_cast<unsigned>(rows.count)), kUnitThreads, 0,
                      stream, args);
    });
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_score_window_workspace_bytes(const kvstrata::ops::ScoreWindowParams* params) {
    kvstrata::Places none(nullptr);
    kvstrata::cuda::lay_out_window(*params, false, none);
    return none.bytes();
}

int kvstrata_cuda_score_window(const kvstrata::ops::ScoreWindowParams* params, void* stream) {
    return kvstrata::cuda::score(*params, static_cast<cudaStream_t>(stream));
}
