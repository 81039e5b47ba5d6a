// The walk of attend: a block of threads, one tile of a row's query rows, one chunk of its list (or all of it).
//
// Few query rows: each warp reads its own pages, several halves of them under way, and the warps' sums are joined at the end.
// More: all warps read the same pages, each for its own rows. The list is walked once per format, quantized ones first: sums over
// them are in the rotated domain.
//
// A page moves once through shared memory, so the walk is bound by memory as long as a warp's instructions per page stay below
// what an SM issues in the page's time: four per clock at best, some two and a half as a rule. H200, 20.7 bytes per clock and SM,
// D 128, for one quad of query rows and for two; instructions by the PTX of sm_90a, of which the assembler folds a seventh:
//   format   bytes   clocks   four per clock   one quad   two quads
//   bf16     8192    396      1584             280        360
//   int8     4160    201      804              475        600
//   int4     2176    105      420              415        555
//   int2     1280    62       248              525        750
// What a block does once, before and after its chunk, is as much as two more pages of each warp. Never timed on a device.
#pragma once

#include "cuda/attend_products.cuh"
#include "cuda/attend_ring.cuh"
#include "cuda/device/exp2.cuh"
#include "cuda/device/math.cuh"

namespace kvstrata::cuda {

// How far a logit may exceed the running maximum before sums are rescaled. p is at most e^8, which f16 holds.
inline constexpr float kSlack = 8.0f;
// The maximum before the first logit: finite, so that -inf stays below it.
inline constexpr float kNothing = -3.402823466e38f;

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
    int query[S::kQuads];                        // the place of its masks
    float factor[S::kQuads], centre[S::kQuads];  // q . k = factor * product + centre, of the pages of one format
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

// Before the pages of a format, whose operands are prepared.
template <class S, Format F>
__device__ __forceinline__ void load_factors(LaneRows<S>& lanes, const QueryRows<S>& rows, int first_row) {
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        const int n = first_row + 4 * q + lane_b();
        lanes.factor[q] = F == Format::f16 ? rows.factor[n] : is_full(F) ? 1.0f : rows.delta[n];
        lanes.centre[q] = is_full(F) ? 0.0f : rows.centre[n];
    }
}

// From scaled q . k to finished logits, where that is not all, and out with them. `entry` is the row's.
template <class S>
__device__ __forceinline__ void finish_logits(SlotPairs<S>& z, const Masks<S>& masks, const AttendArgs& args,
                                              const ops::AttendRow& row, const QueryRows<S>& rows, int first_row,
                                              int64_t entry) {
    const int slot = 2 * lane_a();
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (!(masks[q] >> (slot + j) & 1)) continue;
            if (args.softcap > 0.0f) z[q][j] = args.softcap * tanh_(__fdiv_rn(z[q][j], args.softcap));
            if (row.bias) z[q][j] += row.bias[entry * kSlots + slot + j];
        }
        const int64_t line = rows.line[first_row + 4 * q + lane_b()];
        if (!row.logits || line < 0) continue;
        float* const to = row.logits + (line * row.entries + entry) * kSlots + slot;
        to[0] = z[q][0], to[1] = z[q][1];
    }
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
        for (float& x : z[q]) x = exp_fast(x - sums.maximum[q]);
        sums.total[q] += z[q][0] + z[q][1];
    }
}

template <class S>
__device__ __forceinline__ void clear(Sums<S>& sums) {
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        sums.maximum[q] = kNothing;
        sums.total[q] = 0.0f;
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
            for (float& x : sums.acc[q][t]) x = 0.0f;
        }
    }
}

// q . k of one page, of the warp's rows from `first_row` on.
template <class S, Format F>
__device__ __forceinline__ void dot_page(SlotPairs<S>& z, const AttendArgs& args, const Block<S>& block,
                                         const unsigned char* operands, int first_row, const unsigned char* page,
                                         const Staged& how) {
    const int dim = dim_of<S>(args), steps = is_full(F) ? padded_dim(dim) / 16 : round_up(dim, 32) / 32;
    const auto* const own = reinterpret_cast<const uint2*>(operands) + first_row / 4 * steps * kWarp;
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) z[q][0] = z[q][1] = 0.0f;
    if constexpr (F == Format::f32) {
        dot_f32<S>(z, page, reinterpret_cast<const float*>(operands) + first_row, dim);
    } else if constexpr (is_full(F)) {
        dot_pairs<S, F>(z, page, own, dim, one_term(F, args.q_dtype));
    } else {
        const int32_t* const code_sums = block.rows.code_sums[0] + first_row + lane_b();
        dot_codes<S, F>(z, page, page + how.key_scales, own, code_sums, dim);
    }
}

template <class S, Format F>
__device__ __forceinline__ void add_page(Sums<S>& sums, const SlotPairs<S>& p, const Masks<S>& masks, bool alike,
                                         const unsigned char* page, const Staged& how, int dim) {
    const unsigned char* const values = page + how.values;
    if constexpr (F == Format::f32) {
        add_f32<S>(sums, p, masks, values, how, padded_dim(dim) / 16);
    } else if constexpr (is_full(F)) {
        add_pairs<S, F>(sums, p, masks, alike, values, how, padded_dim(dim) / 16);
    } else {
        add_codes<S, F>(sums, p, masks, values, page + how.value_scales, how, dim);
    }
}

// A block's memory and its place in the row.
template <class S>
struct Place {
    Block<S>& block;
    unsigned char *operands, *ring;  // the walker's
    int first_row;                   // of the warp among the block's rows
};

// The pages of the block's list, of format F; entry i of the block is entry `first` + i of the row. All threads call it.
template <class S, Format F>
__device__ __forceinline__ void walk_list(Sums<S>& sums, LaneRows<S>& lanes, const AttendArgs& args,
                                          const ops::AttendRow& row, const Place<S>& place, int first, bool prepared) {
    const Staged how = staged_of<S, F>(args);
    Block<S>& block = place.block;
    const int begin = S::kTeam ? 0 : warp();
    const bool plain = !(args.softcap > 0.0f) && !row.bias && !row.logits;
    Ring<S> ring(place.ring, args.ring_bytes, how, block.entries, begin);
    if (!prepared) {  // while the first pages are under way
        prepare_queries<S, F>(place.operands, block.rows, args, row);
        __syncthreads();
        load_factors<S, F>(lanes, block.rows, place.first_row);
    }
    for (int i = begin; i < block.entries.count; i += S::kWalkers) {
        const int at = block.entries.list[i];
        SlotPairs<S> z;
        Masks<S> masks;
        dot_page<S, F>(z, args, block, place.operands, place.first_row, ring.take_keys(), how);
#pragma unroll
        for (int q = 0; q < S::kQuads; ++q) {
            masks[q] = block.entries.masks[at][lanes.query[q]];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float x = (z[q][j] * lanes.factor[q] + lanes.centre[q]) * args.scale;
                z[q][j] = masks[q] >> (2 * lane_a() + j) & 1 ? x : -INFINITY;
            }
        }
        if (!plain) finish_logits(z, masks, args, row, block.rows, place.first_row, first + at);
        soften<S>(sums, z);
        add_page<S, F>(sums, z, masks, block.entries.alike[at], ring.take_values(), how, dim_of<S>(args));
    }
}

}  // namespace kvstrata::cuda
