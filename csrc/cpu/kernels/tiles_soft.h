// Tiles in plain code, to the letter of Intel's manual: shapes, order of additions, rounding, what counts as 0. What the
// instructions would refuse ends the process.
#pragma once

namespace kvstrata::cpu::KV_ISA {
namespace {

struct Tiles {
    int rows = 0, depth = 0;
    alignas(64) unsigned char data[8][16][64];

    KV_INLINE_MEMBER int rows_of(int tile) const { return tile < 6 ? rows : depth; }
    KV_INLINE_MEMBER int bytes_of(int tile) const { return tile == 4 || tile == 5 ? 4 * depth : 64; }
    KV_INLINE_MEMBER void insist(bool legal) const {
        if (!legal) __builtin_trap();
    }
    // Shapes, both 1..16, from here on; if they are new, what tiles held is lost.
    KV_INLINE_MEMBER void shape(int new_rows, int new_depth) {
        insist(new_rows >= 1 && new_rows <= 16 && new_depth >= 1 && new_depth <= 16);
        if (new_rows == rows && new_depth == depth) return;
        rows = new_rows;
        depth = new_depth;
        __builtin_memset(data, 0, sizeof data);
    }
};

// Rows `apart` bytes from each other.
template <int Tile>
KV_INLINE void load(Tiles& t, const void* from, int64_t apart) {
    t.insist(t.rows > 0);
    __builtin_memset(t.data[Tile], 0, sizeof t.data[Tile]);
    for (int i = 0; i < t.rows_of(Tile); ++i) {
        __builtin_memcpy(t.data[Tile][i], static_cast<const char*>(from) + i * apart,
                         static_cast<unsigned long>(t.bytes_of(Tile)));
    }
}
template <int Tile>
KV_INLINE void store(Tiles& t, void* to, int64_t apart) {
    t.insist(t.rows > 0);
    for (int i = 0; i < t.rows_of(Tile); ++i) {
        __builtin_memcpy(static_cast<char*>(to) + i * apart, t.data[Tile][i],
                         static_cast<unsigned long>(t.bytes_of(Tile)));
    }
}
template <int Tile>
KV_INLINE void clear(Tiles& t) {
    t.insist(t.rows > 0);
    __builtin_memset(t.data[Tile], 0, sizeof t.data[Tile]);
}

// Denormal numbers are 0 of their sign.
KV_INLINE V flush(V x) {
    const V size = bits_and(x, 0x7FFFFFFFu);
    return blend(less(size, set1(1.17549435e-38f)), bits_and(x, 0x80000000u), x);
}
KV_INLINE uint32_t word_of(const Tiles& t, int tile, int row, int word) {
    uint32_t x;
    __builtin_memcpy(&x, t.data[tile][row] + 4 * word, 4);
    return x;
}

KV_INLINE V left_of(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return flush(set1(x));
}

// Sums += left . right of pairs of bf16 in f32: first elements and second ones apart, their sums together, then to `Sums`.
template <int Sums, int Left, int Right>
KV_INLINE void multiply_pairs(Tiles& t) {
    static_assert(kProduct<Sums, Left, Right>);
    t.insist(t.rows > 0);
    V first[16], second[16];
    for (int k = 0; k < t.depth; ++k) {
        pairs_bf16(t.data[Right][k], first[k], second[k]);
        first[k] = flush(first[k]);
        second[k] = flush(second[k]);
    }
    for (int m = 0; m < t.rows; ++m) {
        V a = zero(), b = zero();
        for (int k = 0; k < t.depth; ++k) {
            const uint32_t word = word_of(t, Left, m, k);
            a = flush(fma(left_of(word << 16), first[k], a));
            b = flush(fma(left_of(word & 0xFFFF0000u), second[k], b));
        }
        float* const sums = reinterpret_cast<float*>(t.data[Sums][m]);
        store(sums, flush(add(flush(load(sums)), flush(add(a, b)))));
    }
}

// Sums += left . right of signed bytes in int32, which wraps.
template <int Sums, int Left, int Right>
KV_INLINE void multiply_bytes(Tiles& t) {
    static_assert(kProduct<Sums, Left, Right>);
    t.insist(t.rows > 0);
    for (int m = 0; m < t.rows; ++m) {
        __m512i sum = _mm512_loadu_si512(t.data[Sums][m]);
        for (int k = 0; k < t.depth; ++k) {
            const __m512i line = _mm512_loadu_si512(t.data[Right][k]);
            const int word = static_cast<int>(word_of(t, Left, m, k));
            // Of each half of a word: the low byte of line and word, and the high one.
            const __m512i low = _mm512_srai_epi16(_mm512_slli_epi16(line, 8), 8), high = _mm512_srai_epi16(line, 8);
            const __m512i both = _mm512_set1_epi32(word);
            const __m512i low_left = _mm512_srai_epi16(_mm512_slli_epi16(both, 8), 8);
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(low, low_left));
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(high, _mm512_srai_epi16(both, 8)));
        }
        _mm512_storeu_si512(t.data[Sums][m], sum);
    }
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
