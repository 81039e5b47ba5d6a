// One slot's K or V as an f32 vector, by one warp: full formats as they are, quantized ones decoded, in the rotated domain.
//
// K of a slot is a column: the block brings the columns of up to sixteen slots into shared memory, sixteen lanes to a
// line, which reads lines whole where the slots are of one page. V of a slot is read by lines where it lies.
#pragma once

#include "cuda/device/page.cuh"
#include "cuda/device/warp.cuh"

namespace kvstrata::cuda {

inline constexpr int kColumnStride = kSlots + 1;  // words: those of a slot lie in different banks

constexpr size_t columns_bytes(int words) { return sizeof(uint32_t) * static_cast<size_t>(words) * kColumnStride; }

// Words of a slot's K, the most of the pools' formats.
inline int most_key_words(const PoolView* pools, int head_dim) {
    int most = 0;
    for (int i = 0; i < kMaxPools; ++i) {
        const int words = pools[i].n_slabs ? key_words(pools[i].format, head_dim) : 0;
        most = most < words ? words : most;
    }
    return most;
}

// Dims that share a scale, by format.
struct GroupSizes {
    int32_t of[6];
};
inline GroupSizes group_sizes(int head_dim) {
    GroupSizes sizes{};
    for (Format f : {Format::int8, Format::int4, Format::int2}) sizes.of[static_cast<int>(f)] = group_size(f, head_dim);
    return sizes;
}

// read(d): the element or code of dim d in the low bits of a word. Scales [groups][16] of the page.
template <Format F, class Read>
__device__ inline void read_vector(float* x, int head_dim, const uint16_t* scales, int slot, int group, Read read) {
#pragma unroll 4
    for (int d = lane(); d < head_dim; d += kWarp) {
        if constexpr (is_full(F)) {
            x[d] = element_in<F>(read(d), 0);
        } else {
            const float level = static_cast<float>(level_of<F>(code_in<F>(read(d), 0)));
            x[d] = from_bf16(scales[d / group * kSlots + slot]) * level;
        }
    }
}
template <Format F>
__device__ inline void read_slot(float* x, bool value, const uint32_t* column, const unsigned char* page, int slot,
                                 int head_dim, int group) {
    if (value) {
        const Field field = field_of<F>(slot);
        return read_vector<F>(x, head_dim, value_scales(page, F, head_dim), slot, group,
                              [&](int d) { return value_word(page, F, head_dim, field.word, d) >> field.bit; });
    }
    read_vector<F>(x, head_dim, key_scales(page, F, head_dim), slot, group, [&](int d) {
        const Field field = field_of<F>(d);
        return column[field.word * kColumnStride] >> field.bit;
    });
}

// K of a page's slot from its column in shared memory, or V from the page, into x [D] in shared memory: lane l writes dims l,
// 32 + l, ... `group`: dims that share a scale.
__device__ __attribute__((noinline)) inline void read_slot(float* x, bool value, const uint32_t* column,
                                                           const unsigned char* page, Format format, int slot,
                                                           int head_dim, int group) {
    switch (format) {
        case Format::f32: return read_slot<Format::f32>(x, value, column, page, slot, head_dim, group);
        case Format::bf16: return read_slot<Format::bf16>(x, value, column, page, slot, head_dim, group);
        case Format::f16: return read_slot<Format::f16>(x, value, column, page, slot, head_dim, group);
        case Format::int8: return read_slot<Format::int8>(x, value, column, page, slot, head_dim, group);
        case Format::int4: return read_slot<Format::int4>(x, value, column, page, slot, head_dim, group);
        default: return read_slot<Format::int2>(x, value, column, page, slot, head_dim, group);
    }
}

}  // namespace kvstrata::cuda
