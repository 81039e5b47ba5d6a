// How attend is cut on CUDA, for host and device: a row into chunks of its list and tiles of its query rows, a block of threads
// into warps, and a page into halves that are staged in shared memory.
//
// Query row n of a row is query n / G of head n % G. Four successive ones are a quad: the eight columns of a matrix product hold
// two terms of each.
#pragma once

#include <algorithm>

#include "cuda/device/page.cuh"
#include "cuda/device/rotate.cuh"
#include "cuda/device/rows.cuh"
#include "ops/attend.h"

namespace kvstrata::cuda {

inline constexpr int kMinChunk = 8, kMaxChunk = 64;  // entries
inline constexpr int kChunksWanted = 64;             // of a list, as long as chunks stay within those bounds
inline constexpr int kFewRows = 16;    // up to so many query rows, the warps of a block read different pages
inline constexpr int kSplitRows = 64;  // up to so many, a list is cut into chunks

constexpr int chunk_of(int entries) {
    int chunk = kMinChunk;
    while (chunk < kMaxChunk && 2 * chunk <= entries / kChunksWanted) chunk *= 2;
    return chunk;
}
constexpr int chunks_of(int entries) {
    const int chunk = chunk_of(entries), chunks = (entries + chunk - 1) / chunk;
    return chunks > 1 ? chunks : 1;
}
// Most chunks of a list of up to `entries` entries: without its trailing -1 it may have more than with them. Only grows.
constexpr int most_chunks(int entries) {
    const int fine = (entries + kMinChunk - 1) / kMinChunk, coarse = (entries + kMaxChunk - 1) / kMaxChunk;
    const int most = fine < 2 * kChunksWanted ? fine : 2 * kChunksWanted;
    return most > coarse ? most : coarse > 1 ? coarse : 1;
}

// Dims: of a head, at most, or Exact: all known when compiled. Team: all warps of a block read each page, for different query rows;
// else different pages for the same ones.
template <int Dims, bool Exact, bool Team, int Quads, int Warps, int Blocks>
struct Shape {
    static constexpr int kDims = Dims, kTiles = Dims / 16;
    static constexpr bool kExact = Exact, kTeam = Team;
    static constexpr int kQuads = Quads;  // of a warp
    static constexpr int kWarps = Warps, kThreads = Warps * kWarp;
    static constexpr int kBlocks = Blocks;  // of an SM at once, as registers go
    static constexpr int kWarpRows = 4 * Quads, kRows = kWarpRows * (Team ? Warps : 1);  // query rows
    static constexpr int kWalkers = Team ? 1 : Warps;                                    // who read different pages
    static constexpr int kWalkerThreads = kThreads / kWalkers;
};

// Partials of a row in the workspace: f32, one per chunk of a team; one of quantized pages (rotated) and one of full pages per
// chunk otherwise. [16] of which the first is the number of chunks as int32, then {maximum, total} [parts][rows], then sums of
// p v relative to the maximum [parts][rows][padded dim].
struct Partials {
    int rows, parts, stride;

    constexpr int64_t stat(int part, int row) const { return 16 + 2 * (static_cast<int64_t>(part) * rows + row); }
    constexpr int64_t sums(int part, int row) const {
        const int64_t stats = (2 * static_cast<int64_t>(parts) * rows + 15) / 16 * 16;
        return 16 + stats + (static_cast<int64_t>(part) * rows + row) * stride;
    }
    constexpr int64_t floats() const { return (sums(parts, 0) + 15) / 16 * 16; }
};
constexpr int parts_of_chunk(int rows) { return rows <= kFewRows ? 2 : 1; }
constexpr Partials partials_of(int rows, int entries, int head_dim) {
    return {rows, most_chunks(entries) * parts_of_chunk(rows), padded_dim(head_dim)};
}

struct ListRow {
    ops::AttendRow row;
    int64_t partials;  // f32 index in the workspace
};

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// A page in shared memory: K with its scales, then V with its own. Their chunks of 16 bytes lie so that what a warp reads at once
// lies in different banks: those of K are swizzled, lines of V are `value_stride` bytes apart.
struct Staged {
    int key_chunks, swizzle;
    int value_lines, line_chunks, value_stride;
    int scale_chunks;                      // of K or of V
    int key_scales, values, value_scales;  // bytes to them from K
    int values_in_page, key_scales_in_page, value_scales_in_page;
    int bytes;
};
// Where a chunk of K lies: lines 2 b and 2 b + 1 (16-bit, int8), b (int4) or b / 2 (int2) of lanes b = 0..3 do not collide.
constexpr int swizzle_of(Format f) {
    if (f == Format::f32 || f == Format::int2) return 0;
    return f == Format::int4 ? 2 : 6;
}
constexpr int swizzled(int chunk, int swizzle) { return chunk ^ (chunk >> 2 & swizzle); }

constexpr Staged staged(Format f, int head_dim) {
    const int dim = padded_dim(head_dim), half = static_cast<int>(half_bytes(f, head_dim));
    Staged s{};
    s.key_chunks = half / 16;
    s.swizzle = swizzle_of(f);
    s.value_lines = value_lines(f);
    s.line_chunks = dim / 4;
    s.value_stride = dim * 4 + (f == Format::f32 ? 0 : is_full(f) ? 16 : 32);
    s.scale_chunks = static_cast<int>(scale_bytes(f, head_dim)) / 16;
    s.key_scales = round_up(half, 128);
    s.values = round_up(s.key_scales + s.scale_chunks * 16, 128);
    s.value_scales = s.values + s.value_lines * s.value_stride;
    s.values_in_page = half;
    s.key_scales_in_page = 2 * half;
    s.value_scales_in_page = 2 * half + s.scale_chunks * 16;
    s.bytes = round_up(s.value_scales + s.scale_chunks * 16, 128);
    return s;
}
struct AttendArgs {
    RowBatch<ListRow> batch;
    Pools pools;
    Rotation rotation;  // where a pool is quantized
    Staged staged[6];   // by format
    float* workspace;
    float scale, softcap;
    int32_t window, group, head_dim;
    int32_t tiles;       // of query rows, at most
    int32_t ring_bytes;  // shared memory in which a walker stages pages
    uint32_t formats;    // bit f: a pool has format f
    DType q_dtype, out_dtype;
};

// Bytes of the query rows as operands of products, in the largest of the forms (attend_queries.cuh).
constexpr int operand_bytes(int rows, int head_dim) { return rows / 4 * round_up(head_dim, 32) * 16; }

template <class S>
__device__ __forceinline__ int dim_of(const AttendArgs& args) {
    return S::kExact ? S::kDims : args.head_dim;
}
template <class S, Format F>
__device__ __forceinline__ Staged staged_of(const AttendArgs& args) {
    if constexpr (S::kExact) {
        return staged(F, S::kDims);
    } else {
        return args.staged[static_cast<int>(F)];
    }
}

}  // namespace kvstrata::cuda
