// Logits of a pair of pages under a group of tiles of window queries, by one warp.
//
// Keys are the A operand: rows a and a + 8 of a product are slots 2 a and 2 a + 1 of a page, so a lane's two words of a line lie
// side by side. Lane 4 a + b then holds, of each page and tile, slots 2 a and 2 a + 1 under queries 2 b and 2 b + 1.
#pragma once

#include "cuda/device/math.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/window_pages.cuh"

namespace kvstrata::cuda {

using Logits = float[kPair][kGroupTiles][4];  // r: slot 2 a + (r >> 1), query 2 b + (r & 1)

// Up to four tiles of one row, by their places in its operands.
struct TileGroup {
    int64_t row;  // first tile of the row
    int tile[kGroupTiles];
    int count;
};

__device__ inline TileGroup successive(int64_t row, int first, int end) {
    return {row, {first, first + 1, first + 2, first + 3}, min(kGroupTiles, end - first)};
}

// visit(page, tile, r) for what a lane holds.
template <class Visit>
__device__ __forceinline__ void each_logit(const TileGroup& tiles, Visit visit) {
#pragma unroll
    for (int j = 0; j < kGroupTiles; ++j) {
        if (j >= tiles.count) break;
#pragma unroll
        for (int p = 0; p < kPair; ++p) {
#pragma unroll
            for (int r = 0; r < 4; ++r) visit(p, j, r);
        }
    }
}

__device__ inline int slot_lane() { return lane() / 4; }
__device__ inline int query_lane() { return lane() % 4; }

// The place among all queries' of the one that a logit belongs to.
__device__ inline int64_t column_of(const TileGroup& tiles, int j, int r) {
    return (tiles.row + tiles.tile[j]) * kColumns + 2 * query_lane() + r % 2;
}

// The words of a lane's two slots in a line of K.
__device__ inline uint2 two_words(const unsigned char* page, int line) {
    return __ldg(reinterpret_cast<const uint2*>(page) + line * (kSlots / 2) + slot_lane());
}

// Of a line of two dims, what lies beyond the head dimension as zeros: padding may hold anything.
template <bool Whole>
__device__ inline uint2 two_pairs(const unsigned char* page, int line, int dim) {
    if (!Whole && 2 * line >= dim) return {0, 0};
    uint2 words = two_words(page, line);
    if (!Whole && 2 * line + 1 == dim) words.x &= 0xFFFF, words.y &= 0xFFFF;
    return words;
}

template <Format F>
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    if constexpr (F == Format::bf16) return mma_bf16(d, a, b);
    mma_f16(d, a, b);
}

// 32 dims of 16-bit pages under one term of the queries.
template <Format F>
__device__ __forceinline__ void add_term(const uint32_t (&a)[kPair][2][4], const uint4* words, int64_t tile_words,
                                         const TileGroup& tiles, Logits& z) {
#pragma unroll
    for (int j = 0; j < kGroupTiles; ++j) {
        if (j >= tiles.count) break;
        const uint4 b = __ldg(words + (tiles.row + tiles.tile[j]) * tile_words);
#pragma unroll
        for (int p = 0; p < kPair; ++p) {
            multiply<F>(z[p][j], a[p][0], b.x, b.y);
            multiply<F>(z[p][j], a[p][1], b.z, b.w);
        }
    }
}

template <bool Whole>
__device__ __forceinline__ void load_steps(const PagePair& pages, int pair, int dim, uint32_t (&a)[kPair][2][4]) {
#pragma unroll
    for (int p = 0; p < kPair; ++p) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const int line = 16 * pair + 8 * step + query_lane();
            const uint2 low = two_pairs<Whole>(pages.page[p], line, dim);
            const uint2 high = two_pairs<Whole>(pages.page[p], line + 4, dim);
            a[p][step][0] = low.x, a[p][step][1] = low.y, a[p][step][2] = high.x, a[p][step][3] = high.y;
        }
    }
}

// Further terms have sums of their own: where the first one's are not finite, the others would make NaN of an Inf.
template <Format F, bool Several>
__device__ __forceinline__ void half_products(const PagePair& pages, const Operands& o, const TileGroup& tiles, int dim,
                                              Logits& z) {
    constexpr OperandKind kKind = operand_of(F);
    const int pairs = step_pairs(dim), terms = Several ? o.terms[kKind] : 1;
    const int64_t term_words = static_cast<int64_t>(pairs) * kWarp, tile_words = term_words * terms;
    const uint4* words = reinterpret_cast<const uint4*>(o.words[kKind]) + lane();
    Logits rest = {};
    for (int pair = 0; pair < pairs; ++pair, words += kWarp) {
        uint32_t a[kPair][2][4];
        if (32 * pair + 32 <= dim) {
            load_steps<true>(pages, pair, dim, a);
        } else {
            load_steps<false>(pages, pair, dim, a);
        }
        add_term<F>(a, words, tile_words, tiles, z);
        for (int term = 1; Several && term < terms; ++term) {
            add_term<F>(a, words + term * term_words, tile_words, tiles, rest);
        }
    }
    if constexpr (Several) {
        each_logit(tiles, [&](int p, int j, int r) { z[p][j][r] += isfinite(z[p][j][r]) ? rest[p][j][r] : 0.0f; });
    }
    if constexpr (F == Format::f16) {
        each_logit(tiles, [&](int p, int j, int r) { z[p][j][r] *= __ldg(o.unscale + column_of(tiles, j, r)); });
    }
}

// One dim at a time, as on the CPU.
__device__ __forceinline__ void float_products(const PagePair& pages, const Operands& o, const TileGroup& tiles,
                                               int dim, Logits& z) {
    const auto* const words = reinterpret_cast<const float2*>(o.words[kF32]) + query_lane();
    const int64_t tile_words = static_cast<int64_t>(dim) * (kColumns / 2);
#pragma unroll 4
    for (int d = 0; d < dim; ++d) {
        float k[kPair][2];
#pragma unroll
        for (int p = 0; p < kPair; ++p) {
            const uint2 two = two_words(pages.page[p], d);
            k[p][0] = __uint_as_float(two.x), k[p][1] = __uint_as_float(two.y);
        }
#pragma unroll
        for (int j = 0; j < kGroupTiles; ++j) {
            if (j >= tiles.count) break;
            const float2 q = __ldg(words + (tiles.row + tiles.tile[j]) * tile_words + d * (kColumns / 2));
#pragma unroll
            for (int p = 0; p < kPair; ++p) {
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    z[p][j][2 * s] = fmaf(q.x, k[p][s], z[p][j][2 * s]);
                    z[p][j][2 * s + 1] = fmaf(q.y, k[p][s], z[p][j][2 * s + 1]);
                }
            }
        }
    }
}

// Dims 16 unit + 4 b to + 3 of one of a lane's slots as signed bytes: int8 the codes, int4 16 times, int2 2 c - 3.
template <Format F>
__device__ inline uint32_t bytes_of(uint32_t word) {
    if constexpr (F == Format::int8) return word;
    if constexpr (F == Format::int4) return word << (query_lane() % 2 ? 0 : 4) & 0xF0F0F0F0u;
    return (((word >> 2 * query_lane() << 1 & 0x06060606u) | 0x80808080u) - 0x03030303u) ^ 0x80808080u;
}
template <Format F>
__device__ inline uint2 two_units(const unsigned char* page, int unit) {
    const int line = F == Format::int8   ? 4 * unit + query_lane()
                     : F == Format::int4 ? 2 * unit + query_lane() / 2
                                         : unit;
    const uint2 words = two_words(page, line);
    return {bytes_of<F>(words.x), bytes_of<F>(words.y)};
}

// The whole-number products of one group of dims, as on the CPU: exact.
template <Format F>
__device__ __forceinline__ void group_products(const PagePair& pages, const Operands& o, const TileGroup& tiles,
                                               int dim, int first, int end, int (&high)[kPair][kGroupTiles][4],
                                               int (&low)[kPair][kGroupTiles][4]) {
    const int64_t tile_words = static_cast<int64_t>(step_pairs(dim)) * kWarp;
    const auto* const words = reinterpret_cast<const uint4*>(o.words[kCodes]) + lane();
    for (int unit = first; unit < end;) {
        const bool two = unit % 2 == 0 && unit + 1 < end;
        uint2 a[kPair][2];
#pragma unroll
        for (int p = 0; p < kPair; ++p) {
            a[p][0] = two_units<F>(pages.page[p], unit);
            a[p][1] = two ? two_units<F>(pages.page[p], unit + 1) : uint2{0, 0};
        }
#pragma unroll
        for (int j = 0; j < kGroupTiles; ++j) {
            if (j >= tiles.count) break;
            uint4 b = __ldg(words + (tiles.row + tiles.tile[j]) * tile_words + unit / 2 * kWarp);
            if (unit % 2) b.x = b.z, b.y = b.w;
#pragma unroll
            for (int p = 0; p < kPair; ++p) {
                const uint32_t codes[4] = {a[p][0].x, a[p][0].y, a[p][1].x, a[p][1].y};
                mma_s8(high[p][j], codes, {b.x, b.z});
                mma_s8(low[p][j], codes, {b.y, b.w});
            }
        }
        unit += two ? 2 : 1;
    }
}

template <Format F>
__device__ __forceinline__ void code_products(const PagePair& pages, const Operands& o, const TileGroup& tiles, int dim,
                                              Logits& z) {
    for (int first = 0, g = 0; first < dim; first += pages.group, ++g) {
        int high[kPair][kGroupTiles][4] = {}, low[kPair][kGroupTiles][4] = {};
        group_products<F>(pages, o, tiles, dim, first / 16, (first + pages.group) / 16, high, low);
        float scale[kPair][2];
#pragma unroll
        for (int p = 0; p < kPair; ++p) {
            const auto* const scales = reinterpret_cast<const uint32_t*>(key_scales(pages.page[p], F, dim));
            const uint32_t two = __ldg(scales + g * (kSlots / 2) + slot_lane());
            scale[p][0] = __uint_as_float(two << 16), scale[p][1] = __uint_as_float(two & 0xFFFF0000u);
        }
        each_logit(tiles, [&](int p, int j, int r) {
            int sum = 256 * high[p][j][r] + low[p][j][r];
            if constexpr (F == Format::int4) sum >>= 4;
            z[p][j][r] += scale[p][r / 2] * __int2float_rn(sum);
        });
    }
    each_logit(tiles, [&](int p, int j, int r) {
        const float2 f = __ldg(o.factors + column_of(tiles, j, r));
        z[p][j][r] = z[p][j][r] * f.x + f.y;
    });
}

template <Format F>
__device__ __forceinline__ void products(const PagePair& pages, const Operands& o, const TileGroup& tiles, int dim,
                                         Logits& z) {
    if (o.terms[operand_of(F)] == 1) return half_products<F, false>(pages, o, tiles, dim, z);
    half_products<F, true>(pages, o, tiles, dim, z);
}

// z as in ops/window.h, whatever a query may read.
__device__ __forceinline__ void find_logits(const PagePair& pages, const Operands& o, const TileGroup& tiles, int dim,
                                            float scale, float softcap, Logits& z) {
#pragma unroll
    for (int i = 0; i < kPair * kGroupTiles * 4; ++i) z[i / (4 * kGroupTiles)][i / 4 % kGroupTiles][i % 4] = 0.0f;
    switch (pages.format) {
        case Format::f32: float_products(pages, o, tiles, dim, z); break;
        case Format::bf16: products<Format::bf16>(pages, o, tiles, dim, z); break;
        case Format::f16: products<Format::f16>(pages, o, tiles, dim, z); break;
        case Format::int8: code_products<Format::int8>(pages, o, tiles, dim, z); break;
        case Format::int4: code_products<Format::int4>(pages, o, tiles, dim, z); break;
        default: code_products<Format::int2>(pages, o, tiles, dim, z); break;
    }
    each_logit(tiles, [&](int p, int j, int r) {
        float& x = z[p][j][r];
        x *= scale;
        if (softcap > 0) x = softcap * tanh_(__fdiv_rn(x, softcap));
    });
}

// A, 0 where the query does not read the slot.
__device__ inline float share_of(float z, float lse) { return z == -INFINITY ? 0.0f : exp_(z - lse); }

// -inf where a query does not read a slot. Tiles: `of_head` to a head.
__device__ __forceinline__ void hide_unread(const PagePair& pages, const ops::WindowRow& row, const TileGroup& tiles,
                                            int of_head, int window, Logits& z) {
#pragma unroll
    for (int p = 0; p < kPair; ++p) {
        if (pages.slots[p] == kAllSlots && pages.positions[p] == nullptr) continue;
        const int mine = pages.slots[p] >> 2 * slot_lane() & 3;
        int2 at = {0, 0};
        if (pages.positions[p] != nullptr) {
            at = __ldg(reinterpret_cast<const int2*>(pages.positions[p]) + slot_lane());
        }
#pragma unroll
        for (int j = 0; j < kGroupTiles; ++j) {
            if (j >= tiles.count) break;
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                bool read = mine >> r / 2 & 1;
                const int t = tiles.tile[j] % of_head * kColumns + 2 * query_lane() + r % 2;
                if (pages.positions[p] != nullptr && t < row.queries) {
                    const int64_t age = static_cast<int64_t>(row.q_pos[t]) - (r / 2 ? at.y : at.x);
                    read = read && age >= 0 && (!window || age < window);
                }
                if (!read) z[p][j][r] = -INFINITY;
            }
        }
    }
}

// A warp's pairs of pages of a unit under heads [first_head, end_head) of row r of all: for each pair and head a `Head` of its own,
// add(head, z, j, lse, queries) for each of its tiles in order (tile j of a group; lse and queries from its first on), then
// done(head, pair, g).
template <class Head, class Add, class Done>
__device__ __forceinline__ void reduce_heads(const UnitPages& pages, const WindowCall& call, const ops::WindowRow& row,
                                             int64_t r, int first_head, int end_head, const Add& add,
                                             const Done& done) {
    const int of_head = tiles_of(row.queries), end = end_head * of_head;
    for (int i = warp(); i < pages.count; i += kUnitWarps) {
        fetch_ahead(pages, i + kUnitWarps, call.head_dim);
        Head head;
        int g = first_head, tile = 0;  // of a group's next tile
        for (int first = first_head * of_head; first < end; first += kGroupTiles) {
            const TileGroup tiles = successive(r * call.operands.tiles, first, end);
            Logits z;
            find_logits(pages.pairs[i], call.operands, tiles, call.head_dim, call.scale, call.softcap, z);
            hide_unread(pages.pairs[i], row, tiles, of_head, call.window, z);
#pragma unroll
            for (int j = 0; j < kGroupTiles; ++j) {
                if (j >= tiles.count) break;
                add(head, z, j, call.lse_of(r, g) + tile * kColumns, row.queries - tile * kColumns);
                if (++tile < of_head) continue;
                done(head, pages.pairs[i], g);
                head = {}, tile = 0, ++g;
            }
        }
    }
}

}  // namespace kvstrata::cuda
