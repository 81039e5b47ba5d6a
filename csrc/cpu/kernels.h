// The table of kernels: plain functions over single pages and lines, compiled once per instruction-set level.
//
// Kernels see addresses only: no page ids, no rows, no tables. This header is shared by code compiled for different
// instruction sets, so it holds plain structs and no function with a body.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::cpu {

inline constexpr int kTileRows = 64;  // query rows that visit a page together
// From this many query rows on they read a block in matrix tiles, where a level has those: fewer fill one register tile, which
// keeps up with memory, and matrix tiles would wait for their loads.
inline constexpr int kMatrixRows = 5;

// Query rows as quantized pages read them: R q = delta * codes.
struct QueryCodes {
    int16_t* codes;  // [rows, stride] dims of each quad in the order 0, 2, 1, 3
    float* delta;    // [rows] max |R q| / 32639; 0 for a zero query, NaN for one that holds NaN or Inf
    float* centre;   // [rows] q . centre
};

// Query rows as matrix tiles read them, two terms each, and what they read of a block.
struct MatrixOperands {
    uint16_t *high, *low;   // bf16 [rows, pitch] q = high + low; 0 beyond head_dim
    uint8_t* exact;         // [rows] whether low is 0: then it must not meet an infinite key
    int8_t *upper, *lower;  // [rows, stride] QueryCodes = 256 * upper + lower, dims in order
    unsigned char* block;   // [kBlock * 32 * stride] K codes, or V, of a block; a multiple of 64 bytes
    int32_t pitch;          // head_dim in whole tiles of 32
};

inline constexpr int kBlock = 8;  // pages that visit a tile together: one softmax step for all of them

// Pages of one format in the order of their list.
struct PageBlock {
    const unsigned char* pages[kBlock];
    const unsigned char* ahead[kBlock + 1];  // of the same format: what to prefetch meanwhile, ends with null
    const float* bias[kBlock];               // [16] each, or null
    int32_t count;                           // 1..kBlock
};

// The running online softmax of up to kTileRows query rows over the pages of one KV row.
struct AttendTile {
    const float* q;         // [rows, stride] queries, f32; 0 beyond head_dim
    float* acc;             // [rows, stride] sum of p * v over full pages, relative to `maximum`
    float* maximum;         // [rows]         running maximum of z, -inf before the first slot
    float* sum;             // [rows, 16]     running sum of p, one lane per slot
    float* z;               // [rows, kBlock, 16] out: the pages' logits, -inf where unread
    float* p;               // [rows, kBlock, 16] scratch
    float* rescale;         // [rows]         scratch
    uint16_t* live;         // [rows]         scratch
    float* decoded;         // [stride * 16]  scratch: half a 16-bit page as f32, when many rows read it
    const uint16_t* masks;  // [rows, kBlock] slots each row may read
    int32_t rows, head_dim, stride;
    float scale, softcap;
    // Read by quantized pages only; acc_rotated is null until a unit meets its first one.
    float* acc_rotated;  // [rows, stride] sum of p * R v over quantized pages, relative to `maximum`
    QueryCodes query;
    int32_t group;  // dims that share a scale in the page's format
    // Of kernels of matrix tiles, from kMatrixRows query rows on; queries are written by split_queries.
    MatrixOperands operands;
};

// A block of window queries over one page. Operands are 32-bit words: a dim in f32, or two dims in bf16 or in the 16-bit
// codes of QueryCodes; the words of `window_rows` rows lie side by side, so that a tile of them walks through memory.
struct WindowTile {
    const uint32_t* q;            // [rows / window_rows, words, window_rows]
    const float *delta, *centre;  // [rows] of codes
    unsigned char* decoded;       // [64 * padded dim] scratch: the page's keys as such words
    const uint16_t* masks;        // [rows] slots each row may read
    float* z;                     // [rows, 16] out: finished logits, -inf where unread
    float* maximum;               // [rows, 16] running maximum of z, one lane per slot; passes over NaN
    int32_t rows, head_dim;       // rows: a multiple of window_rows; those beyond the queries are 0
    int32_t group;                // dims that share a scale in the page's format
    float scale, softcap;
};

// Query heads as summaries read them. Means, also those of parts: R q = delta * codes. Bounds: q itself, its positive and its
// other elements.
struct PageQuery {
    const int8_t* codes;     // [rows, dim]
    const int16_t* pairs;    // [rows, dim] the same, dims of each quad in the order 0, 2, 1, 3
    const int32_t* shift;    // [rows] 128 * sum of codes, or 8 * it for means of parts
    const float* curvature;  // [rows] of the spread
    const float *up, *down;  // [rows, dim] q where it is above 0, else 0; and the rest of it
    const float* factor;     // [rows] scale * delta, or the scale
    int32_t rows, dim;
    float softcap;  // of factor * dot; 0: none
};

struct Kernels {
    // Adds a block of pages to the tile. Indexed by Format.
    void (*attend_block[6])(const AttendTile& tile, const PageBlock& block);

    // Codes (QueryCodes) of one rotated query [dim]; returns its delta.
    float (*encode_query)(const float* rotated, int32_t dim, int16_t* codes);
    // a . b, n a multiple of 16, in one order of additions for all levels.
    float (*dot_product)(const float* a, const float* b, int32_t n);

    // dst[0..n) = src[0..n) converted by round-to-nearest-even; equal types are copied bit for bit.
    void (*convert)(void* dst, DType dst_type, const void* src, DType src_type, int32_t n);
    void (*axpy)(float* acc, const float* x, float w, int32_t n);  // acc += w * x
    void (*divide)(float* acc, float w, int32_t n);                // acc /= w

    // mass[e, i] (+= or max=) exp(z[e, i] - lse) for e < entries; lse is not -inf.
    void (*mass_add)(float* mass, const float* z, float lse, int32_t entries);
    void (*mass_max)(float* mass, const float* z, float lse, int32_t entries);

    // Slots in and out of pages of `width`-byte elements. Rows are [padded_dim] elements in the page's own format.
    void (*put_slot)(unsigned char* page, int32_t width, int32_t slot, const void* k, const void* v,
                     int32_t padded_dim);
    void (*put_page)(unsigned char* page, int32_t width, const void* const* k, const void* const* v,
                     int32_t padded_dim);
    void (*get_page)(const unsigned char* page, int32_t width, void* const* k, void* const* v, int32_t padded_dim);

    // x [dim] = R x, or its inverse, in place; codes i8 [dim] and bf16 scales [groups] of a rotated vector, and back.
    void (*rotate)(float* x, int32_t dim, bool inverse);
    void (*encode)(const float* x, int32_t dim, Format format, int32_t group, unsigned char* codes, uint16_t* scales);
    void (*decode)(const unsigned char* codes, const uint16_t* scales, int32_t dim, Format format, int32_t group,
                   float* x);

    // One slot of a page to another page, `scales` of K and V together. Indexed by Format.
    void (*copy_slot[6])(unsigned char* to, int32_t to_slot, const unsigned char* from, int32_t slot,
                         int32_t padded_dim, int32_t scales);
    // Elements [padded_dim] of a slot of a full page. Indexed by Format f32, bf16, f16.
    void (*get_slot[3])(const unsigned char* page, int32_t slot, int32_t padded_dim, void* k, void* v);
    // Codes i8 [dim] of a slot of a quantized page; codes [16, stride] into the slots of a mask. Indexed from int8 on.
    void (*get_codes[3])(const unsigned char* page, int32_t slot, int32_t dim, unsigned char* k, unsigned char* v);
    void (*put_codes[3])(unsigned char* page, int32_t dim, uint16_t slots, const unsigned char* k,
                         const unsigned char* v, int32_t stride);

    // Logits of a block of window queries on a page, `ahead` is a page to prefetch meanwhile. Queries as f32 for full pages, as codes for quantized
    // ones. window_pairs: bf16 pages and queries as pairs, D even; null where the level has none. Indexed by Format.
    int32_t window_rows;
    void (*window_page[6])(const WindowTile& tile, const unsigned char* page, const unsigned char* ahead);
    void (*window_pairs)(const WindowTile& tile, const unsigned char* page, const unsigned char* ahead);
    // z [entries, rows, 16] becomes e = exp(z - m), m [rows] the largest lane of `lanes` [rows, 16], 0 if that is -inf;
    // total [rows] = sum of e, and if not null moved [rows] = sum of e (z - m). Rows as in WindowTile.
    void (*soften_window)(float* z, int32_t entries, int32_t rows, const float* lanes, float* m, float* total,
                          float* moved);
    // Of one head's shares on a page, A = factor * e for e [queries, 16] and factor [queries]: mean and, if not null,
    // unbiased variance [16], 0 but for the slots of a mask; or what measure sums up, added to lanes [16] each. sound:
    // mean square, population variance m2, m4 / m2. code, over the slots of a mask: unbiased variance, m4 / max(m2, 1e-8)^2.
    // e is scratch afterwards.
    void (*share_moments)(float* e, const float* factor, int32_t queries, uint16_t slots, float* mean, float* variance);
    void (*sound_sums)(float* e, const float* factor, int32_t queries, float* sums);
    void (*code_sums)(float* e, const float* factor, int32_t queries, uint16_t slots, float* sums);

    // Of one page's logits z [n, 16] and lse [n]: most [16] becomes the largest of it and of z - lse, NaN where one is NaN.
    void (*raise_most)(const float* z, const float* lse, int32_t n, float* most);
    void (*exp_slots)(float* x, uint16_t slots);  // x [16] = exp(x), 0 but for the slots of a mask

    // The keys of a page as f32 k [padded dim, 16 slots], those of quantized pages in the rotated domain plus
    // centre [dim] if not null, and |k|^2 [16]; `scales` bf16 [dim / group, 16] are theirs. Indexed by Format.
    void (*widen_keys[6])(const unsigned char* page, const uint16_t* scales, int32_t dim, int32_t group,
                          const float* centre, float* k, float* squares);
    // k . x [16] of them, without a centre. Indexed by Format.
    void (*dot_keys[6])(const unsigned char* page, const uint16_t* scales, int32_t dim, int32_t group, const float* x,
                        float* dots);
    // sums [dim, 16] += weight * k for the slots of a mask; out [dim] = their sums over the slots, dim padded.
    void (*sum_keys)(const float* k, const float* weight, uint16_t slots, int32_t dim, float* sums);
    void (*fold_keys)(const float* sums, int32_t dim, float* out);
    // rows [16, dim] of keys k [dim, 16 slots], dim a multiple of 16.
    void (*turn_keys)(const float* k, int32_t dim, float* rows);
    // lo = min(lo, x), hi = max(hi, x), n a multiple of 16; whether all of x is finite.
    bool (*stretch)(float* lo, float* hi, const float* x, int32_t n);
    // sums [dim] += the values of the slots of a mask, one after the other; those of quantized pages in the rotated domain.
    // v and `scales` bf16 [dim / group, 16] are the page's. Indexed by Format.
    void (*sum_values[6])(const unsigned char* v, const uint16_t* scales, int32_t dim, int32_t group, uint16_t slots,
                          float* sums);
    // acc [rows, dim] += the value means codes u8 [16, dim] (128: 0) of the lanes of a mask, by weight[row * stride + i] for
    // the i-th of them. `ahead` are codes to prefetch meanwhile.
    void (*add_values)(const unsigned char* codes, const unsigned char* ahead, uint16_t lanes, const float* weight,
                       int64_t stride, int32_t rows, int32_t dim, float* acc);
    // squares [16] = |k - x|^2 of keys k [dim, 16 slots].
    void (*distances)(const float* k, const float* x, int32_t dim, float* squares);

    // x[g * stride + lane] of ops/score_pages.h for a block of summaries; log_count [16], -inf where none is visible; most
    // [rows, 16]: the largest of each lane so far, NaN passed over. Returns the lanes with visible slots whose x is not finite
    // for some head. `ahead` is a block to prefetch meanwhile. Indexed by SummaryKind; mean_value is scored as mean. Those
    // of parts by score_split.
    uint16_t (*score_block[3])(const PageQuery& query, const unsigned char* block, const unsigned char* ahead,
                               const float* log_count, float* x, int64_t stride, float* most);
    // vote [n] = sum, or else the largest, over rows of share[row] * e[row * stride + i]; -1 where bit i % 16 of there[i / 16]
    // is not set.
    void (*count_votes)(const float* e, int64_t stride, const float* share, int32_t rows, int32_t n, bool sum,
                        const uint16_t* there, float* vote);
    // Over n numbers, a multiple of 16: the largest, NaN passed over; x = exp(x - m) and their sum; the sum; the first one
    // from `from` on that is above `least`, else n; the first of the largest.
    float (*largest)(const float* x, int32_t n);
    float (*exp_sum)(float* x, float m, int32_t n);
    float (*sum)(const float* x, int32_t n);
    int32_t (*next_above)(const float* x, int32_t from, int32_t n, float least);
    int32_t (*first_largest)(const float* x, int32_t n);
    // s [n, stride] = y . z for y [n, dim] and centroids z [lines][dim][16], dim a multiple of 16.
    void (*cluster_dots)(const float* y, int32_t n, const float* z, int32_t lines, int32_t dim, float* s,
                         int64_t stride);

    // Of n tokens: what each is stored as (0: no token), and that of those that may change, else 0.
    void (*movable_states)(const uint8_t* now, const int32_t* positions, const uint8_t* protect, int32_t n,
                           uint8_t* movable, uint8_t* out);
    // Keys, the larger the better: the upper half orders the scores, the lower half, below 2^31, the ages.
    void (*rank_keys)(const float* score, const int32_t* positions, int32_t n, uint64_t* keys);
    // Tokens of kind k and at least this key: out k, kind 0. Its others: out 0.
    void (*mark_ranked)(const uint64_t* keys, int32_t n, uint64_t least, uint8_t k, uint8_t* kind, uint8_t* out);

    // sums [n] += each token's largest or average value among its neighbours: the `before` [n] tokens before it and the
    // `after` [n] after it, at most `reach` each, and itself; divisor 0: by how many they are. All arrays go on to a
    // multiple of 16 tokens, values for `reach` more on both sides, of any content.
    void (*pool_max)(const float* values, const float* before, const float* after, int32_t n, int32_t reach,
                     float* sums);
    void (*pool_average)(const float* values, const float* before, const float* after, int32_t n, int32_t reach,
                         float divisor, float* sums);

    // As score_block, of parts of pages, which count the visible slots of masks [16]. Indexed by pairs, less 1.
    uint16_t (*score_split[2])(const PageQuery& query, const unsigned char* block, const unsigned char* ahead,
                               const uint16_t* masks, float* x, int64_t stride, float* most);

    // sums [dim] += the means of a block of summaries as stored, each page's codes by its weight [16].
    void (*add_means)(const unsigned char* block, const float* weight, int32_t dim, float* sums);

    bool matrix;  // whether the level has matrix tiles
    // attend_block in them, and what it wants first, once per tile: its queries in two terms. Null where a level or a format
    // has none. Indexed by Format.
    void (*attend_matrix[6])(const AttendTile& tile, const PageBlock& block);
    void (*split_queries[6])(const AttendTile& tile);
};

// Each level fills in what it has and leaves the rest as the level below filled it.
#define KVSTRATA_LEVEL(level)                      \
    namespace level {                              \
    void fill_attend(Kernels* table);              \
    void fill_attend_matrix_codes(Kernels* table); \
    void fill_attend_matrix_pairs(Kernels* table); \
    void fill_attend_pairs(Kernels* table);        \
    void fill_attend_quantized(Kernels* table);    \
    void fill_bounds(Kernels* table);              \
    void fill_clusters(Kernels* table);            \
    void fill_elements(Kernels* table);            \
    void fill_encode(Kernels* table);              \
    void fill_groups(Kernels* table);              \
    void fill_keys(Kernels* table);                \
    void fill_pages(Kernels* table);               \
    void fill_pool(Kernels* table);                \
    void fill_ranks(Kernels* table);               \
    void fill_rotate(Kernels* table);              \
    void fill_scores(Kernels* table);              \
    void fill_slots(Kernels* table);               \
    void fill_split(Kernels* table);               \
    void fill_summaries(Kernels* table);           \
    void fill_values(Kernels* table);              \
    void fill_window(Kernels* table);              \
    void fill_window_pairs(Kernels* table);        \
    void fill_window_quantized(Kernels* table);    \
    }
KVSTRATA_LEVEL(scalar)
KVSTRATA_LEVEL(avx2)
KVSTRATA_LEVEL(avx512)
KVSTRATA_LEVEL(avx512_vnni)
KVSTRATA_LEVEL(avx512_bf16)
KVSTRATA_LEVEL(amx)
KVSTRATA_LEVEL(amx_soft)
#undef KVSTRATA_LEVEL

}  // namespace kvstrata::cpu
