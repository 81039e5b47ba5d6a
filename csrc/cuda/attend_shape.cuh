// How attend is cut on CUDA, for host and device: a row into chunks of its list and tiles of its query rows, a block of threads
// into warps, and a page into units that are staged in shared memory.
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

template <int Tiles, int Quads, int Warps, bool Team>
struct Shape {
    static constexpr int kTiles = Tiles;  // of 16 dims, at most
    static constexpr int kQuads = Quads;  // of a warp
    static constexpr int kWarps = Warps;
    static constexpr bool kTeam =
        Team;  // all warps read each page, for different query rows; else different pages for the same
    static constexpr int kThreads = Warps * kWarp;
    static constexpr int kDims = Tiles * 16;
    static constexpr int kWarpRows = 4 * Quads;
    static constexpr int kRows = kWarpRows * (Team ? Warps : 1);  // query rows of a block
    static constexpr int kWalkers = Team ? 1 : Warps;             // who read different pages
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

struct AttendArgs {
    RowBatch<ListRow> batch;
    Pools pools;
    Rotation rotation;  // where a pool is quantized
    float* workspace;
    float scale, softcap;
    int32_t window, group, head_dim;
    int32_t tiles;       // of query rows, at most
    int32_t ring_bytes;  // shared memory in which a walker stages pages
    uint32_t formats;    // bit f: a pool has format f
    DType q_dtype, out_dtype;
};

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// A unit is K or V of a page with its scales. K lies there in chunks of 16 bytes at swizzled(); lines of V are `value_stride`
// apart: either way what a warp reads at once lies in different banks.
struct Staged {
    int key_chunks, key_scales;  // chunks of K; bytes to its scales
    int value_lines, line_chunks, value_stride, value_scales;
    uint32_t line_inverse;                // 2^22 / line_chunks, rounded up
    int scale_chunks;                     // of K or of V
    int64_t v, k_scales_at, v_scales_at;  // in the page
    int bytes;                            // of a unit
};
constexpr Staged staged(Format f, int head_dim) {
    const int dim = padded_dim(head_dim), keys = static_cast<int>(half_bytes(f, head_dim));
    Staged s{};
    s.key_chunks = keys / 16;
    s.key_scales = round_up(keys, 128);
    s.value_lines = value_lines(f);
    s.line_chunks = dim / 4;
    s.value_stride = dim * 4 + (f == Format::f32 ? 0 : is_full(f) ? 16 : 32);
    s.value_scales = s.value_lines * s.value_stride;
    s.line_inverse = static_cast<uint32_t>(((1 << 22) + s.line_chunks - 1) / s.line_chunks);
    s.scale_chunks = static_cast<int>(scale_bytes(f, head_dim) / 16);
    s.v = v_offset(f, head_dim);
    s.k_scales_at = k_scales_offset(f, head_dim);
    s.v_scales_at = v_scales_offset(f, head_dim);
    s.bytes = round_up((s.key_scales > s.value_scales ? s.key_scales : s.value_scales) + s.scale_chunks * 16, 128);
    return s;
}
constexpr int swizzled(int chunk) { return chunk ^ (chunk >> 2 & 6); }

// Bytes of the query rows as operands of products, in the largest of the forms (attend_queries.cuh).
constexpr int operand_bytes(int rows, int head_dim) { return rows / 4 * round_up(head_dim, 32) * 16; }

}  // namespace kvstrata::cuda
