// Codes and scales of a rotated vector by one warp: the formulas of ops/quantize.h, with the CPU's bits
// (csrc/cpu/kernels/encode.cpp).
//
// The vector lies in shared memory; lane l works on dims l, 32 + l, 64 + l, ..., of one group at a time: 16 dims (half a
// register), or 32, 64, 128 or all of up to 128 (1 to 4 registers). Maxima are found on the bits of the magnitudes, which are
// ordered as the numbers are, with infinity and NaN at the end.
#pragma once

#include "common/layout.h"
#include "cuda/device/warp.cuh"

namespace kvstrata::cuda {

inline constexpr uint32_t kLeastBits = 0x0D800000;  // 2^-100: a group below it is stored as zeros
inline constexpr uint32_t kInfinityBits = 0x7F800000;
inline constexpr uint16_t kNanScale = 0x7FC0;

// The bf16 of the next magnitude at or above, as the f32 of the same value.
__device__ inline uint32_t round_up(float x) { return (__float_as_uint(x) + 0xFFFFu) & 0xFFFF0000u; }
__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }

// Largest of a group's lanes.
template <bool Half>
__device__ inline uint32_t group_max(uint32_t bits) {
    if constexpr (!Half) return __reduce_max_sync(kAllLanes, bits);
    const bool upper = lane() & 16;
    const uint32_t low = __reduce_max_sync(kAllLanes, upper ? 0u : bits);
    const uint32_t high = __reduce_max_sync(kAllLanes, upper ? bits : 0u);
    return upper ? high : low;
}

// Whether the first element of the largest magnitude is negative.
template <int Span, bool Half>
__device__ inline bool first_is_negative(const float (&x)[Span], uint32_t most) {
    const unsigned mine = Half ? 0xFFFFu << (lane() & 16) : kAllLanes;
    bool found = false, result = false;
#pragma unroll
    for (int s = 0; s < Span; ++s) {
        const unsigned largest = __ballot_sync(kAllLanes, magnitude(x[s]) == most) & mine;
        const unsigned negative = __ballot_sync(kAllLanes, x[s] < 0);
        if (!found && largest) result = negative >> (__ffs(static_cast<int>(largest)) - 1) & 1, found = true;
    }
    return result;
}

// rne(x / s) into low..high.
template <int Span>
__device__ inline void round_codes(const float (&x)[Span], float inverse, int low, int high, int (&codes)[Span]) {
#pragma unroll
    for (int s = 0; s < Span; ++s) codes[s] = max(low, min(high, __float2int_rn(x[s] * inverse)));
}

__device__ inline int int2_code(float x, float inverse) {  // clamp(floor(y), 0, 3)
    const float y = x * inverse + 2.0f;
    return (y >= 1.0f) + (y >= 2.0f) + (y >= 3.0f);
}
__device__ inline float int2_value(float code) { return code + code - 3.0f; }

// Sum of (x - decoded)^2 over a group of one register or half of one: 16 sums over d mod 16, then a tree of neighbours.
template <bool Half>
__device__ inline float int2_error(float x, float h) {
    const float inverse = __fdiv_rn(1.0f, 2.0f * h);
    const float e = x - h * int2_value(static_cast<float>(int2_code(x, inverse)));
    float sum = e * e;
    if constexpr (!Half) sum += __shfl_xor_sync(kAllLanes, sum, 16);
#pragma unroll
    for (int stride = 1; stride < 16; stride *= 2) sum += __shfl_xor_sync(kAllLanes, sum, stride);
    return sum;
}

// The scale of least error, as the bits of an f32.
template <bool Half>
__device__ inline uint32_t int2_scale(float x, float most) {
    constexpr float kShares[] = {1.0f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f};
    uint32_t best = 0;
    float least = 0.0f;
#pragma unroll
    for (int i = 0; i < 6; ++i) {
        const uint32_t scale = round_up(__fdiv_rn(kShares[i] * most, 3.0f));
        const float error = int2_error<Half>(x, __uint_as_float(scale));
        if (i == 0 || error < least) best = scale, least = error;
    }
    return best;
}

// One group in Span registers, or two in the halves of one. Returns the scale of the lane's group.
template <Format To, int Span, bool Half>
__device__ inline uint16_t encode_group(const float (&x)[Span], int (&codes)[Span]) {
    uint32_t bits = magnitude(x[0]);
#pragma unroll
    for (int s = 1; s < Span; ++s) bits = max(bits, magnitude(x[s]));
    bits = group_max<Half>(bits);
    const bool stored = bits >= kLeastBits && bits < kInfinityBits;  // of this lane's half: all lanes go on
    const float most = stored ? __uint_as_float(bits) : 1.0f;
    float safe[Span];
#pragma unroll
    for (int s = 0; s < Span; ++s) safe[s] = stored ? x[s] : 0.0f;
    uint32_t scale;
    if constexpr (To == Format::int8) {
        scale = round_up(__fdiv_rn(most, 127.0f));
        round_codes(safe, __fdiv_rn(1.0f, __uint_as_float(scale)), -127, 127, codes);
    } else if constexpr (To == Format::int4) {
        scale = round_up(__fdiv_rn(most, 8.0f));
        if (!first_is_negative<Span, Half>(x, bits)) scale |= 0x80000000u;
        round_codes(safe, __fdiv_rn(1.0f, __uint_as_float(scale)), -8, 7, codes);
    } else {
        static_assert(Span == 1, "a group of int2 lies in one register");
        scale = int2_scale<Half>(safe[0], most);
        codes[0] = stored ? int2_code(safe[0], __fdiv_rn(1.0f, 2.0f * __uint_as_float(scale))) : 0;
    }
    if (stored) return static_cast<uint16_t>(scale >> 16);
    return bits < kLeastBits ? uint16_t{0} : kNanScale;
}

template <Format To, int Span, bool Half = false>
__device__ inline void encode_groups(const float* x, int dim, int8_t* codes, uint16_t* scales) {
    for (int first = 0; first < dim; first += Span * kWarp) {
        float held[Span];
        int c[Span];
#pragma unroll
        for (int s = 0; s < Span; ++s) {
            const int d = first + s * kWarp + lane();
            held[s] = d < dim ? x[d] : 0.0f;
        }
        const uint16_t scale = encode_group<To, Span, Half>(held, c);
#pragma unroll
        for (int s = 0; s < Span; ++s) {
            const int d = first + s * kWarp + lane();
            if (d < dim) codes[d] = static_cast<int8_t>(c[s]);
        }
        const int group = Half ? (first + lane()) / 16 : first / (Span * kWarp);
        if (lane() == 0 || (Half && lane() == 16 && first + 16 < dim)) scales[group * kSlots] = scale;
    }
}

// Codes [D] and scales [groups], kSlots apart, of x [D]; every lane reads the dims that it works on and no others.
// `group`: dims that share a scale. All lanes take part.
__device__ __attribute__((noinline)) inline void encode(const float* x, int dim, Format to, int group, int8_t* codes,
                                                        uint16_t* scales) {
    if (to == Format::int8) {
        switch (group) {
            case 16: return encode_groups<Format::int8, 1, true>(x, dim, codes, scales);
            case 32: return encode_groups<Format::int8, 1>(x, dim, codes, scales);
            case 64: return encode_groups<Format::int8, 2>(x, dim, codes, scales);
            default: return encode_groups<Format::int8, 4>(x, dim, codes, scales);  // 128, or all of less
        }
    } else if (to == Format::int4) {
        switch (group) {
            case 16: return encode_groups<Format::int4, 1, true>(x, dim, codes, scales);
            case 32: return encode_groups<Format::int4, 1>(x, dim, codes, scales);
            default: return encode_groups<Format::int4, 2>(x, dim, codes, scales);
        }
    } else if (group == 16) {
        encode_groups<Format::int2, 1, true>(x, dim, codes, scales);
    } else {
        encode_groups<Format::int2, 1>(x, dim, codes, scales);
    }
}

}  // namespace kvstrata::cuda
