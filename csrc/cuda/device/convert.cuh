// Conversions between the element types of full pages, with the CPU's bits: round to nearest even, and the payload of a
// NaN as far as it fits, quiet (the device's own conversions give one NaN for all).
#pragma once

#include "common/types.h"
#include "cuda/device/launch.cuh"

namespace kvstrata::cuda {

__device__ inline float widen_bf16(uint32_t h) { return __uint_as_float(h << 16); }
__device__ inline float widen_f16(uint32_t h) {
    if ((h & 0x7FFF) > 0x7C00) return __uint_as_float((h & 0x8000) << 16 | 0x7FC00000 | (h & 0x3FF) << 13);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(h)));
}

__device__ inline uint32_t round_bf16(float x) {
    const uint32_t b = __float_as_uint(x);
    if ((b & 0x7FFFFFFF) > 0x7F800000) return (b | 0x400000) >> 16;
    return (b + 0x7FFF + (b >> 16 & 1)) >> 16;
}
__device__ inline uint32_t round_f16(float x) {
    const uint32_t b = __float_as_uint(x);
    if ((b & 0x7FFFFFFF) > 0x7F800000) return (b >> 16 & 0x8000) | 0x7E00 | (b >> 13 & 0x3FF);
    return __half_as_ushort(__float2half_rn(x));
}

// An element of a full format as f32, and back; bits in the low end of a word.
__device__ inline float widen(Format from, uint32_t bits) {
    if (from == Format::bf16) return widen_bf16(bits);
    if (from == Format::f16) return widen_f16(bits);
    return __uint_as_float(bits);
}
__device__ inline uint32_t round_to(Format to, float x) {
    if (to == Format::bf16) return round_bf16(x);
    if (to == Format::f16) return round_f16(x);
    return __float_as_uint(x);
}

}  // namespace kvstrata::cuda
