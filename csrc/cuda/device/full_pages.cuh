// Slots in and out of full pages by one block: rows of elements outside, words [K: dims][16 slots], [V: slots][D] inside.
//
// Rows and pages are both read and written in whole lines; K turns over in shared memory. A quad is four successive
// dims of a row: 8 or 16 bytes where the row lies on such a boundary. Slots that are not named keep their bytes: K has a
// word for each slot, V of 16-bit formats is written in halves of words where one slot of two is named.
#pragma once

#include "cuda/device/convert.cuh"
#include "cuda/device/page.cuh"

namespace kvstrata::cuda {

// The rows of a page's slots, K and V; null where a slot is not named. In shared memory.
template <class Byte>
struct SlotRows {
    Byte* k[kSlots];
    Byte* v[kSlots];
};

struct Quad {
    uint32_t bits[4];  // of an element each, in the low end
};

// Words of a slot's K in shared memory, and two more, so that neither side meets itself in a bank.
constexpr int stage_stride(int words) { return words + 2; }
// Bytes of shared memory that put_full and get_full take for pages of format f.
constexpr size_t stage_bytes(Format f, int head_dim) {
    return sizeof(uint32_t) * kSlots * static_cast<size_t>(stage_stride(key_words(f, head_dim)));
}
// Likewise for full pages of any of the pools.
inline size_t most_stage_bytes(const PoolView* pools, int head_dim) {
    size_t most = 0;
    for (int i = 0; i < kMaxPools; ++i) {
        if (!pools[i].n_slabs || !is_full(pools[i].format)) continue;
        const size_t bytes = stage_bytes(pools[i].format, head_dim);
        most = most < bytes ? bytes : most;
    }
    return most;
}

template <Format F>
__device__ inline bool aligned_for_quads(const void* row) {
    return reinterpret_cast<uintptr_t>(row) % (4 * format_bytes(F)) == 0;
}
template <Format F>
__device__ inline uint32_t load_bits(const unsigned char* row, int d) {
    if constexpr (format_bytes(F) == 2) return reinterpret_cast<const uint16_t*>(row)[d];
    return reinterpret_cast<const uint32_t*>(row)[d];
}

// Dims first..first + 3 of a row of D, zeros past its end.
template <Format F>
__device__ inline Quad load_quad(const unsigned char* row, int first, int head_dim) {
    if (first + 4 > head_dim || !aligned_for_quads<F>(row)) {
        Quad quad;
#pragma unroll
        for (int e = 0; e < 4; ++e) quad.bits[e] = first + e < head_dim ? load_bits<F>(row, first + e) : 0;
        return quad;
    }
    if constexpr (format_bytes(F) == 4) {
        const uint4 four = reinterpret_cast<const uint4*>(row)[first / 4];
        return {{four.x, four.y, four.z, four.w}};
    }
    const uint2 two = reinterpret_cast<const uint2*>(row)[first / 4];
    return {{two.x & 0xFFFF, two.x >> 16, two.y & 0xFFFF, two.y >> 16}};
}
template <Format F>
__device__ inline void store_quad(unsigned char* row, int first, int head_dim, const Quad& quad) {
    if (first + 4 > head_dim || !aligned_for_quads<F>(row)) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (first + e >= head_dim) continue;
            if constexpr (format_bytes(F) == 2) {
                reinterpret_cast<uint16_t*>(row)[first + e] = static_cast<uint16_t>(quad.bits[e]);
            } else {
                reinterpret_cast<uint32_t*>(row)[first + e] = quad.bits[e];
            }
        }
    } else if constexpr (format_bytes(F) == 4) {
        reinterpret_cast<uint4*>(row)[first / 4] = {quad.bits[0], quad.bits[1], quad.bits[2], quad.bits[3]};
    } else {
        reinterpret_cast<uint2*>(row)[first / 4] = {quad.bits[0] | quad.bits[1] << 16,
                                                    quad.bits[2] | quad.bits[3] << 16};
    }
}
// Equal types keep their bits.
template <Format From, Format To>
__device__ inline Quad convert(Quad quad) {
    if constexpr (From != To) {
#pragma unroll
        for (int e = 0; e < 4; ++e) quad.bits[e] = round_to(To, widen(From, quad.bits[e]));
    }
    return quad;
}

template <Format F>
__device__ inline void put_words(uint32_t* words, const Quad& quad) {  // on an 8-byte boundary
    auto* const two = reinterpret_cast<uint2*>(words);
    if constexpr (format_bytes(F) == 2) {
        two[0] = {quad.bits[0] | quad.bits[1] << 16, quad.bits[2] | quad.bits[3] << 16};
    } else {
        two[0] = {quad.bits[0], quad.bits[1]};
        two[1] = {quad.bits[2], quad.bits[3]};
    }
}
template <Format F>
__device__ inline Quad get_words(const uint32_t* words) {
    const auto* const two = reinterpret_cast<const uint2*>(words);
    const uint2 a = two[0];
    if constexpr (format_bytes(F) == 2) return {{a.x & 0xFFFF, a.x >> 16, a.y & 0xFFFF, a.y >> 16}};
    const uint2 b = two[format_bytes(F) == 4];
    return {{a.x, a.y, b.x, b.y}};
}

// V of the slots in `slots`.
template <Format From, Format To>
__device__ void put_value_rows(unsigned char* page, int head_dim, const SlotRows<const unsigned char>& from,
                               uint32_t slots) {
    constexpr int kPerWord = 4 / format_bytes(To);  // slots
    const int padded = padded_dim(head_dim), quads = padded / 4;
    auto* const v = reinterpret_cast<uint32_t*>(page + v_offset(To, head_dim));
    for (int i = static_cast<int>(threadIdx.x); i < kSlots / kPerWord * quads; i += static_cast<int>(blockDim.x)) {
        const int line = i / quads, first = i % quads * 4, slot = line * kPerWord;
        uint32_t* const at = v + line * padded + first;
        const bool low = slots >> slot & 1, high = kPerWord == 2 && slots >> (slot + 1) & 1;
        Quad a{}, b{};
        if (low) a = convert<From, To>(load_quad<From>(from.v[slot], first, head_dim));
        if (kPerWord == 1) {
            if (low) *reinterpret_cast<uint4*>(at) = {a.bits[0], a.bits[1], a.bits[2], a.bits[3]};
            continue;
        }
        if (high) b = convert<From, To>(load_quad<From>(from.v[slot + 1], first, head_dim));
        if (low && high) {
            *reinterpret_cast<uint4*>(at) = {a.bits[0] | b.bits[0] << 16, a.bits[1] | b.bits[1] << 16,
                                             a.bits[2] | b.bits[2] << 16, a.bits[3] | b.bits[3] << 16};
        } else if (low || high) {
            auto* const half = reinterpret_cast<uint16_t*>(at) + (low ? 0 : 1);
#pragma unroll
            for (int e = 0; e < 4; ++e) half[2 * e] = static_cast<uint16_t>(low ? a.bits[e] : b.bits[e]);
        }
    }
}

// K and V of the slots in `slots` from rows of From, into a page of format To; dims past D become zeros. `stage`: shared
// memory of stage_bytes, not in use.
template <Format From, Format To>
__device__ void put_full(unsigned char* page, int head_dim, const SlotRows<const unsigned char>& from, uint32_t slots,
                         uint32_t* stage) {
    constexpr int kQuadWords = format_bytes(To);  // words of a quad
    const int quads = padded_dim(head_dim) / 4, words = quads * kQuadWords, stride = stage_stride(words);
    for (int i = static_cast<int>(threadIdx.x); i < kSlots * quads; i += static_cast<int>(blockDim.x)) {
        const int slot = i / quads, quad = i % quads;
        if (!(slots >> slot & 1)) continue;
        put_words<To>(stage + slot * stride + quad * kQuadWords,
                      convert<From, To>(load_quad<From>(from.k[slot], 4 * quad, head_dim)));
    }
    put_value_rows<From, To>(page, head_dim, from, slots);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < words * 4; i += static_cast<int>(blockDim.x)) {
        const int word = i / 4, first = i % 4 * 4;  // four slots of a line
        const uint32_t* const column = stage + first * stride + word;
        uint32_t* const at = reinterpret_cast<uint32_t*>(page) + word * kSlots + first;
        const uint32_t named = slots >> first & 15;
        if (named == 15) {
            *reinterpret_cast<uint4*>(at) = {column[0], column[stride], column[2 * stride], column[3 * stride]};
            continue;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (named >> e & 1) at[e] = column[e * stride];
        }
    }
}

// All slots of a page of format From as rows of To.
template <Format From, Format To>
__device__ void get_full(const unsigned char* page, int head_dim, const SlotRows<unsigned char>& to, uint32_t* stage) {
    constexpr int kQuadWords = format_bytes(From), kPerWord = 4 / format_bytes(From);
    const int padded = padded_dim(head_dim), quads = padded / 4, words = quads * kQuadWords;
    const int stride = stage_stride(words);
    const auto* const lines = reinterpret_cast<const uint4*>(page);
    for (int i = static_cast<int>(threadIdx.x); i < words * 4; i += static_cast<int>(blockDim.x)) {
        const uint4 four = lines[i];
        uint32_t* const column = stage + i % 4 * 4 * stride + i / 4;
        column[0] = four.x, column[stride] = four.y, column[2 * stride] = four.z, column[3 * stride] = four.w;
    }
    const auto* const v = reinterpret_cast<const uint4*>(page + v_offset(From, head_dim));
    for (int i = static_cast<int>(threadIdx.x); i < kSlots / kPerWord * quads; i += static_cast<int>(blockDim.x)) {
        const int slot = i / quads * kPerWord, first = i % quads * 4;
        const uint4 w = v[i];
        if constexpr (kPerWord == 1) {
            store_quad<To>(to.v[slot], first, head_dim, convert<From, To>({{w.x, w.y, w.z, w.w}}));
        } else {
            const Quad low{{w.x & 0xFFFF, w.y & 0xFFFF, w.z & 0xFFFF, w.w & 0xFFFF}};
            const Quad high{{w.x >> 16, w.y >> 16, w.z >> 16, w.w >> 16}};
            store_quad<To>(to.v[slot], first, head_dim, convert<From, To>(low));
            store_quad<To>(to.v[slot + 1], first, head_dim, convert<From, To>(high));
        }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kSlots * quads; i += static_cast<int>(blockDim.x)) {
        const int slot = i / quads, quad = i % quads;
        store_quad<To>(to.k[slot], 4 * quad, head_dim,
                       convert<From, To>(get_words<From>(stage + slot * stride + quad * kQuadWords)));
    }
}

}  // namespace kvstrata::cuda
