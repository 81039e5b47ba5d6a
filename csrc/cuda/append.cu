// append on CUDA: one block for the tokens of one page. The formula is in ops/append.h.
//
// Bound by memory: a whole page of bf16 from bf16 reads 8 D bytes of k and of v in rows and writes as much in lines of
// 64 bytes, all of it asked for at once (256 threads, 3 quads each at D = 128). One token of decode is a scatter of
// 4-byte words, 64 bytes apart: K holds a token as a column so that attention reads sixteen tokens in a line. What bounds
// that is the launch.
#include "cuda/api.h"
#include "cuda/device/full_pages.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/device/runs.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kThreads = 256;

struct AppendArgs {
    RowBatch<ops::AppendRow> batch;
    Pools pools;
    int32_t head_dim;
};

struct TokenList {
    const PageId* pages;
    const uint8_t* slots;
    int32_t count;

    __device__ PageId page(int t) const { return pages[t]; }
    __device__ int slot(int t) const { return slots[t]; }
};

// Where the tokens of a page come from, and their positions where they go.
template <Format From>
__device__ void find_rows(const Pools& pools, const ops::AppendRow& row, const Run& run,
                          SlotRows<const unsigned char>& from) {
    const int slot = static_cast<int>(threadIdx.x);
    if (slot >= kSlots) return;
    from.k[slot] = from.v[slot] = nullptr;
    if (!(run.slots >> slot & 1)) return;
    const int t = run.at[slot];
    const int64_t index = row.tokens ? row.tokens[t] : t;
    from.k[slot] = static_cast<const unsigned char*>(row.k) + index * row.k_stride * format_bytes(From);
    from.v[slot] = static_cast<const unsigned char*>(row.v) + index * row.v_stride * format_bytes(From);
    int32_t* const position = position_of(pools, run.page, slot);
    if (position) *position = row.positions ? row.positions[t] : row.position + t;
}

// Equal types of 16 bits are one: their bits are copied.
template <Format From, Format To>
__device__ void put_as(unsigned char* page, int head_dim, const SlotRows<const unsigned char>& from, uint32_t slots,
                       uint32_t* stage) {
    constexpr bool kSame = From == To && From != Format::f32;
    put_full<kSame ? Format::bf16 : From, kSame ? Format::bf16 : To>(page, head_dim, from, slots, stage);
}

template <Format From>
__global__ void __launch_bounds__(kThreads) append_tokens(const __grid_constant__ AppendArgs args) {
    __shared__ Run run;
    __shared__ SlotRows<const unsigned char> from;
    auto* const stage = reinterpret_cast<uint32_t*>(dynamic_shared());
    const ops::AppendRow& row = args.batch.rows[blockIdx.y];
    const TokenList list{row.pages, row.slots, row.count};
    each_run(list, static_cast<int>(blockIdx.x) * kPart, run, [&] {
        find_rows<From>(args.pools, row, run, from);
        __syncthreads();
        unsigned char* const page = page_to_write(args.pools, run.page);
        switch (format_at(args.pools, run.page)) {
            case Format::f32: return put_as<From, Format::f32>(page, args.head_dim, from, run.slots, stage);
            case Format::bf16: return put_as<From, Format::bf16>(page, args.head_dim, from, run.slots, stage);
            default: return put_as<From, Format::f16>(page, args.head_dim, from, run.slots, stage);
        }
    });
}

template <Format From>
int append_as(const ops::AppendParams& p, cudaStream_t stream) {
    const Pools pools = pools_of(p.pools);
    return in_batches(p.rows, p.n_rows, [&](const RowBatch<ops::AppendRow>& batch) {
        int most = 0;
        for (int r = 0; r < batch.count; ++r) most = max(most, batch.rows[r].count);
        if (most == 0) return 0;
        const dim3 grid(blocks_for(most, kPart), static_cast<unsigned>(batch.count));
        return launch("append", append_tokens<From>, grid, kThreads, most_stage_bytes(p.pools, p.head_dim), stream,
                      AppendArgs{batch, pools, p.head_dim});
    });
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_append(const kvstrata::ops::AppendParams* params, void* stream) {
    using namespace kvstrata;
    const ops::AppendParams& p = *params;
    if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) return cuda::refused("append", "head_dim is not in 1..512");
    const auto on = static_cast<cudaStream_t>(stream);
    switch (p.dtype) {
        case DType::f32: return cuda::append_as<Format::f32>(p, on);
        case DType::bf16: return cuda::append_as<Format::bf16>(p, on);
        case DType::f16: return cuda::append_as<Format::f16>(p, on);
        default: return cuda::refused("append", "dtype is not f32, bf16 or f16");
    }
}
