// quantize and dequantize on CUDA: one block for the moves into one page, one warp per vector. The formulas are in
// ops/quantize.h.
//
// A page of bf16 into int4 reads 64 D bytes and writes 17 D, but what bounds it is arithmetic: rotating, finding scales
// and rounding take some 70 instructions per lane for every 32 dims (int2, which tries six scales: 200), about four times
// what memory would allow. Each token passes here once in its life.
#include "cuda/api.h"
#include "cuda/device/codes.cuh"
#include "cuda/device/encode.cuh"
#include "cuda/device/full_pages.cuh"
#include "cuda/device/rotate.cuh"
#include "cuda/device/runs.cuh"
#include "cuda/device/vectors.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kThreads = 256;

struct QuantizeArgs {
    MoveList list;
    const float* centre;    // [R, D], or null
    const int32_t* row_of;  // [n]
    Rotation rotation;      // and D
    GroupSizes groups;
    int32_t words;  // of a slot's K, the most that a source has
    Pools pools;
};

// Codes and scales of a page until they are written. In dynamic shared memory, after the columns.
struct Encoded {
    int8_t* codes;     // as in codes.cuh
    uint16_t* scales;  // [2][groups][16]
};

// K of the named slots' sources into the columns of the slots that they go to.
__device__ void fetch_columns(uint32_t* columns, int words, int head_dim, uint32_t slots, const Sources& from) {
    for (int i = static_cast<int>(threadIdx.x); i < words * kSlots; i += static_cast<int>(blockDim.x)) {
        const int slot = i % kSlots, word = i / kSlots;
        if (!(slots >> slot & 1) || word >= key_words(from.format[slot], head_dim)) continue;
        columns[word * kColumnStride + slot] = key_word(from.page[slot], word, from.slot[slot]);
    }
}

// The vector of a full slot, less its centre, rotated.
template <int N>
__device__ void turn(float (&x)[N], const QuantizeArgs& args, bool value, int move) {
    if (!value && args.centre) {
        const float* const centre = args.centre + static_cast<int64_t>(args.row_of[move]) * args.rotation.dim;
#pragma unroll
        for (int s = 0; s < N; ++s) {
            const int d = s * kWarp + lane();
            if (d < args.rotation.dim) x[s] -= centre[d];
        }
    }
    rotate(x, args.rotation, false);
}

// Warp by warp: vector i is K of slot i, or V of slot i - 16.
template <int N>
__device__ void encode_run(const QuantizeArgs& args, const Run& run, const Sources& from, const uint32_t* columns,
                           const Encoded& to, Format format) {
    const int dim = args.rotation.dim, group = args.groups.of[static_cast<int>(format)];
    for (int i = warp(); i < 2 * kSlots; i += warps()) {
        const int slot = i % kSlots;
        const bool value = i >= kSlots;
        if (!(run.slots >> slot & 1)) continue;
        float x[N];
        read_slot(x, value, columns + slot, from.page[slot], from.format[slot], from.slot[slot], dim, args.groups);
        if (is_full(from.format[slot])) turn(x, args, value, run.at[slot]);
        encode(x, dim, format, group, to.codes + i * codes_stride(dim),
               to.scales + (value ? dim / group * kSlots : 0) + slot);
    }
}

__device__ void put_scales(unsigned char* page, Format to, int head_dim, uint32_t slots, const uint16_t* scales) {
    auto* const out = reinterpret_cast<uint16_t*>(page + k_scales_offset(to, head_dim));
    const int count = 2 * groups(to, head_dim) * kSlots;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
        if (slots >> i % kSlots & 1) out[i] = scales[i];
    }
}

template <int N>
__global__ void __launch_bounds__(kThreads) quantize_moves(const __grid_constant__ QuantizeArgs args) {
    __shared__ Run run;
    __shared__ Sources from;
    __shared__ uint16_t scales[2 * kMaxGroups * kSlots];
    const int dim = args.rotation.dim;
    auto* const columns = reinterpret_cast<uint32_t*>(dynamic_shared());
    const Encoded encoded{reinterpret_cast<int8_t*>(columns + args.words * kColumnStride), scales};
    each_run(args.list, static_cast<int>(blockIdx.x) * kPart, run, [&] {
        find_sources(args.pools, args.list.moves, run, from);
        __syncthreads();
        fetch_columns(columns, args.words, dim, run.slots, from);
        __syncthreads();
        const Format to = format_at(args.pools, run.page);
        encode_run<N>(args, run, from, columns, encoded, to);
        __syncthreads();
        unsigned char* const page = page_to_write(args.pools, run.page);
        put_codes(page, to, dim, run.slots, encoded.codes);
        put_scales(page, to, dim, run.slots, encoded.scales);
    });
}

struct DequantizeArgs {
    const PageId* pages;
    const float* centre;    // [R, D], or null
    const int32_t* row_of;  // [P]
    Rotation rotation;      // and D
    GroupSizes groups;
    float* k;
    float* v;
    Pools pools;
};

__device__ void widen_page(const DequantizeArgs& args, int page, const unsigned char* at, Format from) {
    __shared__ SlotRows<unsigned char> rows;
    const int dim = args.rotation.dim, slot = static_cast<int>(threadIdx.x);
    if (slot < kSlots) {
        const int64_t row = (static_cast<int64_t>(page) * kSlots + slot) * dim;
        rows.k[slot] = reinterpret_cast<unsigned char*>(args.k + row);
        rows.v[slot] = reinterpret_cast<unsigned char*>(args.v + row);
    }
    __syncthreads();
    auto* const stage = reinterpret_cast<uint32_t*>(dynamic_shared());
    if (from == Format::f32) return get_full<Format::f32, Format::f32>(at, dim, rows, stage);
    if (from == Format::bf16) return get_full<Format::bf16, Format::f32>(at, dim, rows, stage);
    get_full<Format::f16, Format::f32>(at, dim, rows, stage);
}

template <int N>
__global__ void __launch_bounds__(kThreads) dequantize_pages(const __grid_constant__ DequantizeArgs args) {
    const int page = static_cast<int>(blockIdx.x), dim = args.rotation.dim;
    const PageId id = args.pages[page];
    const unsigned char* const at = page_at(args.pools, id);
    const Format from = format_at(args.pools, id);
    if (is_full(from)) return widen_page(args, page, at, from);
    auto* const columns = reinterpret_cast<uint32_t*>(dynamic_shared());
    for (int i = static_cast<int>(threadIdx.x); i < key_words(from, dim) * kSlots; i += kThreads) {
        columns[i / kSlots * kColumnStride + i % kSlots] = reinterpret_cast<const uint32_t*>(at)[i];
    }
    __syncthreads();
    for (int i = warp(); i < 2 * kSlots; i += warps()) {
        const int slot = i % kSlots;
        const bool value = i >= kSlots;
        float x[N];
        read_slot(x, value, columns + slot, at, from, slot, dim, args.groups);
        rotate(x, args.rotation, true);
        const float* const centre =
            value || !args.centre ? nullptr : args.centre + static_cast<int64_t>(args.row_of[page]) * dim;
        float* const out = (value ? args.v : args.k) + (static_cast<int64_t>(page) * kSlots + slot) * dim;
#pragma unroll
        for (int s = 0; s < N; ++s) {
            const int d = s * kWarp + lane();
            if (d < dim) out[d] = centre ? x[s] + centre[d] : x[s];
        }
    }
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_quantize(const kvstrata::ops::QuantizeParams* params, void* stream) {
    using namespace kvstrata;
    const ops::QuantizeParams& p = *params;
    if (!quantizable(p.head_dim)) return cuda::refused("quantize", "head_dim is not a multiple of 16 in 32..512");
    if (p.n_moves <= 0) return 0;
    const int words = cuda::most_key_words(p.pools, p.head_dim);
    const cuda::QuantizeArgs args{
        {p.moves, p.n_moves},   p.centre, p.row_of, cuda::rotation(p.head_dim), cuda::group_sizes(p.head_dim), words,
        cuda::pools_of(p.pools)};
    return cuda::with_registers(p.head_dim, [&]<int N>() {
        return cuda::launch("quantize", cuda::quantize_moves<N>, cuda::blocks_for(p.n_moves, cuda::kPart),
                            cuda::kThreads, cuda::columns_bytes(words) + cuda::codes_bytes(p.head_dim),
                            static_cast<cudaStream_t>(stream), args);
    });
}

int kvstrata_cuda_dequantize(const kvstrata::ops::DequantizeParams* params, void* stream) {
    using namespace kvstrata;
    const ops::DequantizeParams& p = *params;
    if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) return cuda::refused("dequantize", "head_dim is not in 1..512");
    if (p.n_pages <= 0) return 0;
    const cuda::DequantizeArgs args{p.pages,
                                    p.centre,
                                    p.row_of,
                                    cuda::rotation(p.head_dim),
                                    cuda::group_sizes(p.head_dim),
                                    p.k,
                                    p.v,
                                    cuda::pools_of(p.pools)};
    const size_t stage = cuda::most_stage_bytes(p.pools, p.head_dim);
    const size_t columns = cuda::columns_bytes(cuda::most_key_words(p.pools, p.head_dim));
    return cuda::with_registers(p.head_dim, [&]<int N>() {
        return cuda::launch("dequantize", cuda::dequantize_pages<N>, static_cast<unsigned>(p.n_pages), cuda::kThreads,
                            stage > columns ? stage : columns, static_cast<cudaStream_t>(stream), args);
    });
}
