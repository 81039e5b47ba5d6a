// Elements of tensors and of full pages as floats, and code chosen by their type.
#pragma once

#include "common/types.h"
#include "cuda/device/launch.cuh"

namespace kvstrata::cuda {

__device__ inline float load_element(const float* at) { return *at; }
__device__ inline float load_element(const __nv_bfloat16* at) { return __bfloat162float(*at); }
__device__ inline float load_element(const __half* at) { return __half2float(*at); }

// Rounds to nearest even.
__device__ inline void store(float* at, float x) { *at = x; }
__device__ inline void store(__nv_bfloat16* at, float x) { *at = __float2bfloat16_rn(x); }
__device__ inline void store(__half* at, float x) { *at = __float2half_rn(x); }

// bf16 bits as a float, and a float as bf16 bits (nearest even; NaN stays NaN).
__device__ inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
__device__ inline uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// Two floats as the 32-bit operand of an mma: `low` in the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
    return static_cast<uint32_t>(to_bf16(high)) << 16 | to_bf16(low);
}
__device__ inline uint32_t pack_f16(float low, float high) {
    return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16 |
           __half_as_ushort(__float2half_rn(low));
}

// with_float_type(dtype, [&]<class T>() { return launch(...T...); }, otherwise): T is float, __nv_bfloat16 or __half;
// `otherwise` is what another dtype returns.
template <class Work>
int with_float_type(DType dtype, Work work, int otherwise) {
    switch (dtype) {
        case DType::f32: return work.template operator()<float>();
        case DType::bf16: return work.template operator()<__nv_bfloat16>();
        case DType::f16: return work.template operator()<__half>();
        default: return otherwise;
    }
}

// with_format<first, last>(format, [&]<Format F>() { return launch(...F...); }, otherwise): F from first to last.
template <Format First = Format::f32, Format Last = Format::int2, class Work>
int with_format(Format format, Work work, int otherwise) {
    if constexpr (First > Last) {
        return otherwise;
    } else {
        if (format == First) return work.template operator()<First>();
        return with_format<static_cast<Format>(static_cast<int>(First) + 1), Last>(format, work, otherwise);
    }
}

// The element type of a full format.
template <Format F>
struct ElementOf {
    using type = float;
};
template <>
struct ElementOf<Format::bf16> {
    using type = __nv_bfloat16;
};
template <>
struct ElementOf<Format::f16> {
    using type = __half;
};
template <Format F>
using Element = typename ElementOf<F>::type;

}  // namespace kvstrata::cuda
