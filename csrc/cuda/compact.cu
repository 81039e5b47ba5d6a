// compact on CUDA: one block for the moves into one page. The formula is in ops/compact.h.
//
// Bound by memory where pages move whole; scattered slots are read by the line: sixteen lanes read one word of K of
// sixteen tokens, which lie side by side as far as the tokens did. Words of V are gathered by the lanes along the dims.
#include "cuda/api.h"
#include "cuda/device/runs.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kThreads = 256;

struct CompactArgs {
    MoveList list;
    Pools pools;
    int32_t head_dim;
};

// Whether the run takes one page to another slot by slot. Every thread asks.
__device__ bool whole_page(const Run& run, const Sources& from) {
    const int slot = lane() % kSlots;
    const bool same = run.slots == kAllSlots && from.page[slot] == from.page[0] && from.slot[slot] == slot;
    return __all_sync(kAllLanes, same);
}

__device__ void copy_page(unsigned char* to, const unsigned char* from, int64_t bytes) {
    auto* const out = reinterpret_cast<uint4*>(to);
    const auto* const in = reinterpret_cast<const uint4*>(from);
    for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += static_cast<int>(blockDim.x)) out[i] = in[i];
}

// K words and scales: a column of each for every slot.
template <class Word>
__device__ void copy_columns(unsigned char* to, int64_t offset, int count, uint32_t slots, const Sources& from) {
    auto* const out = reinterpret_cast<Word*>(to + offset);
    for (int i = static_cast<int>(threadIdx.x); i < count * kSlots; i += static_cast<int>(blockDim.x)) {
        const int slot = i % kSlots;
        if (!(slots >> slot & 1)) continue;
        out[i] = reinterpret_cast<const Word*>(from.page[slot] + offset)[i - slot + from.slot[slot]];
    }
}

// A word of V holds several slots of one dim: one thread gathers it. F: any format of that many bits.
template <Format F>
__device__ void copy_values(unsigned char* to, int head_dim, uint32_t slots, const Sources& from) {
    constexpr int kBits = format_bits(F), kPerWord = 32 / kBits;
    constexpr uint32_t kMask = ~0u >> (32 - kBits);
    const int padded = padded_dim(head_dim);
    auto* const v = reinterpret_cast<uint32_t*>(to + v_offset(F, head_dim));
    for (int i = static_cast<int>(threadIdx.x); i < value_lines(F) * padded; i += static_cast<int>(blockDim.x)) {
        const int line = i / padded, dim = i % padded;
        uint32_t word = 0, named = 0;
#pragma unroll
        for (int e = 0; e < kPerWord; ++e) {
            const int slot = line * kPerWord + e, bit = field_of<F>(e).bit;
            if (!(slots >> slot & 1)) continue;
            const Field field = field_of<F>(from.slot[slot]);
            word |= (value_word(from.page[slot], F, head_dim, field.word, dim) >> field.bit & kMask) << bit;
            named |= kMask << bit;
        }
        if (!named) continue;
        v[i] = named == ~0u ? word : word | (v[i] & ~named);
    }
}

__device__ void copy_values(unsigned char* to, Format format, int head_dim, uint32_t slots, const Sources& from) {
    switch (format) {
        case Format::f32: return copy_values<Format::f32>(to, head_dim, slots, from);
        case Format::int8: return copy_values<Format::int8>(to, head_dim, slots, from);
        case Format::int4: return copy_values<Format::int4>(to, head_dim, slots, from);
        case Format::int2: return copy_values<Format::int2>(to, head_dim, slots, from);
        default: return copy_values<Format::bf16>(to, head_dim, slots, from);
    }
}

__global__ void __launch_bounds__(kThreads) compact_moves(const __grid_constant__ CompactArgs args) {
    __shared__ Run run;
    __shared__ Sources from;
    const int dim = args.head_dim;
    each_run(args.list, static_cast<int>(blockIdx.x) * kPart, run, [&] {
        find_sources(args.pools, args.list.moves, run, from);
        __syncthreads();
        const Format format = format_at(args.pools, run.page);
        unsigned char* const page = page_to_write(args.pools, run.page);
        if (whole_page(run, from)) return copy_page(page, from.page[0], page_bytes(format, dim));
        copy_columns<uint32_t>(page, 0, key_words(format, dim), run.slots, from);
        copy_values(page, format, dim, run.slots, from);
        copy_columns<uint16_t>(page, k_scales_offset(format, dim), 2 * groups(format, dim), run.slots, from);
    });
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_compact(const kvstrata::ops::CompactParams* params, void* stream) {
    using namespace kvstrata;
    const ops::CompactParams& p = *params;
    if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) return cuda::refused("compact", "head_dim is not in 1..512");
    if (p.n_moves <= 0) return 0;
    return cuda::launch("compact", cuda::compact_moves, cuda::blocks_for(p.n_moves, cuda::kPart), cuda::kThreads, 0,
                        static_cast<cudaStream_t>(stream),
                        cuda::CompactArgs{{p.moves, p.n_moves}, cuda::pools_of(p.pools), p.head_dim});
}
