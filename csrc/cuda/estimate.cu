// estimate on CUDA: three launches. The formulas are in ops/estimate.h.
//
// list_zone: a block per row lists the entries that take part. estimate_spans: a block per (row, 64 of them): the blocks of
// summaries that they lie in are scored whole, as by select, then their value means are summed by weight, four heads at a time.
// It reads 2 D + 20 bytes a page, and the means of its neighbours: bound by memory. merge_spans: a warp per head joins the spans
// in order and turns the result back.
#include "common/places.h"
#include "cuda/api.h"
#include "cuda/device/page_scan.cuh"
#include "cuda/device/ranks.cuh"
#include "cuda/device/rows.cuh"
#include "ops/estimate.h"

namespace kvstrata::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSpan = 64;  // entries of the zone
constexpr int kHeads = 4;  // that visit the value means together
constexpr int kNoEntry = 0x7FFFFFFF;
constexpr int kRegisters = kMaxHeadDim / kWarp;

struct EstimateWork {
    ops::EstimateRow row;
    int32_t* count;    // [1] entries that take part
    int32_t* entries;  // [E] they
    float* sums;       // [spans, G, D] values by weight, relative to the span's largest x
    float* most;       // [spans, G] that x
    float* total;      // [spans, G] sums of weights
    int32_t* bad;      // [spans] the first entry that cannot be ranked, or kNoEntry
};

struct EstimateArgs {
    RowBatch<EstimateWork> batch;
    ScanSettings scan;
};

__host__ __device__ constexpr int spans_of(int entries) { return (entries + kSpan - 1) / kSpan; }

// Those of visible slots whose summary was made from the same ones. A block per row.
__global__ void __launch_bounds__(kThreads) list_zone(const __grid_constant__ EstimateArgs args) {
    __shared__ int room[kMaxWarps];
    const EstimateWork& work = args.batch.rows[blockIdx.x];
    const ops::EstimateRow& row = work.row;
    const int64_t at_slots = value_slots_offset(args.scan.head_dim);
    const int count = place_in_order(
        row.zone_count, room,
        [&](int i) {
            const int e = row.zone[i];
            if (e < 0 || row.visible[e] == 0) return false;
            return reinterpret_cast<const uint32_t*>(row.blocks[e / kSlots] + at_slots)[e % kSlots] == row.visible[e];
        },
        [&](int at, int i) { work.entries[at] = row.zone[i]; });
    if (threadIdx.x == 0) *work.count = count;
}

// Weights [G, kSpan] of a span's entries, then sums of the threads' value means.
inline size_t span_bytes(const ScanSettings& s) {
    return scan_bytes(s) + 4 * static_cast<size_t>(s.group * kSpan + kThreads * 4 * kHeads);
}

class Span {
  public:
    __device__ Span(const ScanSettings& settings, const EstimateWork& work, int32_t* starts, int* room)
        : s_(settings),
          row_(work.row),
          w_(work),
          span_(static_cast<int>(blockIdx.x)),
          weights_(reinterpret_cast<float*>(dynamic_shared() + scan_bytes(settings))),
          parts_(weights_ + settings.group * kSpan),
          entries_(work.entries + static_cast<int64_t>(span_) * kSpan),
          count_(min(kSpan, *work.count - span_ * kSpan)),
          starts_(starts),
          room_(room) {}

    __device__ void run() {
        const PageScan scan(s_, row_.q, row_.q_stride_g);
        const int blocks = place_in_order(
            count_, room_, [&](int i) { return i == 0 || entries_[i] / kSlots != entries_[i - 1] / kSlots; },
            [&](int at, int i) { starts_[at] = i; });
        int bad = kNoEntry;
        for (int b = warp(); b < blocks; b += warps()) {
            bad = min(bad, score(scan, starts_[b], b + 1 < blocks ? starts_[b + 1] : count_));
        }
        if (lane() == 0) room_[warp()] = bad;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 0; w < warps(); ++w) bad = min(bad, room_[w]);
            w_.bad[span_] = bad;
        }
        for (int g = warp(); g < s_.group; g += warps()) weigh(g);
        __syncthreads();
        for (int g = 0; g < s_.group; g += kHeads) add_values(g);
    }

  private:
    // x of entries first..end - 1, which lie in one block. The first that cannot be ranked, or kNoEntry.
    __device__ int score(const PageScan& scan, int first, int end) {
        const int block = entries_[first] / kSlots;
        const unsigned char* const at = row_.blocks[block];
        const bool mine = first + lane() < end;
        const unsigned pages = __reduce_or_sync(kAllLanes, mine ? 1u << entries_[first + lane()] % kSlots : 0u);
        const auto mask_of = [&](int page) {
            return pages >> page & 1 ? uint32_t{row_.visible[block * kSlots + page]} : 0u;
        };
        const uint32_t bad = scan.score(at, mask_of, [&](int g, int page, const PageScan::Pair& pair) {
            for (int i = 0; i < 2; ++i) {
                if (!(pages >> (page + i) & 1)) continue;
                weights_[g * kSpan + first + __popc(pages & ((1u << (page + i)) - 1))] = pair.x[i];
            }
        });
        return bad ? block * kSlots + __ffs(static_cast<int>(bad)) - 1 : kNoEntry;
    }

    // A head's x become its weights, times the scales of the value means. A warp.
    __device__ void weigh(int g) {
        float* const x = weights_ + g * kSpan;
        float most = -INFINITY, total = 0.0f;
        for (int i = lane(); i < count_; i += kWarp) most = larger(most, x[i]);
        most = warp_max(most);
        for (int i = lane(); i < count_; i += kWarp) {
            const float part = exp_(x[i] - most);
            total += part;
            x[i] = part * scale_of(entries_[i]);
        }
        total = warp_sum(total);
        if (lane() == 0) w_.most[span_ * s_.group + g] = most, w_.total[span_ * s_.group + g] = total;
    }
    __device__ float scale_of(int e) const {
        const unsigned char* const scales = row_.blocks[e / kSlots] + value_scales_offset(s_.head_dim);
        return reinterpret_cast<const float*>(scales)[e % kSlots];
    }

    // Heads first..first + 3. A thread has four dims of every so-many-th entry; then they are added in their order.
    __device__ void add_values(int first) {
        const int thread = static_cast<int>(threadIdx.x), words = s_.head_dim / 4, slices = kThreads / words;
        const int word = thread % words, slice = thread / words;
        float sums[kHeads][4] = {};
#pragma unroll 4
        for (int i = slice; slice < slices && i < count_; i += slices) {
            const int e = entries_[i];
            const unsigned char* const values = row_.blocks[e / kSlots] + values_offset(s_.head_dim);
            const uint32_t codes = reinterpret_cast<const uint32_t*>(values)[e % kSlots * words + word];
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                const float weight = weights_[min(first + h, s_.group - 1) * kSpan + i];
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const auto level = static_cast<float>(static_cast<int>(codes >> 8 * c & 255u) - kZeroCode);
                    sums[h][c] = fmaf(weight, level, sums[h][c]);
                }
            }
        }
        for (int h = 0; h < kHeads && slice < slices; ++h) {
            for (int c = 0; c < 4; ++c) parts_[(slice * kHeads + h) * s_.head_dim + 4 * word + c] = sums[h][c];
        }
        __syncthreads();
        const int heads = min(kHeads, s_.group - first);
        float* const out = w_.sums + (static_cast<int64_t>(span_) * s_.group + first) * s_.head_dim;
        for (int i = thread; i < heads * s_.head_dim; i += kThreads) {
            float sum = 0.0f;
            for (int k = 0; k < slices; ++k) sum += parts_[k * kHeads * s_.head_dim + i];
            out[i] = sum;
        }
        __syncthreads();
    }

    const ScanSettings& s_;
    const ops::EstimateRow& row_;
    const EstimateWork& w_;
    const int span_;
    float *weights_, *parts_;
    const int32_t* const entries_;
    const int count_;  // of the span
    int32_t* starts_;
    int* room_;
};

__global__ void __launch_bounds__(kThreads) estimate_spans(const __grid_constant__ EstimateArgs args) {
    __shared__ int32_t starts[kSpan];
    __shared__ int room[kMaxWarps];
    const EstimateWork& work = args.batch.rows[blockIdx.y];
    if (static_cast<int>(blockIdx.x) >= spans_of(*work.count)) return;
    Span(args.scan, work, starts, room).run();
}

__global__ void __launch_bounds__(kThreads) merge_spans(const __grid_constant__ EstimateArgs args) {
    const EstimateWork& work = args.batch.rows[blockIdx.x];
    const int spans = spans_of(*work.count), group = args.scan.group, dim = args.scan.head_dim;
    if (warp() == 0) {
        int bad = kNoEntry;
        for (int s = lane(); s < spans; s += kWarp) bad = min(bad, work.bad[s]);
        bad = __reduce_min_sync(kAllLanes, bad);
        if (lane() == 0 && work.row.unranked) *work.row.unranked = bad == kNoEntry ? -1 : bad;
    }
    for (int g = warp(); g < group; g += warps()) {
        float most = -INFINITY, total = 0.0f, sums[kRegisters] = {};
        for (int s = 0; s < spans; ++s) most = larger(most, work.most[s * group + g]);
        for (int s = 0; s < spans; ++s) {
            const float by = exp_(work.most[s * group + g] - most);
            const float* const from = work.sums + (static_cast<int64_t>(s) * group + g) * dim;
            total = fmaf(by, work.total[s * group + g], total);
#pragma unroll
            for (int k = 0; k < kRegisters; ++k) {
                const int d = k * kWarp + lane();
                if (d < dim) sums[k] = fmaf(by, from[d], sums[k]);
            }
        }
        const bool empty = most == -INFINITY;
#pragma unroll
        for (int k = 0; k < kRegisters; ++k) sums[k] = empty ? 0.0f : __fdiv_rn(sums[k], total);
        rotate(sums, args.scan.rotation, true);
        float* const out = work.row.out + static_cast<int64_t>(g) * dim;
#pragma unroll
        for (int k = 0; k < kRegisters; ++k) {
            const int d = k * kWarp + lane();
            if (d < dim) out[d] = sums[k];
        }
        if (lane() == 0) work.row.lse[g] = empty ? -INFINITY : most + logf(total);
    }
}

int64_t longest(const ops::EstimateParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most = most > p.rows[r].zone_count ? most : p.rows[r].zone_count;
    return most;
}

int64_t place_work(EstimateWork& work, const ops::EstimateParams& p, int64_t spans, void* base) {
    Places places(base);
    work.count = places.take<int32_t>(1);
    work.entries = places.take<int32_t>(spans * kSpan);
    work.sums = places.take<float>(spans * p.group * p.head_dim);
    work.most = places.take<float>(spans * p.group);
    work.total = places.take<float>(spans * p.group);
    work.bad = places.take<int32_t>(spans);
    return places.bytes();
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_estimate_workspace_bytes(const kvstrata::ops::EstimateParams* params) {
    using namespace kvstrata::cuda;
    EstimateWork work{};
    return place_work(work, *params, spans_of(static_cast<int>(longest(*params))), nullptr) * params->n_rows;
}

int kvstrata_cuda_estimate(const kvstrata::ops::EstimateParams* params, void* stream) {
    using namespace kvstrata::cuda;
    const auto& p = *params;
    const ScanSettings scan{p.group, p.head_dim, p.q_dtype, kvstrata::SummaryKind::mean_value,
                            p.scale, p.weight,   p.softcap, rotation(p.head_dim)};
    const int spans = spans_of(static_cast<int>(longest(p)));
    const auto on = static_cast<cudaStream_t>(stream);
    auto* base = static_cast<unsigned char*>(p.workspace);
    const auto work_of = [&](const kvstrata::ops::EstimateRow& row) {
        EstimateWork work{};
        base += place_work(work, p, spans, base);
        work.row = row;
        return work;
    };
    return in_batches_of<EstimateWork>(p.rows, p.n_rows, work_of, [&](const RowBatch<EstimateWork>& batch) {
        const auto rows = static_cast<unsigned>(batch.count);
        const EstimateArgs args{batch, scan};
        int code = launch("estimate", list_zone, dim3(rows), dim3(kThreads), 0, on, args);
        if (code == 0 && spans > 0) {
            const dim3 grid(static_cast<unsigned>(spans), rows);
            code = launch("estimate", estimate_spans, grid, dim3(kThreads), span_bytes(scan), on, args);
        }
        if (code != 0) return code;
        return launch("estimate", merge_spans, dim3(rows), dim3(kThreads), 0, on, args);
    });
}
