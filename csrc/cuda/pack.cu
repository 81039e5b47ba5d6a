// pack and unpack on CUDA: one block per page. The formula is in ops/pack.h.
//
// Bound by memory: page and rows are each read or written once, in whole lines.
#include "cuda/api.h"
#include "cuda/device/codes.cuh"
#include "cuda/device/full_pages.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kThreads = 256;

struct PackArgs {
    const PageId* pages;
    int32_t head_dim;
    unsigned char* k;
    unsigned char* v;
    uint16_t* scales;
    Pools pools;
};

// The rows of canonical page `page`, of elements of `width` bytes.
template <class Byte>
__device__ void find_rows(const PackArgs& args, int page, int width, SlotRows<Byte>& rows) {
    const int slot = static_cast<int>(threadIdx.x);
    if (slot < kSlots) {
        const int64_t at = (static_cast<int64_t>(page) * kSlots + slot) * args.head_dim * width;
        rows.k[slot] = args.k + at;
        rows.v[slot] = args.v + at;
    }
    __syncthreads();
}

// Copies codes [16][D] of K and of V between canonical rows and shared memory, four at a time where they lie so.
template <bool In>
__device__ void copy_codes(const PackArgs& args, int page, int8_t* codes) {
    const int dim = args.head_dim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        unsigned char* const all = (half ? args.v : args.k) + static_cast<int64_t>(page) * kSlots * dim;
        int8_t* const held = codes + half * kSlots * codes_stride(dim);
        const int step = reinterpret_cast<uintptr_t>(all) % 4 ? 1 : 4;
        for (int i = static_cast<int>(threadIdx.x) * step; i < kSlots * dim; i += static_cast<int>(blockDim.x) * step) {
            int8_t* const at = held + i / dim * codes_stride(dim) + i % dim;
            if (step == 1) {
                In ? * at = static_cast<int8_t>(all[i]) : all[i] = static_cast<unsigned char>(*at);
            } else {
                auto* const outside = reinterpret_cast<uint32_t*>(all + i);
                auto* const inside = reinterpret_cast<uint32_t*>(at);
                In ? * inside = *outside : * outside = *inside;
            }
        }
    }
}

// Scales are canonical as they lie in the page.
template <bool In>
__device__ void copy_scales(const PackArgs& args, int page, unsigned char* at, Format format) {
    const int count = 2 * groups(format, args.head_dim) * kSlots;
    uint16_t* const outside = args.scales + static_cast<int64_t>(page) * count;
    auto* const inside = reinterpret_cast<uint16_t*>(at + k_scales_offset(format, args.head_dim));
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
        In ? inside[i] = outside[i] : outside[i] = inside[i];
    }
}

__global__ void __launch_bounds__(kThreads) pack_pages(const __grid_constant__ PackArgs args) {
    __shared__ SlotRows<const unsigned char> rows;
    const int page = static_cast<int>(blockIdx.x);
    const PageId id = args.pages[page];
    const Format to = format_at(args.pools, id);
    unsigned char* const at = page_to_write(args.pools, id);
    if (is_full(to)) {
        auto* const stage = reinterpret_cast<uint32_t*>(dynamic_shared());
        find_rows(args, page, format_bytes(to), rows);
        if (to == Format::f32) return put_full<Format::f32, Format::f32>(at, args.head_dim, rows, kAllSlots, stage);
        return put_full<Format::bf16, Format::bf16>(at, args.head_dim, rows, kAllSlots, stage);  // 16 bits as they are
    }
    auto* const codes = reinterpret_cast<int8_t*>(dynamic_shared());
    copy_codes<true>(args, page, codes);
    copy_scales<true>(args, page, at, to);
    __syncthreads();
    put_codes(at, to, args.head_dim, kAllSlots, codes);
}

__global__ void __launch_bounds__(kThreads) unpack_pages(const __grid_constant__ PackArgs args) {
    __shared__ SlotRows<unsigned char> rows;
    const int page = static_cast<int>(blockIdx.x);
    const PageId id = args.pages[page];
    const Format from = format_at(args.pools, id);
    unsigned char* const at = page_to_write(args.pools, id);
    if (is_full(from)) {
        auto* const stage = reinterpret_cast<uint32_t*>(dynamic_shared());
        find_rows(args, page, format_bytes(from), rows);
        if (from == Format::f32) return get_full<Format::f32, Format::f32>(at, args.head_dim, rows, stage);
        return get_full<Format::bf16, Format::bf16>(at, args.head_dim, rows, stage);
    }
    auto* const codes = reinterpret_cast<int8_t*>(dynamic_shared());
    get_codes(at, from, args.head_dim, codes);
    copy_scales<false>(args, page, at, from);
    __syncthreads();
    copy_codes<false>(args, page, codes);
}

int each_page(const char* op, void (*kernel)(PackArgs), const ops::PackParams& p, void* stream) {
    if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) return refused(op, "head_dim is not in 1..512");
    if (p.n_pages <= 0) return 0;
    const size_t stage = most_stage_bytes(p.pools, p.head_dim), codes = codes_bytes(p.head_dim);
    return launch(op, kernel, static_cast<unsigned>(p.n_pages), kThreads, stage > codes ? stage : codes,
                  static_cast<cudaStream_t>(stream),
                  PackArgs{p.pages, p.head_dim, static_cast<unsigned char*>(p.k), static_cast<unsigned char*>(p.v),
                           p.scales, pools_of(p.pools)});
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_pack(const kvstrata::ops::PackParams* params, void* stream) {
    return kvstrata::cuda::each_page("pack", kvstrata::cuda::pack_pages, *params, stream);
}

int kvstrata_cuda_unpack(const kvstrata::ops::PackParams* params, void* stream) {
    return kvstrata::cuda::each_page("unpack", kvstrata::cuda::unpack_pages, *params, stream);
}
