// The products of attend, by one warp on a page in shared memory: q . k of a page's slots, and p . v added to sums.
//
// Keys are the A operand: rows a and a + 8 are slots 2 a and 2 a + 1, so a lane's two words of a line of K lie side by side;
// columns 2 r and 2 r + 1 are two terms of query row r of the quad. So lane 4 a + b gets what belongs to slots 2 a, 2 a + 1 and row
// b, which is how softmax has it, and its sums belong to row b too. For p . v the A operand is a tile of V: rows a and a + 8 are
// dims 2 a and 2 a + 1 of 16.
//
// Full pages: products of bf16 or f16, p in two terms. Quantized ones: whole numbers for q . k (the bits of the CPU's), and for
// p . v products of bf16, where all levels are exact and p times the scale of V has two terms, 2^-17 of it: p as signed bytes
// with a scale for each page would be off by some 2^-9, and would need three more instructions for each sum and page.
#pragma once

#include "cuda/attend_queries.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/transpose.cuh"

namespace kvstrata::cuda {

// Of a lane: its query rows are b of each quad of its warp. Relative to `maximum`: the sum of p over the lane's slots, and sums of p v
// [tile][r], dims 16 tile + 2 a + r / 2, in two terms.
template <class S>
struct Sums {
    float maximum[S::kQuads], total[S::kQuads];
    float acc[S::kQuads][S::kTiles][4];
};
template <class S>
using SlotPairs = float[S::kQuads][2];  // of a lane's rows and its two slots
template <class S>
using Masks = uint32_t[S::kQuads];

__device__ inline int lane_a() { return lane() / 4; }
__device__ inline int lane_b() { return lane() % 4; }

// The words of a lane's two slots in its line of K, and in the line after it; the lane's line of the first step is `Lines` b.
template <Format F, int Lines>
__device__ inline const unsigned char* own_keys(const unsigned char* keys) {
    const int line = F == Format::int2 ? lane_b() / 2 : Lines * lane_b();
    return keys + swizzled(4 * line + lane_a() / 2, swizzle_of(F)) * 16 + lane_a() % 2 * 8;
}
// The words of a lane's two dims of a tile in a line of V.
__device__ inline uint2 value_pair(const unsigned char* values, const Staged& how, int line, int tile) {
    return *reinterpret_cast<const uint2*>(values + line * how.value_stride + (16 * tile + 2 * lane_a()) * 4);
}
// The scales of a lane's two slots.
__device__ inline float2 scale_pair(const unsigned char* scales, int group) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(scales)[group * (kSlots / 2) + lane_a()];
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
}

template <Format F>
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (F == Format::f16) return mma_f16(d, a, b);
    mma_bf16(d, a, b);
}

// --- q . k -------------------------------------------------------------------------------------------------------------

__device__ inline uint2 load_pair(const unsigned char* from) { return *reinterpret_cast<const uint2*>(from); }

template <class S>
__device__ __forceinline__ void dot_f32(SlotPairs<S>& z, const unsigned char* keys, const float* queries, int dim) {
    const unsigned char* const own = own_keys<Format::f32, 0>(keys);
#pragma unroll 4
    for (int d = 0; d < dim; ++d) {
        const uint2 k = load_pair(own + d * 64);
#pragma unroll
        for (int q = 0; q < S::kQuads; ++q) {
            const float x = queries[d * S::kRows + 4 * q + lane_b()];
            z[q][0] = fmaf(x, __uint_as_float(k.x), z[q][0]);
            z[q][1] = fmaf(x, __uint_as_float(k.y), z[q][1]);
        }
    }
}

// What of a word of dims d and d + 1 is inside the head: padding may hold anything.
__device__ inline uint32_t inside(int d, int dim) { return d + 1 < dim ? ~0u : d < dim ? 0xFFFFu : 0u; }

template <class S, Format F>
__device__ __forceinline__ void dot_pairs(SlotPairs<S>& z, const unsigned char* keys, const uint2* operands, int dim,
                                          bool one) {
    const int steps = padded_dim(dim) / 16;
    const unsigned char* const own = own_keys<F, 2>(keys);
    const unsigned char* const next = keys + ((own - keys) ^ 64);
    float d[S::kQuads][4] = {};
    const auto multiply_step = [&](int s, uint2 x, uint2 y) {
#pragma unroll
        for (int q = 0; q < S::kQuads; ++q) {
            const uint2 w = operands[(q * steps + s) * kWarp + lane()];
            multiply<F>(d[q], {x.x, x.y, y.x, y.y}, {w.x, w.y});
        }
    };
#pragma unroll 4
    for (int s = 0; s < dim / 16; ++s) multiply_step(s, load_pair(own + s * 512), load_pair(next + s * 512));
    if (dim % 16) {
        const int s = dim / 16, first = 16 * s + 4 * lane_b();
        uint2 x = load_pair(own + s * 512), y = load_pair(next + s * 512);
        x.x &= inside(first, dim), x.y &= inside(first, dim), y.x &= inside(first + 2, dim),
            y.y &= inside(first + 2, dim);
        multiply_step(s, x, y);
    }
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {  // the second term of a whole query is 0 and must not meet an infinite key
        z[q][0] = one ? d[q][0] : d[q][0] + d[q][1];
        z[q][1] = one ? d[q][2] : d[q][2] + d[q][3];
    }
}

// Four operand words of 32 dims: slots 2 a and 2 a + 1, dims 8 b..8 b + 3, then likewise 8 b + 4..8 b + 7.
template <Format F>
__device__ __forceinline__ void load_key_codes(uint32_t (&x)[4], const unsigned char* own, const unsigned char* next,
                                               int step) {
    if constexpr (F == Format::int8) {
        const uint2 first = load_pair(own + step * 512), second = load_pair(next + step * 512);
        x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
    } else {
        const uint2 both = load_pair(own + step * (F == Format::int4 ? 256 : 128));
        split_keys<F>(both.x, lane_b(), x[0], x[2]);
        split_keys<F>(both.y, lane_b(), x[1], x[3]);
    }
}

// 256 h + l, in units of levels.
template <Format F>
__device__ inline float level_sum(int high, int low, int code_sum) {
    const int sum = 256 * high + low;
    if constexpr (F == Format::int2) return static_cast<float>(2 * sum - 3 * code_sum);
    return static_cast<float>(sum >> kUnitBits<F>);
}

// Steps: those of a group of scales, where it has whole ones; 0: a group may be half of one, or all of the head.
template <class S, Format F, int Steps>
__device__ __forceinline__ void dot_levels(SlotPairs<S>& z, const unsigned char* keys, const unsigned char* scales,
                                           const uint2* operands, const int32_t* code_sums, int dim) {
    const int group = Steps ? 32 * Steps : group_size(F, dim), steps = round_up(dim, 32) / 32;
    const unsigned char* const own = own_keys<F, F == Format::int8 ? 2 : 1>(keys);
    const unsigned char* const next = keys + ((own - keys) ^ 64);
    for (int g = 0; g * group < dim; ++g) {
        int32_t d[S::kQuads][4] = {};
        const auto multiply_step = [&](int s) {
            uint32_t x[4];
            load_key_codes<F>(x, own, next, s);
            const bool other = !Steps && group == 16 && lane_b() / 2 != g % 2;  // half of the dims are another group's
#pragma unroll
            for (int q = 0; q < S::kQuads; ++q) {
                const uint2 w = operands[(q * steps + s) * kWarp + lane()];
                mma_s8(d[q], x, {other ? 0 : w.x, other ? 0 : w.y});
            }
        };
        if constexpr (Steps > 0) {
#pragma unroll
            for (int s = 0; s < Steps; ++s) multiply_step(g * Steps + s);
        } else {
            for (int s = g * group / 32; 32 * s < (g + 1) * group; ++s) multiply_step(s);
        }
        const float2 scale = scale_pair(scales, g);
#pragma unroll
        for (int q = 0; q < S::kQuads; ++q) {
            const int of_row = F == Format::int2 ? code_sums[g * S::kRows + 4 * q] : 0;
            z[q][0] += scale.x * level_sum<F>(d[q][0], d[q][1], of_row);
            z[q][1] += scale.y * level_sum<F>(d[q][2], d[q][3], of_row);
        }
    }
}
// code_sums: of the lane's first row, int2 only.
template <class S, Format F>
__device__ __forceinline__ void dot_codes(SlotPairs<S>& z, const unsigned char* keys, const unsigned char* scales,
                                          const uint2* operands, const int32_t* code_sums, int dim) {
    constexpr int kSteps = F == Format::int8 ? 4 : F == Format::int4 ? 2 : 1;
    if (group_size(F, dim) == 32 * kSteps) {
        dot_levels<S, F, kSteps>(z, keys, scales, operands, code_sums, dim);
    } else {
        dot_levels<S, F, 0>(z, keys, scales, operands, code_sums, dim);
    }
}

// --- p . v -------------------------------------------------------------------------------------------------------------

// p of a lane's two slots as a B operand: two terms in its row's columns, k 2 b + j + 8 r slot 4 b + 2 j + r.
template <Format F>
__device__ __forceinline__ void load_shares(uint32_t (&w)[2], float first, float second) {
    w[0] = transpose8(two_terms<F>(first));
    w[1] = transpose8(two_terms<F>(second));
}

template <class S>
__device__ __forceinline__ void add_f32(Sums<S>& sums, const SlotPairs<S>& p, const Masks<S>& masks,
                                        const unsigned char* values, const Staged& how, int tiles) {
#pragma unroll 1
    for (int slot = 0; slot < kSlots; ++slot) {
        float share[S::kQuads];
        bool read[S::kQuads];
#pragma unroll
        for (int q = 0; q < S::kQuads; ++q) {
            const int from = slot / 2 * 4 + lane_b();
            const float even = __shfl_sync(kAllLanes, p[q][0], from), odd = __shfl_sync(kAllLanes, p[q][1], from);
            share[q] = slot % 2 ? odd : even;
            read[q] = masks[q] >> slot & 1;
        }
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
            if (t >= tiles) break;
            const uint2 v = value_pair(values, how, slot, t);
#pragma unroll
            for (int q = 0; q < S::kQuads; ++q) {
                if (!read[q]) continue;
                sums.acc[q][t][0] = fmaf(share[q], __uint_as_float(v.x), sums.acc[q][t][0]);
                sums.acc[q][t][2] = fmaf(share[q], __uint_as_float(v.y), sums.acc[q][t][2]);
            }
        }
    }
}

// What of a word of two slots a mask keeps; the others must be zeros before any product: 0 * NaN is NaN.
__device__ inline uint32_t kept(uint32_t mask, int slot) {
    return (mask >> slot & 1 ? 0xFFFFu : 0u) | (mask >> (slot + 1) & 1 ? 0xFFFF0000u : 0u);
}
// The operand words of a tile of V under a mask.
__device__ __forceinline__ void load_values(uint32_t (&x)[4], const unsigned char* values, const Staged& how, int tile,
                                            uint32_t mask) {
    const int b = lane_b();
    const uint2 first = value_pair(values, how, 2 * b, tile), second = value_pair(values, how, 2 * b + 1, tile);
    const uint32_t of_first = kept(mask, 4 * b), of_second = kept(mask, 4 * b + 2);
    x[0] = first.x & of_first, x[1] = first.y & of_first, x[2] = second.x & of_second, x[3] = second.y & of_second;
}

// `alike`: all rows read the same slots. Where they do not, a quad's rows are added one after the other, each with its own zeros:
// a product has all rows in it, and what one may not read may be NaN.
template <class S, Format F>
__device__ __forceinline__ void add_pairs(Sums<S>& sums, const SlotPairs<S>& p, const Masks<S>& masks, bool alike,
                                          const unsigned char* values, const Staged& how, int tiles) {
    uint32_t w[S::kQuads][2], x[4];
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        uint32_t even_odd[2];
        load_shares<F>(even_odd, p[q][0], p[q][1]);
        w[q][0] = __byte_perm(even_odd[0], even_odd[1], 0x5410);  // slots 4 b, 4 b + 1
        w[q][1] = __byte_perm(even_odd[0], even_odd[1], 0x7632);  // slots 4 b + 2, 4 b + 3
    }
    if (alike) {
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
            if (t >= tiles) break;
            load_values(x, values, how, t, masks[0]);
#pragma unroll
            for (int q = 0; q < S::kQuads; ++q) multiply<F>(sums.acc[q][t], x, w[q]);
        }
        return;
    }
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
#pragma unroll 1
        for (int r = 0; r < 4; ++r) {
            const uint32_t mask = __shfl_sync(kAllLanes, masks[q], r);
#pragma unroll
            for (int t = 0; t < S::kTiles; ++t) {
                if (t >= tiles) break;
                float d[4] = {};
                load_values(x, values, how, t, mask);
                multiply<F>(d, x, w[q]);
#pragma unroll
                for (int i = 0; i < 4; ++i) sums.acc[q][t][i] += lane_b() == r ? d[i] : 0.0f;
            }
        }
    }
}

// Every: tiles that share a group of scales, at least.
template <class S, Format F, int Every>
__device__ __forceinline__ void add_levels(Sums<S>& sums, const SlotPairs<S>& p, const Masks<S>& masks,
                                           const unsigned char* values, const unsigned char* scales, const Staged& how,
                                           int dim) {
    const int b = lane_b(), group = group_size(F, dim), tiles = dim / 16;
    const int line = F == Format::int8 ? b : F == Format::int4 ? b / 2 : 0;
    uint32_t w[S::kQuads][2];
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
        if (t >= tiles) break;
        if (t % Every == 0) {
            const float2 scale = scale_pair(scales, 16 * t / group);
#pragma unroll
            for (int q = 0; q < S::kQuads; ++q) {  // a scale of a hidden slot may be NaN
                const uint32_t own = masks[q] >> (2 * lane_a());
                load_shares<F>(w[q], own & 1 ? p[q][0] * scale.x : 0.0f, own & 2 ? p[q][1] * scale.y : 0.0f);
            }
        }
        const uint2 words = value_pair(values, how, line, t);
        uint32_t x[4];
        split_values<F>(words.x, b, x[0], x[2]);
        split_values<F>(words.y, b, x[1], x[3]);
#pragma unroll
        for (int q = 0; q < S::kQuads; ++q) mma_bf16(sums.acc[q][t], x, w[q]);
    }
}
template <class S, Format F>
__device__ __forceinline__ void add_codes(Sums<S>& sums, const SlotPairs<S>& p, const Masks<S>& masks,
                                          const unsigned char* values, const unsigned char* scales, const Staged& how,
                                          int dim) {
    constexpr int kEvery = F == Format::int2 ? 2 : 4;
    if (group_size(F, dim) % (16 * kEvery) == 0) {
        add_levels<S, F, kEvery>(sums, p, masks, values, scales, how, dim);
    } else {
        add_levels<S, F, 1>(sums, p, masks, values, scales, how, dim);
    }
}

}  // namespace kvstrata::cuda
