// Codes of a quantized page's slots between the page and shared memory, by one block. There: i8 [16][D], K and V, rows
// codes_stride bytes apart (int8 and int4 signed, int2 0..3; the low bits of a code are what is stored).
//
// A page's words are read and written in whole lines. The block owns the page: a word that also holds slots which are not
// named is read, changed and written by one thread.
#pragma once

#include "cuda/device/page.cuh"

namespace kvstrata::cuda {

// An odd number of words: the codes of one dim of all slots lie in different banks.
constexpr int codes_stride(int head_dim) { return head_dim + 4; }
constexpr size_t codes_bytes(int head_dim) { return static_cast<size_t>(2 * kSlots * codes_stride(head_dim)); }

template <Format F>
inline constexpr int kPerByte = 8 / format_bits(F);  // codes
template <Format F>
inline constexpr uint32_t kByteMask = F == Format::int8   ? ~0u
                                      : F == Format::int4 ? 0x0F0F0F0Fu
                                                          : 0x03030303u;

// The bits of a line's word of V that belong to the named slots.
template <Format F>
__device__ inline uint32_t bits_of_slots(uint32_t slots, int line) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4 * kPerByte<F>; ++i) {
        const uint32_t field = (1u << format_bits(F)) - 1;
        if (slots >> (line * 4 * kPerByte<F> + i) & 1) bits |= field << field_of<F>(i).bit;
    }
    return bits;
}

// Byte i of word j and byte j of word i change places.
__device__ inline void transpose_bytes(uint32_t (&w)[4]) {
    const uint32_t a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
    const uint32_t c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
    w[0] = __byte_perm(a, b, 0x5410), w[1] = __byte_perm(a, b, 0x7632);
    w[2] = __byte_perm(c, d, 0x5410), w[3] = __byte_perm(c, d, 0x7632);
}

// Four codes a byte each, from one field of each byte of a word.
template <Format F>
__device__ inline uint32_t codes_in(uint32_t word, int field) {
    const uint32_t four = word >> (format_bits(F) * field) & kByteMask<F>;
    if constexpr (F == Format::int4) return four | (four & 0x08080808u) * 30u;  // the sign in the bits above
    return four;
}

template <Format F>
__device__ void put_key_codes(unsigned char* page, int head_dim, uint32_t slots, const int8_t* codes) {
    auto* const k = reinterpret_cast<uint32_t*>(page);
    for (int i = static_cast<int>(threadIdx.x); i < key_words(F, head_dim) * kSlots;
         i += static_cast<int>(blockDim.x)) {
        const int slot = i % kSlots, first = i / kSlots * kPerByte<F>;
        if (!(slots >> slot & 1)) continue;
        const auto* const from = reinterpret_cast<const uint32_t*>(codes + slot * codes_stride(head_dim)) + first;
        uint32_t word = 0;
#pragma unroll
        for (int f = 0; f < kPerByte<F>; ++f) word |= (from[f] & kByteMask<F>) << (format_bits(F) * f);
        k[i] = word;
    }
}

template <Format F>
__device__ void put_value_codes(unsigned char* page, int head_dim, uint32_t slots, const int8_t* codes) {
    auto* const v = reinterpret_cast<uint4*>(page + v_offset(F, head_dim));
    const int quads = head_dim / 4;
    for (int i = static_cast<int>(threadIdx.x); i < value_lines(F) * quads; i += static_cast<int>(blockDim.x)) {
        const int line = i / quads, first = i % quads * 4;
        const uint32_t named = bits_of_slots<F>(slots, line);
        if (!named) continue;
        uint32_t out[4] = {};
#pragma unroll
        for (int f = 0; f < kPerByte<F>; ++f) {
            uint32_t four[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int slot = (line * kPerByte<F> + f) * 4 + e;
                four[e] = *reinterpret_cast<const uint32_t*>(codes + slot * codes_stride(head_dim) + first);
            }
            transpose_bytes(four);
#pragma unroll
            for (int e = 0; e < 4; ++e) out[e] |= (four[e] & kByteMask<F>) << (format_bits(F) * f);
        }
        if (named != ~0u) {
            const uint4 old = v[i];
            out[0] = (out[0] & named) | (old.x & ~named), out[1] = (out[1] & named) | (old.y & ~named);
            out[2] = (out[2] & named) | (old.z & ~named), out[3] = (out[3] & named) | (old.w & ~named);
        }
        v[i] = {out[0], out[1], out[2], out[3]};
    }
}

// Codes of the slots in `slots` into a page; the others keep their bytes.
template <Format F>
__device__ void put_codes(unsigned char* page, int head_dim, uint32_t slots, const int8_t* codes) {
    put_key_codes<F>(page, head_dim, slots, codes);
    put_value_codes<F>(page, head_dim, slots, codes + kSlots * codes_stride(head_dim));
}
__device__ inline void put_codes(unsigned char* page, Format to, int head_dim, uint32_t slots, const int8_t* codes) {
    if (to == Format::int8) return put_codes<Format::int8>(page, head_dim, slots, codes);
    if (to == Format::int4) return put_codes<Format::int4>(page, head_dim, slots, codes);
    put_codes<Format::int2>(page, head_dim, slots, codes);
}

// Codes of all slots of a page.
template <Format F>
__device__ void get_codes(const unsigned char* page, int head_dim, int8_t* codes) {
    for (int i = static_cast<int>(threadIdx.x); i < key_words(F, head_dim) * kSlots;
         i += static_cast<int>(blockDim.x)) {
        const int slot = i % kSlots, first = i / kSlots * kPerByte<F>;
        auto* const to = reinterpret_cast<uint32_t*>(codes + slot * codes_stride(head_dim)) + first;
        const uint32_t word = reinterpret_cast<const uint32_t*>(page)[i];
#pragma unroll
        for (int f = 0; f < kPerByte<F>; ++f) to[f] = codes_in<F>(word, f);
    }
    int8_t* const values = codes + kSlots * codes_stride(head_dim);
    const auto* const v = reinterpret_cast<const uint4*>(page + v_offset(F, head_dim));
    const int quads = head_dim / 4;
    for (int i = static_cast<int>(threadIdx.x); i < value_lines(F) * quads; i += static_cast<int>(blockDim.x)) {
        const int line = i / quads, first = i % quads * 4;
        const uint4 w = v[i];
#pragma unroll
        for (int f = 0; f < kPerByte<F>; ++f) {
            uint32_t four[4] = {codes_in<F>(w.x, f), codes_in<F>(w.y, f), codes_in<F>(w.z, f), codes_in<F>(w.w, f)};
            transpose_bytes(four);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int slot = (line * kPerByte<F> + f) * 4 + e;
                *reinterpret_cast<uint32_t*>(values + slot * codes_stride(head_dim) + first) = four[e];
            }
        }
    }
}
__device__ inline void get_codes(const unsigned char* page, Format from, int head_dim, int8_t* codes) {
    if (from == Format::int8) return get_codes<Format::int8>(page, head_dim, codes);
    if (from == Format::int4) return get_codes<Format::int4>(page, head_dim, codes);
    get_codes<Format::int2>(page, head_dim, codes);
}

}  // namespace kvstrata::cuda
