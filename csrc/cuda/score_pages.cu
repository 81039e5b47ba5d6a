// score_pages and select on CUDA: two launches. The formulas are in ops/score_pages.h.
//
// scan_pages: a block of eight warps per (row, span of blocks of summaries), a warp per block; x to scratch. It reads D + 12
// bytes a page and writes 4 G: bound by memory. pick_pages (device/pick.cuh): a block per row over x, which then lies in the
// L2 cache: log-sum-exp, votes, the K highest by radix. Sums follow the row's length alone: so do its bits.
#include "common/places.h"
#include "cuda/api.h"
#include "cuda/device/page_scan.cuh"
#include "cuda/device/pick.cuh"
#include "cuda/device/rows.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kScanThreads = 256;
constexpr int kShortSpan = 16, kLongSpan = 64;  // blocks of summaries of a thread block
constexpr int64_t kManyBlocks = 32 * 1024;      // of summaries of a call: long spans fill the device too

int64_t longest(const ops::SelectParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) {
        const int64_t blocks = summary_blocks(p.rows[r].entries);
        most = most > blocks ? most : blocks;
    }
    return most;
}

// Places of a row of up to so many blocks. Returns their bytes.
int64_t place_scratch(PickScratch& scratch, int group, int64_t blocks, void* base) {
    const int64_t entries = blocks * kSlots;
    Places places(base);
    scratch.x = places.take<float>(entries * group);
    scratch.vote = places.take<float>(entries);
    scratch.keys = places.take<uint64_t>(2 * entries);
    scratch.bad = places.take<int32_t>((blocks + kShortSpan - 1) / kShortSpan);
    return places.bytes();
}

struct ScanArgs {
    RowBatch<PickRow> batch;
    ScanSettings scan;
    int32_t span;
};

__global__ void __launch_bounds__(kScanThreads, 3) scan_pages(const __grid_constant__ ScanArgs args) {
    __shared__ int bad_of_warp[kScanThreads / kWarp];
    const PickRow& work = args.batch.rows[blockIdx.y];
    const ops::SelectRow& row = work.row;
    const int blocks = summary_blocks(row.entries);
    const int begin = static_cast<int>(blockIdx.x) * args.span, end = min(blocks, begin + args.span);
    if (begin >= blocks) return;
    const int64_t stride = static_cast<int64_t>(blocks) * kSlots;
    const PageScan scan(args.scan, row.q, row.q_stride_g);
    int bad = kNoEntry;
    for (int b = begin + warp(); b < end; b += warps()) {
        const int from = b * kSlots;
        const auto mask_of = [&](int page) {
            const int e = from + page;
            return e >= row.first && e < row.entries ? uint32_t{row.visible[e]} : 0u;
        };
        const uint32_t pages = scan.score(row.blocks[b], mask_of, [&](int g, int page, const PageScan::Pair& pair) {
            const int e = from + page;
            *reinterpret_cast<float2*>(work.scratch.x + g * stride + e) = make_float2(pair.x[0], pair.x[1]);
            float* const out = row.x ? row.x + static_cast<int64_t>(g) * row.entries + e : nullptr;
            if (out && e < row.entries) out[0] = pair.x[0];
            if (out && e + 1 < row.entries) out[1] = pair.x[1];
        });
        if (pages) bad = min(bad, from + __ffs(static_cast<int>(pages)) - 1);
    }
    if (lane() == 0) bad_of_warp[warp()] = bad;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (const int other : bad_of_warp) bad = min(bad, other);
    work.scratch.bad[blockIdx.x] = bad;
}

int run(const char* op, const ops::SelectParams& p, bool choose, void* stream) {
    const int64_t blocks = longest(p);
    if (p.n_rows == 0) return 0;
    const ScanSettings scan{p.group, p.head_dim, p.q_dtype, p.kind, p.scale, p.weight, p.softcap, rotation(p.head_dim)};
    const int span = blocks * p.n_rows < kManyBlocks ? kShortSpan : kLongSpan;
    PickScratch scratch;
    const int64_t bytes = place_scratch(scratch, p.group, blocks, nullptr);
    const auto on = static_cast<cudaStream_t>(stream);
    auto* base = static_cast<unsigned char*>(p.workspace);
    const auto work_of = [&](const ops::SelectRow& row) {
        PickRow work{row, {}};
        place_scratch(work.scratch, p.group, summary_blocks(row.entries), base);
        base += bytes;
        return work;
    };
    return in_batches_of<PickRow>(p.rows, p.n_rows, work_of, [&](const RowBatch<PickRow>& batch) {
        const dim3 rows(1, static_cast<unsigned>(batch.count));
        if (blocks > 0) {
            const dim3 grid(blocks_for(blocks, span), rows.y);
            if (const int code = launch(op, scan_pages, grid, dim3(kScanThreads), scan_bytes(scan), on,
                                        ScanArgs{batch, scan, span})) {
                return code;
            }
        }
        const PickArgs args{batch, p.group, p.head_dim, span, p.least, p.mass, p.aggregate == ops::Aggregate::sum,
                            choose};
        return launch(op, pick_pages, dim3(rows.y), dim3(kPickThreads), 0, on, args);
    });
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_select_workspace_bytes(const kvstrata::ops::SelectParams* params) {
    using namespace kvstrata::cuda;
    PickScratch scratch;
    return place_scratch(scratch, params->group, longest(*params), nullptr) * params->n_rows;
}

int kvstrata_cuda_select(const kvstrata::ops::SelectParams* params, void* stream) {
    return kvstrata::cuda::run("select", *params, true, stream);
}

int kvstrata_cuda_score_pages(const kvstrata::ops::SelectParams* params, void* stream) {
    return kvstrata::cuda::run("score_pages", *params, false, stream);
}
