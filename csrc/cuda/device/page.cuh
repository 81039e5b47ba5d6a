// Pages of arrangement version 1 (common/layout.h) in device code: addresses, words, codes, elements and scales.
//
//   K: 32-bit words [key_words][16 slots]           a word holds 32 / bits successive dims of one slot (int4, int2: in the
//                                                   order of layout.h)
//   V: 32-bit words [value_lines][padded_dim]       a word holds 32 / bits slots of one dim
#pragma once

#include "common/layout.h"
#include "cuda/device/element.cuh"
#include "ops/pool_view.h"

namespace kvstrata::cuda {

// The eight pools by value; the arrays that they point to lie on the device.
struct Pools {
    PoolView at[kMaxPools];
};

inline Pools pools_of(const PoolView* pools) {
    Pools all{};
    for (int i = 0; i < kMaxPools; ++i) all.at[i] = pools[i];
    return all;
}

// `id` is not kNoPage.
__device__ inline unsigned char* page_to_write(const Pools& pools, PageId id) {
    const PoolView& pool = pools.at[page_pool(id)];
    return pool.slabs[page_slab(id)] + page_index(id) * pool.stride;
}
__device__ inline const unsigned char* page_at(const Pools& pools, PageId id) { return page_to_write(pools, id); }
__device__ inline Format format_at(const Pools& pools, PageId id) { return pools.at[page_pool(id)].format; }

// Positions i32 [16] of a page's slots.
__device__ inline int32_t* positions_at(const Pools& pools, PageId id) {
    return pools.at[page_pool(id)].positions[page_slab(id)] + page_index(id) * kSlots;
}

// Words of K of a slot; lines of V.
constexpr int key_words(Format f, int head_dim) { return padded_dim(head_dim) * format_bits(f) / 32; }
constexpr int value_lines(Format f) { return kSlots * format_bits(f) / 32; }

// Word `word` of K of a slot; word (line, dim) of V. A page's words are read as they lie: 16 bytes are 4 successive slots of
// K or 4 successive dims of V.
__device__ inline uint32_t key_word(const unsigned char* page, int word, int slot) {
    return reinterpret_cast<const uint32_t*>(page)[word * kSlots + slot];
}
__device__ inline uint32_t value_word(const unsigned char* page, Format f, int head_dim, int line, int dim) {
    const auto* v = reinterpret_cast<const uint32_t*>(page + v_offset(f, head_dim));
    return v[line * padded_dim(head_dim) + dim];
}

// Where dim (of K) or slot (of V) `i` lies: in word or line `word`, from bit `bit`.
struct Field {
    int word, bit;
};
template <Format F>
__device__ constexpr Field field_of(int i) {
    if constexpr (F == Format::f32) return {i, 0};
    if constexpr (F == Format::bf16 || F == Format::f16) return {i / 2, i % 2 * 16};
    if constexpr (F == Format::int8) return {i / 4, i % 4 * 8};
    if constexpr (F == Format::int4) return {i / 8, i % 4 * 8 + i / 4 % 2 * 4};
    if constexpr (F == Format::int2) return {i / 16, i % 4 * 8 + i / 4 % 4 * 2};
}

// The code in a field of a word: int8 and int4 signed, int2 0..3.
template <Format F>
__device__ inline int code_in(uint32_t word, int bit) {
    static_assert(!is_full(F));
    constexpr int kBits = format_bits(F);
    if constexpr (F == Format::int2) return static_cast<int>(word >> bit & 3u);
    return static_cast<int>(word << (32 - kBits - bit)) >> (32 - kBits);
}
// The element in a field of a word of a full format.
template <Format F>
__device__ inline float element_in(uint32_t word, int bit) {
    static_assert(is_full(F));
    if constexpr (F == Format::f32) return __uint_as_float(word);
    const auto bits = static_cast<uint16_t>(word >> bit);
    if constexpr (F == Format::f16) return __half2float(__ushort_as_half(bits));
    return from_bf16(bits);
}

// Full formats: elements. Quantized formats: codes.
template <Format F>
__device__ inline float key_element(const unsigned char* page, int slot, int dim) {
    const Field field = field_of<F>(dim);
    return element_in<F>(key_word(page, field.word, slot), field.bit);
}
template <Format F>
__device__ inline float value_element(const unsigned char* page, int head_dim, int slot, int dim) {
    const Field field = field_of<F>(slot);
    return element_in<F>(value_word(page, F, head_dim, field.word, dim), field.bit);
}
template <Format F>
__device__ inline int key_code(const unsigned char* page, int slot, int dim) {
    const Field field = field_of<F>(dim);
    return code_in<F>(key_word(page, field.word, slot), field.bit);
}
template <Format F>
__device__ inline int value_code(const unsigned char* page, int head_dim, int slot, int dim) {
    const Field field = field_of<F>(slot);
    return code_in<F>(value_word(page, F, head_dim, field.word, dim), field.bit);
}

// What a code stands for, in units of its scale: c, int2 2c - 3.
template <Format F>
__device__ constexpr int level_of(int code) {
    return F == Format::int2 ? 2 * code - 3 : code;
}

// Scales of K and of V, bf16 [groups][16 slots]; group g is dims g * group_size(f, head_dim) and on.
__device__ inline const uint16_t* key_scales(const unsigned char* page, Format f, int head_dim) {
    return reinterpret_cast<const uint16_t*>(page + k_scales_offset(f, head_dim));
}
__device__ inline const uint16_t* value_scales(const unsigned char* page, Format f, int head_dim) {
    return reinterpret_cast<const uint16_t*>(page + v_scales_offset(f, head_dim));
}
__device__ inline float key_scale(const unsigned char* page, Format f, int head_dim, int group, int slot) {
    return from_bf16(key_scales(page, f, head_dim)[group * kSlots + slot]);
}
__device__ inline float value_scale(const unsigned char* page, Format f, int head_dim, int group, int slot) {
    return from_bf16(value_scales(page, f, head_dim)[group * kSlots + slot]);
}

// K or V of any format as floats, one at a time: for what is not hot. Quantized: level times scale, still rotated and less
// the centre. dim < head_dim.
template <Format F>
__device__ inline float key(const unsigned char* page, int head_dim, int slot, int dim) {
    if constexpr (is_full(F)) return key_element<F>(page, slot, dim);
    if constexpr (!is_full(F)) {
        const float level = static_cast<float>(level_of<F>(key_code<F>(page, slot, dim)));
        return key_scale(page, F, head_dim, dim / group_size(F, head_dim), slot) * level;
    }
}
template <Format F>
__device__ inline float value(const unsigned char* page, int head_dim, int slot, int dim) {
    if constexpr (is_full(F)) return value_element<F>(page, head_dim, slot, dim);
    if constexpr (!is_full(F)) {
        const float level = static_cast<float>(level_of<F>(value_code<F>(page, head_dim, slot, dim)));
        return value_scale(page, F, head_dim, dim / group_size(F, head_dim), slot) * level;
    }
}

}  // namespace kvstrata::cuda
