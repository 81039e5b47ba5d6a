// The walk of attend: a block of threads, one tile of a row's query rows, one chunk of its list (or all of it).
//
// Few query rows: each warp reads its own pages, several units of them under way, and the warps' sums are joined at the end.
// More: all warps read the same pages, each for its own rows. The list is walked once per format, quantized ones first: sums over
// them are in the rotated domain.
//
// A page moves once through shared memory, so the walk is bound by memory as long as a warp's instructions per page stay below
// the four that an SM issues per clock in the page's time (H200: 20.7 bytes per clock and SM; D 128: bf16 396 clocks, int8 201,
// int4 105, int2 62). One quad of rows takes about 250 per page of any of those formats, two about 350.
#pragma once

#include "cuda/attend_products.cuh"
#include "cuda/attend_ring.cuh"
#include "cuda/device/math.cuh"

namespace kvstrata::cuda {

// How far a logit may exceed the running maximum before sums are rescaled. p is at most e^8, which f16 holds.
inline constexpr float kSlack = 8.0f;

// What a block has in shared memory beside operands and rings.
template <class S>
struct Block {
    Entries<S> entries;
    QueryRows<S> rows;
    float2 stats[S::kWarps][S::kWarpRows];  // maximum and total of each warp
};

// What a lane knows of its query rows, one of each quad.
template <class S>
struct LaneRows {
    int query[S::kQuads];     // its masks' place
    int64_t line[S::kQuads];  // its logits' [entries, 16], or -1: no such row
};

template <class S>
constexpr int block_bytes() {
    return round_up(static_cast<int>(sizeof(Block<S>)), 128);
}
// Dynamic shared memory: Block, operands, rings.
template <class S>
constexpr int shared_bytes(int head_dim, int ring_bytes) {
    return block_bytes<S>() + operand_bytes(S::kRows, head_dim) + S::kWalkers * ring_bytes;
}

// From q . k to finished logits: scaled, capped, biased, -inf where the slot is not read.
__device__ inline float finish_logit(float z, float scale, float softcap, const float* bias, bool read) {
    z *= scale;
    if (softcap > 0.0f) z = softcap * tanh_(__fdiv_rn(z, softcap));
    if (bias && read) z += *bias;
    return read ? z : -INFINITY;
}

// Raises the maxima that a logit exceeds by too much, each row for itself, and brings its sums to the new one.
template <class S>
__device__ __forceinline__ void raise(Sums<S>& sums, const SlotPairs<S>& z) {
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        float top = fmaxf(z[q][0], z[q][1]);  // passes over NaN
#pragma unroll
        for (int step = 4; step < kWarp; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
        if (!(top > sums.maximum[q] + kSlack)) continue;
        const float factor = exp_(sums.maximum[q] - top);
        sums.maximum[q] = top;
        sums.total[q] *= factor;
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
            for (float& x : sums.acc[q][t]) x *= factor;
        }
    }
}

// Softmax step of a page: logits in z become p; totals grow.
template <class S>
__device__ __forceinline__ void soften(Sums<S>& sums, SlotPairs<S>& z) {
    bool above = false;
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q)
        above = above || z[q][0] > sums.maximum[q] + kSlack || z[q][1] > sums.maximum[q] + kSlack;
    if (__any_sync(kAllLanes, above)) raise<S>(sums, z);
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
#pragma unroll
        for (float& x : z[q]) x = x == -INFINITY ? 0.0f : exp_(x - sums.maximum[q]);
        sums.total[q] += z[q][0] + z[q][1];
    }
}

template <class S>
__device__ __forceinline__ void clear(Sums<S>& sums) {
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        sums.maximum[q] = -INFINITY;
        sums.total[q] = 0.0f;
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
            for (float& x : sums.acc[q][t]) x = 0.0f;
        }
    }
}

// q . k of one page, of the warp's rows.
template <class S>
__device__ __forceinline__ void dot_page(SlotPairs<S>& z, Format format, const AttendArgs& args, const Block<S>& block,
                                         const unsigned char* operands, const unsigned char* keys, const Staged& how) {
    const int first_row = S::kTeam ? warp() * S::kWarpRows : 0, dim = args.head_dim;
    const int steps = is_full(format) ? padded_dim(dim) / 16 : round_up(dim, 32) / 32;
    const auto* const own = reinterpret_cast<const uint2*>(operands) + first_row / 4 * steps * kWarp;
    const unsigned char* const scales = keys + how.key_scales;
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) z[q][0] = z[q][1] = 0.0f;
    switch (format) {
        case Format::f32: return dot_f32<S>(z, keys, reinterpret_cast<const float*>(operands) + first_row, dim);
        case Format::bf16: return dot_pairs<S, Format::bf16>(z, keys, own, dim, one_term(format, args.q_dtype));
        case Format::f16: dot_pairs<S, Format::f16>(z, keys, own, dim, one_term(format, args.q_dtype)); break;
        case Format::int8: dot_codes<S, Format::int8>(z, keys, scales, own, block.rows, first_row, dim); break;
        case Format::int4: dot_codes<S, Format::int4>(z, keys, scales, own, block.rows, first_row, dim); break;
        case Format::int2: dot_codes<S, Format::int2>(z, keys, scales, own, block.rows, first_row, dim); break;
    }
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        const int n = first_row + 4 * q + lane_b();
#pragma unroll
        for (float& x : z[q])
            x = format == Format::f16 ? x * block.rows.factor[n] : x * block.rows.delta[n] + block.rows.centre[n];
    }
}

template <class S>
__device__ __forceinline__ void add_page(Sums<S>& sums, Format format, const SlotPairs<S>& p, const Masks<S>& masks,
                                         bool alike, const unsigned char* values, const Staged& how, int dim) {
    const int tiles = padded_dim(dim) / 16;
    switch (format) {
        case Format::f32: return add_f32<S>(sums, p, masks, values, how, tiles);
        case Format::bf16: return add_pairs<S, Format::bf16>(sums, p, masks, alike, values, how, tiles);
        case Format::f16: return add_pairs<S, Format::f16>(sums, p, masks, alike, values, how, tiles);
        case Format::int8: return add_codes<S, Format::int8>(sums, p, masks, values, how, dim);
        case Format::int4: return add_codes<S, Format::int4>(sums, p, masks, values, how, dim);
        case Format::int2: return add_codes<S, Format::int2>(sums, p, masks, values, how, dim);
    }
}

// The pages of the block's list, which `ring` brings; entry i of the block is entry `first` + i of the row.
template <class S>
__device__ __forceinline__ void walk_list(Sums<S>& sums, Ring<S>& ring, Format format, const Staged& how,
                                          const AttendArgs& args, const ops::AttendRow& row, const Block<S>& block,
                                          const LaneRows<S>& lanes, const unsigned char* operands, int first) {
    for (int i = S::kTeam ? 0 : warp(); i < block.entries.count; i += S::kWalkers) {
        const int at = block.entries.list[i], slot = 2 * lane_a();
        const int64_t entry = first + at;
        SlotPairs<S> z;
        Masks<S> masks;
        dot_page<S>(z, format, args, block, operands, ring.take(), how);
#pragma unroll
        for (int q = 0; q < S::kQuads; ++q) {
            masks[q] = block.entries.masks[at][lanes.query[q]];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float* const bias = row.bias ? row.bias + entry * kSlots + slot + j : nullptr;
                z[q][j] = finish_logit(z[q][j], args.scale, args.softcap, bias, masks[q] >> (slot + j) & 1);
                if (row.logits && lanes.line[q] >= 0)
                    row.logits[(lanes.line[q] * row.entries + entry) * kSlots + slot + j] = z[q][j];
            }
        }
        soften<S>(sums, z);
        add_page<S>(sums, format, z, masks, block.entries.alike[at], ring.take(), how, args.head_dim);
    }
}

}  // namespace kvstrata::cuda
