// quantize and dequantize on CUDA: one block for the moves into one page, one warp per vector. The formulas are in
// ops/quantize.h.
//
// A page of bf16 into int4 reads 64 D bytes and writes 17 D. By count of operations, not by measurement, arithmetic bounds
// it: for every 32 dims a lane takes part in at least 5 shuffles and 10 additions to rotate, in a reduction for the scale
// and in rounding; int2 tries six scales, with 5 shuffles each. A token passes here once for each format that it takes.
#include "cuda/api.h"
#include "cuda/device/codes.cuh"
#include "cuda/device/encode.cuh"
#include "cuda/device/full_pages.cuh"
#include "cuda/device/rotate.cuh"
#include "cuda/device/runs.cuh"
#include "cuda/device/vectors.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

struct QuantizeArgs {
    MoveList list;
    const float* centre;    // [R, D], or null
    const int32_t* row_of;  // [n]
    Rotation rotation;      // and D
    GroupSizes groups;
    int32_t words;  // of a slot's K, the most that a source has
    Pools pools;
};

// In dynamic shared memory: a page's K as it came, a vector for each warp, and the codes of the page to be written.
struct Shared {
    uint32_t* columns;  // vectors.cuh
    float* vectors;     // [kWarps][D]
    int8_t* codes;      // codes.cuh
};
__device__ Shared shared_of(int words, int head_dim) {
    auto* const columns = reinterpret_cast<uint32_t*>(dynamic_shared());
    auto* const vectors = reinterpret_cast<float*>(columns + words * kColumnStride);
    return {columns, vectors, reinterpret_cast<int8_t*>(vectors + kWarps * head_dim)};
}
size_t vectors_bytes(int head_dim) { return sizeof(float) * kWarps * static_cast<size_t>(head_dim); }

// K of the named slots' sources into the columns of the slots that they go to.
__device__ void fetch_columns(uint32_t* columns, int words, int head_dim, uint32_t slots, const Sources& from) {
    for (int i = static_cast<int>(threadIdx.x); i < words * kSlots; i += static_cast<int>(blockDim.x)) {
        const int slot = i % kSlots, word = i / kSlots;
        if (!(slots >> slot & 1) || word >= key_words(from.format[slot], head_dim)) continue;
        columns[word * kColumnStride + slot] = key_word(from.page[slot], word, from.slot[slot]);
    }
}

// x [D] of a full slot, less its centre if there is one, rotated. Every lane keeps to its dims.
template <int N>
__device__ void turn(float* x, const float* centre, const Rotation& rotation) {
    float held[N];
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        held[s] = d < rotation.dim ? x[d] : 0.0f;
        if (centre && d < rotation.dim) held[s] -= centre[d];
    }
    rotate(held, rotation, false);
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        if (d < rotation.dim) x[d] = held[s];
    }
}

// Warp by warp: vector i is K of slot i, or V of slot i - 16.
template <int N>
__device__ void encode_run(const QuantizeArgs& args, const Run& run, const Sources& from, Format to,
                           const Shared& shared, uint16_t* scales) {
    const int dim = args.rotation.dim, group = args.groups.of[static_cast<int>(to)];
    float* const x = shared.vectors + warp() * dim;
    for (int i = warp(); i < 2 * kSlots; i += kWarps) {
        const int slot = i % kSlots;
        const bool value = i >= kSlots;
        if (!(run.slots >> slot & 1)) continue;
        const Format format = from.format[slot];
        read_slot(x, value, shared.columns + slot, from.page[slot], format, from.slot[slot], dim,
                  args.groups.of[static_cast<int>(format)]);
        if (is_full(format)) {
            const float* const centre =
                args.centre && !value ? args.centre + int64_t{args.row_of[run.at[slot]]} * dim : nullptr;
            turn<N>(x, centre, args.rotation);
        }
        encode(x, dim, to, group, shared.codes + i * codes_stride(dim),
               scales + (value ? dim / group * kSlots : 0) + slot);
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
    const Shared shared = shared_of(args.words, dim);
    each_run(args.list, static_cast<int>(blockIdx.x) * kPart, run, [&] {
        find_sources(args.pools, args.list.moves, run, from);
        __syncthreads();
        fetch_columns(shared.columns, args.words, dim, run.slots, from);
        __syncthreads();
        const Format to = format_at(args.pools, run.page);
        encode_run<N>(args, run, from, to, shared, scales);
        __syncthreads();
        unsigned char* const page = page_to_write(args.pools, run.page);
        put_codes(page, to, dim, run.slots, shared.codes);
        put_scales(page, to, dim, run.slots, scales);
    });
}

struct DequantizeArgs {
    const PageId* pages;
    const float* centre;    // [R, D], or null
    const int32_t* row_of;  // [P]
    Rotation rotation;      // and D
    GroupSizes groups;
    int32_t words;  // of a slot's K, the most that a page has
    float* k;
    float* v;
    Pools pools;
};

// x [D] rotated back, and its centre if there is one, into out [D].
template <int N>
__device__ void turn_back(const float* x, const float* centre, const Rotation& rotation, float* out) {
    float held[N];
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        held[s] = d < rotation.dim ? x[d] : 0.0f;
    }
    rotate(held, rotation, true);
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        if (d < rotation.dim) out[d] = centre ? held[s] + centre[d] : held[s];
    }
}

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
    const Shared shared = shared_of(args.words, dim);
    for (int i = static_cast<int>(threadIdx.x); i < key_words(from, dim) * kSlots; i += kThreads) {
        shared.columns[i / kSlots * kColumnStride + i % kSlots] = reinterpret_cast<const uint32_t*>(at)[i];
    }
    __syncthreads();
    float* const x = shared.vectors + warp() * dim;
    for (int i = warp(); i < 2 * kSlots; i += kWarps) {
        const int slot = i % kSlots;
        const bool value = i >= kSlots;
        read_slot(x, value, shared.columns + slot, at, from, slot, dim, args.groups.of[static_cast<int>(from)]);
        const float* const centre = args.centre && !value ? args.centre + int64_t{args.row_of[page]} * dim : nullptr;
        turn_back<N>(x, centre, args.rotation, (value ? args.v : args.k) + (int64_t{page} * kSlots + slot) * dim);
    }
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_quantize(const kvstrata::ops::QuantizeParams* params, void* stream) {
    using namespace kvstrata;
    const ops::QuantizeParams& p = *params;
    const int dim = p.head_dim, words = cuda::most_key_words(p.pools, dim);
    if (!quantizable(dim)) return cuda::refused("quantize", "head_dim is not a multiple of 16 in 32..512");
    if (p.n_moves <= 0) return 0;
    const cuda::QuantizeArgs args{
        {p.moves, p.n_moves},   p.centre, p.row_of, cuda::rotation(dim), cuda::group_sizes(dim), words,
        cuda::pools_of(p.pools)};
    const size_t bytes = cuda::columns_bytes(words) + cuda::vectors_bytes(dim) + cuda::codes_bytes(dim);
    return cuda::with_registers(dim, [&]<int N>() {
        return cuda::launch("quantize", cuda::quantize_moves<N>, cuda::blocks_for(p.n_moves, cuda::kPart),
                            cuda::kThreads, bytes, static_cast<cudaStream_t>(stream), args);
    });
}

int kvstrata_cuda_dequantize(const kvstrata::ops::DequantizeParams* params, void* stream) {
    using namespace kvstrata;
    const ops::DequantizeParams& p = *params;
    const int dim = p.head_dim, words = cuda::most_key_words(p.pools, dim);
    if (dim < 1 || dim > kMaxHeadDim) return cuda::refused("dequantize", "head_dim is not in 1..512");
    if (p.n_pages <= 0) return 0;
    const cuda::DequantizeArgs args{p.pages, p.centre, p.row_of, cuda::rotation(dim),    cuda::group_sizes(dim),
                                    words,   p.k,      p.v,      cuda::pools_of(p.pools)};
    const size_t stage = cuda::most_stage_bytes(p.pools, dim);
    const size_t bytes = cuda::columns_bytes(words) + cuda::vectors_bytes(dim);
    return cuda::with_registers(dim, [&]<int N>() {
        return cuda::launch("dequantize", cuda::dequantize_pages<N>, static_cast<unsigned>(p.n_pages), cuda::kThreads,
                            stage > bytes ? stage : bytes, static_cast<cudaStream_t>(stream), args);
    });
}
