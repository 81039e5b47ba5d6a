// Codes of quantized pages as operands of matrix products: bytes for whole-number ones, pairs of bf16 for others. All exact.
#pragma once

#include "common/types.h"
#include "cuda/device/element.cuh"

namespace kvstrata::cuda {

// Two bf16 at a time: a * b + c, rounded once.
__device__ inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
#if defined(KVSTRATA_EMULATE)
    const auto half = [&](int shift) {
        const auto of = [shift](uint32_t x) { return from_bf16(static_cast<uint16_t>(x >> shift)); };
        return static_cast<uint32_t>(to_bf16(fmaf(of(a), of(b), of(c))));
    };
    return half(16) << 16 | half(0);
#else
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#endif
}

constexpr uint32_t both(uint32_t bits) { return bits << 16 | bits; }

// Two floats as bf16, or as f16, rounded to nearest even; `low` in the low half.
__device__ inline uint32_t round_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
}
__device__ inline uint32_t round_f16(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return static_cast<uint32_t>(__half_as_ushort(__high2half(pair))) << 16 | __half_as_ushort(__low2half(pair));
}

// x as two terms side by side, the larger in the low half: x to 16 bits of it, or 22.
template <Format F>
__device__ inline uint32_t two_terms(float x) {
    if constexpr (F == Format::f16) {
        const float high = __half2float(__float2half_rn(x));
        return round_f16(high, x - high);
    } else {
        const float high = __uint_as_float(__float_as_uint(x) & 0xFFFF0000u);
        return round_bf16(high, x - high);
    }
}

// What a lane of four multiplies of successive dims, in units of 2^-kUnitBits: dims 8 b + 0..3 and 8 b + 4..7 of each 32 for lane b.
// int8: the words of lines 8 s + 2 b and 8 s + 2 b + 1; int4: of line 4 s + b; int2: of line 2 s + b / 2, whose codes 0..3 are
// levels 2 c - 3.
template <Format F>
inline constexpr int kUnitBits = F == Format::int4 ? 4 : 0;
template <Format F>
__device__ inline void split_keys(uint32_t word, int b, uint32_t& first, uint32_t& second) {
    if constexpr (F == Format::int4) {
        first = word << 4 & 0xF0F0F0F0u;
        second = word & 0xF0F0F0F0u;
    } else {
        first = word >> (4 * (b & 1)) & 0x03030303u;
        second = word >> (4 * (b & 1) + 2) & 0x03030303u;
    }
}

// Levels of the slots 4 b, 4 b + 2 and of 4 b + 1, 4 b + 3 of one dim, for lane b of four; `word` is that of line b (int8),
// b / 2 (int4) or 0 (int2) of V. The low bits of a bf16 of 64 or 128 count its units.
template <Format F>
__device__ inline void split_values(uint32_t word, int b, uint32_t& even, uint32_t& odd) {
    constexpr uint32_t kOf128 = both(0x4300), kOf64 = both(0x4280), kOne = both(0x3F80);
    if constexpr (F == Format::int8) {
        const auto signed_byte = [](uint32_t x) {  // 128 + its low 7 bits, less 128, or 256 where it is negative
            return fma_bf16((x & both(0x80)) ^ kOf128, both(0xBF80), (x & both(0x7F)) ^ kOf128);
        };
        even = signed_byte(word);
        odd = signed_byte(word >> 8);
    } else if constexpr (F == Format::int4) {
        const uint32_t x = word >> (4 * (b & 1));
        constexpr uint32_t kMinus136 = both(0xC308);
        even = fma_bf16((x & both(0xF)) ^ both(0x4308), kOne, kMinus136);
        odd = fma_bf16((x >> 8 & both(0xF)) ^ both(0x4308), kOne, kMinus136);
    } else {
        const uint32_t x =
            __funnelshift_r(word, word, static_cast<unsigned>(2 * b + 31));  // the code from bit 1 of each byte
        constexpr uint32_t kTwo = both(0x4000), kMinus131 = both(0xC303);
        even = fma_bf16((x & both(6)) ^ kOf64, kTwo, kMinus131);
        odd = fma_bf16((x >> 8 & both(6)) ^ kOf64, kTwo, kMinus131);
    }
}

}  // namespace kvstrata::cuda
