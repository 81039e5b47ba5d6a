// measure on CUDA: log-sum-exps (sound: over the past alone), then each head's statistics over the past, unit by unit, added up in
// f64. The formulas are in ops/measure.h, the walk and what bounds it in window.cuh.
#include "cuda/api.h"
#include "cuda/window_logits.cuh"
#include "cuda/window_moments.cuh"

namespace kvstrata::cuda {
namespace {

// What a unit adds up for a head. sound: p log p over slots and queries; over slots, of shares times a power of two: mean square,
// variance, m4 / m2. code: A log(A + 1e-10), variance, kurtosis.
constexpr int kSums = 4;
constexpr int kFinishWarps = 4;

struct MeasureArgs {
    WindowRows batch;
    WindowCall call;
    Past past;
    bool sound;
    float* sums;   // [R, chunks, G, kSums]
    float* stats;  // [R, G, 3]

    __device__ float* sums_of(int64_t row, int chunk, int head) const {
        return sums + ((row * call.chunks + chunk) * call.group + head) * kSums;
    }
};

// Shares of a pair of pages that a head's queries have.
struct HeadStats {
    float entropy = 0.0f;
    float squares[kPair][2] = {};
    SlotMoments<true> moments;
};

__device__ float information(bool sound, float share, float z, float lse) {
    if (share == 0.0f) return 0.0f;
    return share * (sound ? z - lse : logf(share + 1e-10f));
}

// Adds tile j of a group, `queries` of whose 8 are there; shares times `factor`.
__device__ void add_tile(HeadStats& head, const Logits& z, int j, const float* lse, int queries, bool sound,
                         float factor) {
    const int first = 2 * query_lane(), count = min(2, max(0, queries - first));
    const float lses[2] = {count > 0 ? lse[first] : 0.0f, count > 1 ? lse[first + 1] : 0.0f};
    const Weights w = weights_of(head.moments.count, static_cast<float>(count));
#pragma unroll
    for (int i = 0; i < 2 * kPair; ++i) {
        const int p = i / 2, s = i % 2;
        float x[2] = {};
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (c >= count) continue;
            const float share = share_of(z[p][j][2 * s + c], lses[c]);
            head.entropy += information(sound, share, z[p][j][2 * s + c], lses[c]);
            x[c] = share * factor;
            head.squares[p][s] = fmaf(x[c], x[c], head.squares[p][s]);
        }
        if (count) join(head.moments.of[p][s], moments_of<true>(x[0], x[1], count > 1), w);
    }
    head.moments.count += static_cast<float>(count);
}

// Adds the pair's sums to those of the warp. Each lane has one of its four slots.
__device__ void add_sums(HeadStats& head, float queries, bool sound, float* sums) {
    head.moments.join_lanes();
    float squares = 0.0f;
    Moments<true> mine;
#pragma unroll
    for (int i = 0; i < 2 * kPair; ++i) {
        const float all = warp_sum<4>(head.squares[i / 2][i % 2]);
        if (query_lane() == i) squares = all, mine = head.moments.of[i / 2][i % 2];
    }
    const float second = __fdiv_rn(mine.m2, queries), fourth = __fdiv_rn(mine.m4, queries);
    float terms[kSums] = {head.entropy};
    if (sound) {
        terms[1] = __fdiv_rn(squares, queries);
        terms[2] = second;
        terms[3] = second != 0.0f ? __fdiv_rn(fourth, second) : 0.0f;
    } else {
        const float bounded = second > 1e-8f || isnan(second) ? second : 1e-8f;
        terms[1] = queries > 1.0f ? __fdiv_rn(mine.m2, queries - 1.0f) : 0.0f;
        terms[2] = __fdiv_rn(fourth, bounded * bounded);
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
        const float all = warp_sum(terms[k]);
        if (lane() == 0) sums[k] += all;
    }
}

// A power of two that is not below the row's slots: shares times it are about 1, and their fourth powers numbers.
__device__ float factor_of(int entries) {
    return __uint_as_float(static_cast<uint32_t>(127 + 32 - __clz(entries * kSlots)) << 23);
}

// A block: one chunk of a row's entries under the queries of some heads. A warp has all of these for its pairs of pages.
__global__ void __launch_bounds__(kUnitThreads, kUnitsPerSm) sum_stats(const __grid_constant__ MeasureArgs args) {
    __shared__ UnitPages pages;
    __shared__ float sums[kUnitWarps][kBlockTiles][kSums];  // of the block's heads
    const WindowCall& call = args.call;
    const ops::WindowRow& row = args.batch.rows[blockIdx.y];
    const int chunk = static_cast<int>(blockIdx.x) % call.chunks;
    const int heads = heads_of_block(row.queries, call.group);
    const int first_head = static_cast<int>(blockIdx.x) / call.chunks * heads;
    const int end_head = min(call.group, first_head + heads), thread = static_cast<int>(threadIdx.x);
    if (chunk * kUnitEntries >= row.entries || first_head >= end_head) return;
    const int64_t r = args.batch.first + static_cast<int64_t>(blockIdx.y);
    if (warp() == 0) find_pages(pages, call.pools, row, call.head_dim, chunk, args.past, call.window);
    for (int i = lane(); i < kBlockTiles * kSums; i += kWarp) sums[warp()][i / kSums][i % kSums] = 0.0f;
    __syncthreads();
    if (first_head == 0 && thread == 0) call.past[r * call.chunks + chunk] = pages.slots;
    const float queries = static_cast<float>(row.queries), factor = args.sound ? factor_of(row.entries) : 1.0f;
    reduce_heads<HeadStats>(
        pages, call, row, r, first_head, end_head,
        [&](HeadStats& head, const Logits& z, int j, const float* lse, int n) {
            add_tile(head, z, j, lse, n, args.sound, factor);
        },
        [&](HeadStats& head, const PagePair&, int g) {
            add_sums(head, queries, args.sound, sums[warp()][g - first_head]);
        });
    __syncthreads();
    if (thread >= (end_head - first_head) * kSums) return;
    float total = 0.0f;
    for (int w = 0; w < kUnitWarps; ++w) total += sums[w][thread / kSums][thread % kSums];
    args.sums_of(r, chunk, first_head + thread / kSums)[thread % kSums] = total;
}

__device__ double warp_sum(double x) {
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

__device__ void put_sound(const double (&sums)[kSums], double n, double queries, float* out) {
    const double entropy = -sums[0] / queries, kappa = sums[3] / sums[2];
    const double most = queries - 2 + 1 / (queries - 1);
    out[0] = n < 2 ? 0.0f : static_cast<float>(entropy / log(n));
    out[1] = sums[1] == 0 ? 0.0f : static_cast<float>(sums[2] / sums[1]);
    out[2] = sums[2] == 0 || queries < 3 ? 0.0f : static_cast<float>((kappa - 1) / (most - 1));
}

// A warp per head: lane l has units l, l + 32, ..., so that bits do not depend on how many follow.
__global__ void __launch_bounds__(kFinishWarps* kWarp) finish(const __grid_constant__ MeasureArgs args) {
    const WindowCall& call = args.call;
    const ops::WindowRow& row = args.batch.rows[blockIdx.y];
    const int g = static_cast<int>(blockIdx.x) * kFinishWarps + warp();
    if (g >= call.group) return;
    const int64_t r = args.batch.first + static_cast<int64_t>(blockIdx.y);
    double sums[kSums] = {};
    int n = 0;
    for (int u = lane(); row.queries && u < chunks_of(row.entries); u += kWarp) {
        for (int k = 0; k < kSums; ++k) sums[k] += args.sums_of(r, u, g)[k];
        n += call.past[r * call.chunks + u];
    }
    for (double& sum : sums) sum = warp_sum(sum);
    n = __reduce_add_sync(kAllLanes, n);
    float* const out = args.stats + (r * call.group + g) * 3;
    if (lane() != 0) return;
    if (n == 0) {
        out[0] = out[1] = out[2] = 0.0f;
    } else if (args.sound) {
        put_sound(sums, n, row.queries, out);
    } else {
        out[0] = static_cast<float>(-sums[0]), out[1] = static_cast<float>(sums[1]);
        out[2] = static_cast<float>(sums[2]);
    }
}

WindowCall lay_out(const ops::MeasureParams& p, Places& places, float*& sums) {
    const WindowCall call = lay_out_window(p, true, places);
    sums = places.take<float>(static_cast<int64_t>(p.n_rows) * call.chunks * p.group * kSums);
    return call;
}

int measure(const ops::MeasureParams& p, cudaStream_t stream) {
    const bool sound = p.which == ops::Stats::sound;
    Places places(p.workspace);
    float* sums = nullptr;
    const WindowCall call = lay_out(p, places, sums);
    const Past past{true, sound ? p.skip : INT32_MIN};
    return in_batches(p.rows, p.n_rows, [&](const WindowRows& rows) {
        const auto count = static_cast<unsigned>(rows.count);
        const MeasureArgs args{rows, call, past, sound, sums, p.stats};
        if (const int code = fill_operands("measure", rows, p, call.operands, stream)) return code;
        // a sink logit has no part in shares of the past
        if (const int code = find_lse("measure", rows, call, sound ? past : Past{}, !sound, {}, stream)) return code;
        const unsigned blocks = call.queries ? head_blocks(rows, p.group) * static_cast<unsigned>(call.chunks) : 0;
        if (blocks) {
            const int code = launch("measure", sum_stats, dim3(blocks, count), kUnitThreads, 0, stream, args);
            if (code) return code;
        }
        return launch("measure", finish, dim3(blocks_for(p.group, kFinishWarps), count), kFinishWarps * kWarp, 0,
                      stream, args);
    });
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_measure_workspace_bytes(const kvstrata::ops::MeasureParams* params) {
    kvstrata::Places none(nullptr);
    float* unused = nullptr;
    kvstrata::cuda::lay_out(*params, none, unused);
    return none.bytes();
}

int kvstrata_cuda_measure(const kvstrata::ops::MeasureParams* params, void* stream) {
    return kvstrata::cuda::measure(*params, static_cast<cudaStream_t>(stream));
}
