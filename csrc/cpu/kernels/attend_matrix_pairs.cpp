// attend over bf16 pages in matrix tiles. A page's K lines are right operands as they lie: 16 dim pairs of 16 slots. Its
// values are gathered with those of the page after it, 16 slot pairs of 16 dims, without what no row reads.
//
// q and p are two bf16 terms each, as in attend_pairs.cpp, and what is rounded where depends on the row alone: a row's low
// terms have sums of their own in QK, so a q that is bf16 already is as if it had none. Values that are not finite stay out
// of the tiles and meet the rows that read them one by one.
#include "cpu/kernels/level.h"
#if KV_MATRIX_KERNELS
#include "cpu/kernels/pairs.h"
#include "cpu/kernels/softmax.h"
#include "cpu/kernels/tiles.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kTileDims = 2 * kDepth;           // of K
constexpr int kTileBytes = 64 * kDepth;         // of sixteen lines
constexpr int kRowBytes = 4 * kBlock * kSlots;  // of a row in t.z
constexpr int kSpan = 4;                        // groups of sixteen dims that PV sums at a time

void split_queries(const AttendTile& t) {
    const MatrixOperands& o = t.operands;
    for (int row = 0; row < t.rows; ++row) {
        uint16_t* const high = o.high + static_cast<int64_t>(row) * o.pitch;
        uint16_t* const low = o.low + static_cast<int64_t>(row) * o.pitch;
        uint16_t other = 0;  // lanes that are more than their first term; an infinite one is not
        for (int d = 0; d < o.pitch; d += 16) {
            const V x = d < t.stride ? load(t.q + row * t.stride + d) : zero();
            split(x, high + d, low + d);
            other |= differ(x, load_bf16(high + d));
        }
        o.exact[row] = !other;
    }
}

// The K lines of a block in whole tiles: its pages' own, and copies of the last ones, 0 beyond head_dim.
struct Keys {
    alignas(64) unsigned char last[kBlock][kTileBytes];
    const unsigned char* pages[kBlock];
    int whole, tiles;

    KV_INLINE_MEMBER const unsigned char* tile(int page, int i) const {
        return i < whole ? pages[page] + i * kTileBytes : last[page];
    }
};
KV_INLINE void find_keys(Keys& keys, const AttendTile& t, const PageBlock& b) {
    keys.whole = t.head_dim / kTileDims;
    keys.tiles = t.operands.pitch / kTileDims;
    const int rest = t.head_dim % kTileDims;
    for (int j = 0; j < kBlock; ++j) {
        const unsigned char* const page = b.pages[j < b.count ? j : b.count - 1];
        keys.pages[j] = page;
        for (int i = 0; rest && i < kDepth; ++i) {  // padding must not enter: it holds anything
            const uint32_t keep = 2 * i + 1 < rest ? ~0u : 2 * i < rest ? 0xFFFFu : 0u;
            const __m512i line = keep ? _mm512_loadu_si512(page + keys.whole * kTileBytes + 64 * i) : __m512i{};
            _mm512_store_si512(keys.last[j] + 64 * i,
                               _mm512_and_si512(line, _mm512_set1_epi32(static_cast<int>(keep))));
        }
    }
}

// q . k of rows [row, row + n) into t.z, four pages at a time. Pages beyond the block are its last one over again.
KV_INLINE void qk_exact(Tiles& tiles, const AttendTile& t, const PageBlock& b, const Keys& keys, int row,
                        Ahead* ahead) {
    const int pitch = t.operands.pitch;
    const uint16_t* const q = t.operands.high + static_cast<int64_t>(row) * pitch;
    for (int j = 0; j < b.count; j += 4) {
        clear_sums(tiles);
        for (int i = 0; i < keys.tiles; ++i) {
            if (ahead) ahead->fetch(4 * kDepth);
            load<4>(tiles, q + i * kTileDims, pitch * 2);
            load<6>(tiles, keys.tile(j, i), 64);
            multiply_pairs<0, 4, 6>(tiles);
            load<7>(tiles, keys.tile(j + 1, i), 64);
            multiply_pairs<1, 4, 7>(tiles);
            load<6>(tiles, keys.tile(j + 2, i), 64);
            multiply_pairs<2, 4, 6>(tiles);
            load<7>(tiles, keys.tile(j + 3, i), 64);
            multiply_pairs<3, 4, 7>(tiles);
        }
        float* const z = t.z + lanes_at(row, j);
        store<0>(tiles, z, kRowBytes);
        store<1>(tiles, z + kSlots, kRowBytes);
        store<2>(tiles, z + 2 * kSlots, kRowBytes);
        store<3>(tiles, z + 3 * kSlots, kRowBytes);
    }
}

// The same with low terms, two pages at a time.
KV_INLINE void qk_terms(Tiles& tiles, const AttendTile& t, const PageBlock& b, const Keys& keys, int row, int n,
                        Ahead* ahead) {
    const int pitch = t.operands.pitch;
    const int64_t at = static_cast<int64_t>(row) * pitch;
    alignas(64) float low[kRows][2 * kSlots];
    for (int j = 0; j < b.count; j += 2) {
        clear_sums(tiles);
        for (int i = 0; i < keys.tiles; ++i) {
            if (ahead) ahead->fetch(2 * kDepth);
            load<4>(tiles, t.operands.high + at + i * kTileDims, pitch * 2);
            load<5>(tiles, t.operands.low + at + i * kTileDims, pitch * 2);
            load<6>(tiles, keys.tile(j, i), 64);
            multiply_pairs<0, 4, 6>(tiles);
            multiply_pairs<2, 5, 6>(tiles);
            load<7>(tiles, keys.tile(j + 1, i), 64);
            multiply_pairs<1, 4, 7>(tiles);
            multiply_pairs<3, 5, 7>(tiles);
        }
        float* const z = t.z + lanes_at(row, j);
        store<0>(tiles, z, kRowBytes);
        store<1>(tiles, z + kSlots, kRowBytes);
        store<2>(tiles, low, sizeof low[0]);
        store<3>(tiles, low[0] + kSlots, sizeof low[0]);
        for (int i = 0; i < n; ++i) {
            if (t.operands.exact[row + i]) continue;
            float* const both = z + lanes_at(i, 0);
            for (int lane = 0; lane < 2 * kSlots; lane += kSlots) {
                store(both + lane, add(load(both + lane), load(low[i] + lane)));
            }
        }
    }
}

// The values of a block as t.operands.block [8 slot pairs of each page][stride] words, 0 where no row reads the slot, beyond
// head_dim, and where they are not finite; those slots in bad. Pages come in twos.
KV_INLINE void gather_values(const AttendTile& t, const PageBlock& b, uint16_t (&bad)[kBlock], Ahead& ahead) {
    const int64_t half = static_cast<int64_t>(kSlots) * t.stride * 2;
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    unsigned char* to = t.operands.block;
    for (int j = 0; j < b.count; ++j) {
        uint16_t read = 0;
        for (int row = 0; row < t.rows; ++row) read |= mask_of(t, row, j);
        const unsigned char* from = b.pages[j] + half;
        bad[j] = 0;
        for (int u = 0; u < kSlots / 2; ++u) {
            const int two = read >> (2 * u) & 3;
            const __m512i keep =
                _mm512_set1_epi32(static_cast<int>((two & 1 ? 0xFFFFu : 0u) | (two & 2 ? 0xFFFF0000u : 0u)));
            uint32_t odd = 0;
            for (int d = 0; d < t.stride; d += 16, from += 64, to += 64) {
                ahead.fetch(1);
                const int dims = t.head_dim - d;
                const __mmask16 inside = static_cast<__mmask16>(dims >= 16 ? 0xFFFF : (1 << dims) - 1);
                const __m512i v = _mm512_maskz_and_epi32(inside, _mm512_loadu_si512(from), keep);
                const __mmask32 not_finite = _mm512_cmpeq_epi16_mask(_mm512_and_si512(v, exponent), exponent);
                odd |= not_finite;
                _mm512_storeu_si512(to, _mm512_maskz_mov_epi16(~not_finite, v));
            }
            if (odd & 0x55555555u) bad[j] |= static_cast<uint16_t>(1 << 2 * u);
            if (odd & 0xAAAAAAAAu) bad[j] |= static_cast<uint16_t>(2 << 2 * u);
        }
    }
    if (b.count % 2) __builtin_memset(to, 0, static_cast<unsigned long>(half));
}

// p of up to sixteen rows as left operands; 0 where a row read nothing.
struct Terms {
    alignas(64) uint16_t high[kRows][kBlock * kSlots], low[kRows][kBlock * kSlots];
};
KV_INLINE void find_terms(Terms& p, const AttendTile& t, const PageBlock& b, int row, int n) {
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < (b.count + 1) / 2 * 2; ++j) {
            const bool there = j < b.count && t.live[row + i];
            const V x = there ? load(t.p + lanes_at(row + i, j)) : zero();
            split(x, p.high[i] + j * kSlots, p.low[i] + j * kSlots);
        }
    }
}

// acc += p . v of the block for a tile of rows, in Span groups of sixteen dims from d on.
template <int Span>
KV_INLINE void pv(Tiles& tiles, const AttendTile& t, const PageBlock& b, const Terms& p, int row, int d) {
    const int64_t line = static_cast<int64_t>(t.stride) * 4;
    float* const acc = t.acc + row * t.stride + d;
    load<0>(tiles, acc, line);
    if constexpr (Span > 1) load<1>(tiles, acc + 16, line);
    if constexpr (Span > 2) load<2>(tiles, acc + 32, line);
    if constexpr (Span > 3) load<3>(tiles, acc + 48, line);
    for (int j = 0; j < b.count; j += 2) {
        const unsigned char* const v = t.operands.block + j * (kSlots / 2) * line + d * 4;
        load<4>(tiles, p.high[0] + j * kSlots, sizeof p.high[0]);
        load<5>(tiles, p.low[0] + j * kSlots, sizeof p.low[0]);
        load<6>(tiles, v, line);
        multiply_pairs<0, 4, 6>(tiles);
        if constexpr (Span > 1) {
            load<7>(tiles, v + 64, line);
            multiply_pairs<1, 4, 7>(tiles);
        }
        multiply_pairs<0, 5, 6>(tiles);
        if constexpr (Span > 1) multiply_pairs<1, 5, 7>(tiles);
        if constexpr (Span > 2) {
            load<6>(tiles, v + 128, line);
            multiply_pairs<2, 4, 6>(tiles);
        }
        if constexpr (Span > 3) {
            load<7>(tiles, v + 192, line);
            multiply_pairs<3, 4, 7>(tiles);
        }
        if constexpr (Span > 2) multiply_pairs<2, 5, 6>(tiles);
        if constexpr (Span > 3) multiply_pairs<3, 5, 7>(tiles);
    }
    store<0>(tiles, acc, line);
    if constexpr (Span > 1) store<1>(tiles, acc + 16, line);
    if constexpr (Span > 2) store<2>(tiles, acc + 32, line);
    if constexpr (Span > 3) store<3>(tiles, acc + 48, line);
}

// acc += p * v of the values that are not finite, for one row.
KV_INLINE void add_bad(const AttendTile& t, const PageBlock& b, const uint16_t (&bad)[kBlock], int row) {
    const int64_t half = static_cast<int64_t>(kSlots) * t.stride * 2;
    for (int j = 0; j < b.count; ++j) {
        for (uint32_t slots = bad[j] & mask_of(t, row, j); slots; slots &= slots - 1) {
            const int slot = __builtin_ctz(slots);
            const V p = set1(t.p[lanes_at(row, j) + slot]);
            for (int d = 0; d < t.stride; d += 16) {
                V first, second;
                pairs_bf16(b.pages[j] + half + (slot / 2 * t.stride + d) * 4, first, second);
                const V v = slot % 2 ? second : first;
                const uint16_t finite = less(bits_and(v, 0x7FFFFFFFu), set1(__builtin_inff()));
                float* const acc = t.acc + row * t.stride + d;
                store(acc, blend(finite, load(acc), fma(p, v, load(acc))));
            }
        }
    }
}

KV_INLINE void pv_rows(Tiles& tiles, const AttendTile& t, const PageBlock& b, const uint16_t (&bad)[kBlock], int row,
                       int n) {
    uint16_t live = 0;
    for (int i = 0; i < n; ++i) live |= t.live[row + i];
    if (!live) return;
    for (int i = 0; i < n; ++i) rescale_row(t.acc, row + i, t.stride, t.rescale[row + i]);
    Terms p;
    find_terms(p, t, b, row, n);
    int d = 0;
    for (; d + 16 * kSpan <= t.stride; d += 16 * kSpan) pv<kSpan>(tiles, t, b, p, row, d);
    if (t.stride - d == 48) pv<3>(tiles, t, b, p, row, d);
    if (t.stride - d == 32) pv<2>(tiles, t, b, p, row, d);
    if (t.stride - d == 16) pv<1>(tiles, t, b, p, row, d);
    for (int i = 0; i < n; ++i) {
        if (t.live[row + i]) add_bad(t, b, bad, row + i);
    }
}

void attend_matrix(const AttendTile& t, const PageBlock& b) {
    Ahead lines{b.ahead, static_cast<int64_t>(kSlots) * t.stride * 4};
    Ahead* ahead = &lines;
    Tiles tiles;
    Keys keys;
    find_keys(keys, t, b);
    const auto count = [&](int row) { return t.rows - row < kRows ? t.rows - row : kRows; };
    for (int row = 0; row < t.rows; row += kRows, ahead = nullptr) {
        const int n = count(row);
        bool exact = true;
        for (int i = 0; i < n; ++i) exact &= t.operands.exact[row + i] != 0;
        tiles.shape(n, kDepth);
        if (exact) {
            qk_exact(tiles, t, b, keys, row, ahead);
        } else {
            qk_terms(tiles, t, b, keys, row, n, ahead);
        }
    }
    soften_all(t, b, t.acc_rotated);
    uint16_t bad[kBlock];
    gather_values(t, b, bad, lines);
    for (int row = 0; row < t.rows; row += kRows) {
        tiles.shape(count(row), kDepth);
        pv_rows(tiles, t, b, bad, row, count(row));
    }
}

}  // namespace

void fill_attend_matrix_pairs(Kernels* table) {
    table->matrix = true;
    table->attend_matrix[1] = attend_matrix;
    table->split_queries[1] = split_queries;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_attend_matrix_pairs(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
