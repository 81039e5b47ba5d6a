// Window queries over pages (ops/window.h): what score_window, score_max and measure share.
//
// Queries lie in tiles of 8, head by head; a tile belongs to one head. They are turned once per call into operands, as the
// formats of pages multiply them. A unit is 32 entries of a row; its pages go in pairs of one format through groups of up to 4
// tiles: one warp takes a pair of pages (2 x 16 slots) and a group (32 queries) at a time, so a page's words are loaded once for
// 32 queries and an operand's once for 32 slots.
//
// Bytes: a pass reads K of every page once from memory (its halves again from L1 for every further group of tiles). At D = 128
// and 128 queries a pass is bound by exp and the products alike, at about the time that bf16 pages take to arrive; with fewer
// queries, by the pages.
#pragma once

#include "common/places.h"
#include "cuda/device/page.cuh"
#include "cuda/device/rotate.cuh"
#include "cuda/device/rows.cuh"
#include "ops/window.h"

namespace kvstrata::cuda {

inline constexpr int kColumns = 8;       // queries of a tile
inline constexpr int kPair = 2;          // pages that a warp takes at a time,
inline constexpr int kGroupTiles = 4;    // and tiles
inline constexpr int kBlockTiles = 16;   // tiles of a block's units, about: heads are not cut where a head is reduced
inline constexpr int kUnitEntries = 32;  // of a unit: a lane looks one up
inline constexpr int kUnitWarps = 4;
inline constexpr int kUnitThreads = kUnitWarps * kWarp;
inline constexpr int kUnitsPerSm = 3;  // so that a thread may have 168 registers

using WindowRows = RowBatch<ops::WindowRow>;

__host__ __device__ constexpr int tiles_of(int queries) { return (queries + kColumns - 1) / kColumns; }
__host__ __device__ constexpr int chunks_of(int entries) { return (entries + kUnitEntries - 1) / kUnitEntries; }
// Heads whose tiles make a block.
__host__ __device__ constexpr int heads_of_block(int queries, int group) {
    const int tiles = tiles_of(queries), heads = tiles ? kBlockTiles / tiles : group;
    return heads < 1 ? 1 : heads < group ? heads : group;
}

// Blocks of the row of a batch that has most of them.
inline unsigned head_blocks(const WindowRows& rows, int group) {
    unsigned most = 0;
    for (int i = 0; i < rows.count; ++i) {
        const unsigned blocks = blocks_for(group, heads_of_block(rows.rows[i].queries, group));
        most = most < blocks ? blocks : most;
    }
    return most;
}

// Queries as formats of pages multiply them.
//
//   f32    f32 pages: [tile][D][8 queries]
//   bf16   bf16 pages: m16n8k16's B, the k steps in pairs: [tile][term][pair][32 lanes][2 steps][2 registers]
//   f16    f16 pages: likewise, of queries times a power of two
//   codes  quantized pages: R q = delta * (256 h + l), bytes h and l as m16n8k32's B; lane 4 a + b has, of query a and each 16
//          dims, dims 4 b to 4 b + 3: [tile][32 dims][32 lanes][2 times 16 dims][h, l]
// A query with more bits than the pages' type has further terms, each the rest of what the terms before it hold.
enum OperandKind { kF32, kBf16, kF16, kCodes, kOperandKinds };

struct Operands {
    uint32_t* words[kOperandKinds];  // [R, tiles, words of a tile]; null where no pool needs them
    float2* factors;                 // codes: [R, tiles, 8] delta, q . centre
    float* unscale;                  // f16: [R, tiles, 8]
    int32_t terms[kOperandKinds];
    int32_t tiles;  // of a row, at most
};

constexpr OperandKind operand_of(Format f) { return is_full(f) ? static_cast<OperandKind>(f) : kCodes; }
__host__ __device__ constexpr int step_pairs(int head_dim) { return (head_dim + 31) / 32; }
constexpr int tile_words(OperandKind kind, int head_dim, int terms) {
    return kind == kF32 ? head_dim * kColumns : step_pairs(head_dim) * kWarp * 4 * terms;
}
constexpr int terms_of(OperandKind kind, DType q) {
    if (kind == kBf16) return q == DType::bf16 ? 1 : q == DType::f16 ? 2 : 3;
    return kind == kF16 && q == DType::f32 ? 2 : 1;
}

// Operands for rows of up to so many tiles. pools null: of pages of every format.
Operands lay_out_operands(const ops::WindowParams& params, int tiles, Places& places);
// Fills them for the first row.queries queries of each row.
int fill_operands(const char* op, const WindowRows& rows, const ops::WindowParams& params, const Operands& operands,
                  cudaStream_t stream);

// Positions of slots that count.
struct Past {
    bool only = false;  // those before the row's oldest query,
    int32_t skip = 0;   // from this one on
};

// A call of score_window or measure; by value in every kernel.
struct WindowCall {
    Pools pools;
    Operands operands;
    float* partials;  // [R, chunks, G, T] log-sum-exps of units
    float* lse;       // [R, G, T]
    int32_t* past;    // [R, chunks] slots of the past; null: not counted
    int32_t group, head_dim, window;
    int32_t queries, chunks;  // T and units of a row, at most
    float scale, softcap;

    __device__ float* partial(int64_t row, int chunk, int head) const {
        return partials + ((row * chunks + chunk) * group + head) * queries;
    }
    __device__ float* lse_of(int64_t row, int head) const { return lse + (row * group + head) * queries; }
};

// The call's arrays in `places`.
WindowCall lay_out_window(const ops::WindowParams& params, bool count_past, Places& places);

// First pass: log-sum-exps of every query over the slots that it reads (of the past, if only they count), with the rows' sink
// logits or without, to call.lse and, if not null, to `out` [R, G, T] by its strides.
struct LseOut {
    float* at;
    int64_t stride_r, stride_g;
};
int find_lse(const char* op, const WindowRows& rows, const WindowCall& call, Past past, bool sinks, LseOut out,
             cudaStream_t stream);

}  // namespace kvstrata::cuda
