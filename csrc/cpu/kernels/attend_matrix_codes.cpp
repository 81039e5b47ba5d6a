// attend over quantized pages in matrix tiles: the sums of attend_quantized.cpp, bit for bit. Numbers n of 16 bits are two
// left operands, 256 * upper + lower in signed bytes. int8 keys are right operands as they lie; int4 and int2 become them
// once for all query rows, and so do the values of a block: 16 slot quads of 16 dims.
#include "cpu/kernels/level.h"
#if KV_MATRIX_KERNELS
#include "cpu/kernels/dot.h"
#include "cpu/kernels/shares.h"
#include "cpu/kernels/tiles.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kRowPages = kDepth * 4 / kSlots;  // pages whose slots fill a tile of values

// Sixteen numbers up to 32639 in two signed bytes each: n = 256 * upper + lower.
KV_INLINE void store_bytes(int8_t* upper, int8_t* lower, __m256i n) {
    const __m256i high = _mm256_srai_epi16(_mm256_add_epi16(n, _mm256_set1_epi16(128)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(upper), _mm256_cvtepi16_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lower), _mm256_cvtepi16_epi8(n));
}

void split_queries(const AttendTile& t) {
    for (int64_t i = 0; i < static_cast<int64_t>(t.rows) * t.stride; i += 16) {
        const __m256i n = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.query.codes + i));
        const __m256i in_order = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(n, 0xD8), 0xD8);
        store_bytes(t.operands.upper + i, t.operands.lower + i, in_order);
    }
}

// The codes of a line from K on as signed bytes, each quad of elements to a line of its own, `apart` bytes from each other.
template <Format F, int K = 0>
KV_INLINE void unpack(__m512i line, unsigned char* to, int64_t apart) {
    if constexpr (F == Format::int8) {
        _mm512_storeu_si512(to, line);
    } else if constexpr (K < kShare<F>) {
        const __m512i moved = _mm512_srli_epi16(line, kBits<F> * K);
        __m512i codes;
        if constexpr (F == Format::int4) {
            const __m512i sign = _mm512_set1_epi8(8);
            codes = _mm512_sub_epi8(_mm512_xor_si512(_mm512_and_si512(moved, _mm512_set1_epi8(15)), sign), sign);
        } else {
            const __m512i c = _mm512_and_si512(moved, _mm512_set1_epi8(3));
            codes = _mm512_sub_epi8(_mm512_add_epi8(c, c), _mm512_set1_epi8(3));
        }
        _mm512_storeu_si512(to + K * apart, codes);
        unpack<F, K + 1>(line, to, apart);
    }
}

// The K codes of a block's pages as int8 has them: its pages', or what becomes of them in t.operands.block. Pages beyond the
// block are its last one over again.
template <Format F>
KV_INLINE void find_keys(const unsigned char* (&keys)[kBlock], const AttendTile& t, const PageBlock& b) {
    const int64_t half = half_page<F>(t), whole = static_cast<int64_t>(kSlots) * t.head_dim;
    for (int j = 0; j < b.count; ++j) {
        keys[j] = F == Format::int8 ? b.pages[j] : t.operands.block + j * whole;
        if constexpr (F != Format::int8) {
            unsigned char* to = t.operands.block + j * whole;
            for (int64_t at = 0; at < half; at += 64, to += 64 * kShare<F>)
                unpack<F>(load_line(b.pages[j] + at).x, to, 64);
        }
    }
    for (int j = b.count; j < kBlock; ++j) keys[j] = keys[b.count - 1];
}

// The values of a block as t.operands.block [4 slot quads of each page][head_dim] words.
template <Format F>
KV_INLINE void gather_values(const AttendTile& t, const PageBlock& b, Ahead& ahead) {
    const int64_t half = half_page<F>(t), line = static_cast<int64_t>(t.head_dim) * 4;
    for (int j = 0; j < b.count; ++j) {
        unsigned char* to = t.operands.block + j * 4 * line;
        const unsigned char* from = b.pages[j] + half;
        for (int quads = 0; quads < 4; quads += kShare<F>, to += (kShare<F> - 1) * line) {
            for (int d = 0; d < t.head_dim; d += 16, from += 64, to += 64) {
                ahead.fetch(1);
                unpack<F>(load_line(from).x, to, line);
            }
        }
    }
}

// What four tiles of sums hold: of two operands, each by the upper and the lower bytes of n.
struct Sums {
    alignas(64) int32_t part[4][kRows][16];

    KV_INLINE_MEMBER void take(Tiles& tiles) {
        store<0>(tiles, part[0], 64);
        store<1>(tiles, part[1], 64);
        store<2>(tiles, part[2], 64);
        store<3>(tiles, part[3], 64);
    }
    // The sum over n . c of a row with one of the two.
    KV_INLINE_MEMBER V whole(int operand, int row) const {
        const I upper = load_line(part[2 * operand][row]), lower = load_line(part[2 * operand + 1][row]);
        return to_f32({_mm512_add_epi32(_mm512_slli_epi32(upper.x, 8), lower.x)});
    }
};
// Adds to the sums; rows of left operands `apart` bytes from each other, lines of right ones likewise.
KV_INLINE void multiply(Tiles& tiles, const int8_t* upper, const int8_t* lower, int64_t apart,
                        const unsigned char* first, const unsigned char* second, int64_t lines_apart) {
    load<4>(tiles, upper, apart);
    load<6>(tiles, first, lines_apart);
    multiply_bytes<0, 4, 6>(tiles);
    load<7>(tiles, second, lines_apart);
    multiply_bytes<2, 4, 7>(tiles);
    load<5>(tiles, lower, apart);
    multiply_bytes<1, 5, 6>(tiles);
    multiply_bytes<3, 5, 7>(tiles);
}

// z of rows [row, row + n): delta * (sum over groups of scale * n . c) + q . centre, two pages at a time. `depth` words of a
// group at a time.
template <Format F>
KV_INLINE void qk(Tiles& tiles, const AttendTile& t, const PageBlock& b, const unsigned char* const (&keys)[kBlock],
                  int row, int n, int depth, Ahead* ahead) {
    const int64_t scales = 2 * half_page<F>(t);
    const int8_t* const upper = t.operands.upper + static_cast<int64_t>(row) * t.stride;
    const int8_t* const lower = t.operands.lower + static_cast<int64_t>(row) * t.stride;
    Sums sums;
    for (int j = 0; j < b.count; j += 2) {
        const int pages = b.count - j < 2 ? 1 : 2;
        for (int first = 0, g = 0; first < t.head_dim; first += t.group, ++g) {
            clear_sums(tiles);
            for (int d = first; d < first + t.group; d += 4 * depth) {
                if (ahead) ahead->fetch(2 * depth / kShare<F> + 1);
                multiply(tiles, upper + d, lower + d, t.stride, keys[j] + d * kSlots, keys[j + 1] + d * kSlots, 64);
            }
            sums.take(tiles);
            for (int page = 0; page < pages; ++page) {
                const V scale = load_bf16(b.pages[j + page] + scales + g * kSlots * 2);
                for (int i = 0; i < n; ++i) {
                    float* const z = t.z + lanes_at(row + i, j + page);
                    store(z, add(g ? load(z) : zero(), mul(scale, sums.whole(page, i))));
                }
            }
        }
        for (int page = 0; page < pages; ++page) {
            for (int i = row; i < row + n; ++i) {
                float* const z = t.z + lanes_at(i, j + page);
                store(z, add(mul(load(z), set1(t.query.delta[i])), set1(t.query.centre[i])));
            }
        }
    }
}

// p * scale of up to sixteen rows in one group of dims as left operands: sigma * (256 * upper + lower).
struct Weights {
    alignas(64) int8_t upper[kRows][kBlock * kSlots], lower[kRows][kBlock * kSlots];
    float sigma[kRows];
};
KV_INLINE void find_weights(Weights& w, const AttendTile& t, const PageBlock& b, int row, int n, int g,
                            const Shares& shares) {
    for (int i = 0; i < n; ++i) {
        V parts[kBlock];
        if (t.live[row + i]) w.sigma[i] = weigh(parts, t, b, row + i, g, shares);
        for (int j = 0; j < kBlock; ++j) {
            const V x = j < b.count && t.live[row + i] ? parts[j] : zero();
            store_bytes(w.upper[i] + j * kSlots, w.lower[i] + j * kSlots,
                        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.x)));
        }
    }
}

// acc_rotated = acc_rotated * rescale + p . R v of the block for rows [row, row + n), in two groups of sixteen dims.
KV_INLINE void pv(Tiles& tiles, const AttendTile& t, const PageBlock& b, const Weights& w, int row, int n, int d,
                  int wide) {
    const int64_t line = static_cast<int64_t>(t.head_dim) * 4;
    clear_sums(tiles);
    for (int j = 0; j < b.count; j += kRowPages) {
        const unsigned char* const v = t.operands.block + j * 4 * line + d * 4;
        multiply(tiles, w.upper[0] + j * kSlots, w.lower[0] + j * kSlots, sizeof w.upper[0], v, wide > 1 ? v + 64 : v,
                 line);
    }
    Sums sums;
    sums.take(tiles);
    for (int i = 0; i < n; ++i) {
        if (!t.live[row + i]) continue;
        for (int part = 0; part < wide; ++part) {
            float* const acc = t.acc_rotated + (row + i) * t.stride + d + 16 * part;
            store(acc, fma(set1(w.sigma[i]), sums.whole(part, i), mul(load(acc), set1(t.rescale[row + i]))));
        }
    }
}

KV_INLINE void pv_rows(Tiles& tiles, const AttendTile& t, const PageBlock& b, const Shares& shares, int row, int n) {
    uint16_t live = 0;
    for (int i = 0; i < n; ++i) live |= t.live[row + i];
    if (!live) return;
    Weights w;
    for (int first = 0, g = 0; first < t.head_dim; first += t.group, ++g) {
        find_weights(w, t, b, row, n, g, shares);
        for (int d = first; d < first + t.group; d += 32)
            pv(tiles, t, b, w, row, n, d, first + t.group - d < 32 ? 1 : 2);
    }
}

template <Format F>
void attend_matrix(const AttendTile& t, const PageBlock& b) {
    const int64_t half = half_page<F>(t), scales = 2 * scale_bytes_of(t);
    Ahead lines{b.ahead, 2 * half + scales};
    Ahead* ahead = &lines;
    Tiles tiles;
    const unsigned char* keys[kBlock];
    find_keys<F>(keys, t, b);
    const int words = t.group / 4, depth = words > kDepth ? words / 2 : words;  // a group has at most 128 dims
    const auto count = [&](int row) { return t.rows - row < kRows ? t.rows - row : kRows; };
    for (int row = 0; row < t.rows; row += kRows, ahead = nullptr) {
        tiles.shape(count(row), depth);
        qk<F>(tiles, t, b, keys, row, count(row), depth, ahead);
    }
    soften_all(t, b, t.acc);
    bool any = false;
    for (int row = 0; row < t.rows; ++row) any |= t.live[row] != 0;
    if (!any) return;
    Shares shares;
    find_shares(shares, t, b, 2 * half + scales / 2, t.head_dim / t.group);
    gather_values<F>(t, b, lines);
    for (int row = 0; row < t.rows; row += kRows) {
        tiles.shape(count(row), kDepth);
        pv_rows(tiles, t, b, shares, row, count(row));
    }
}

}  // namespace

void fill_attend_matrix_codes(Kernels* table) {
    table->matrix = true;
    table->attend_matrix[3] = attend_matrix<Format::int8>;
    table->attend_matrix[4] = attend_matrix<Format::int4>;
    table->attend_matrix[5] = attend_matrix<Format::int2>;
    for (int f = 3; f < 6; ++f) table->split_queries[f] = split_queries;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_attend_matrix_codes(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
