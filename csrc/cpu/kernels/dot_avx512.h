// I on AVX-512 (F, BW, DQ, VL), with VNNI where the level has it: one register.
#pragma once

namespace kvstrata::cpu::KV_ISA {
namespace {

struct I {
    __m512i x;
};
constexpr int kQkWide = 2;  // pages whose logits are summed at a time: kTile x kQkWide accumulators
constexpr int kPvWide = 2;  // groups of sixteen dims that PV sums at a time, likewise

KV_INLINE I none() { return {_mm512_setzero_si512()}; }
KV_INLINE I load_line(const void* p) { return {_mm512_loadu_si512(p)}; }
KV_INLINE void store_line(void* p, I a) { _mm512_storeu_si512(p, a.x); }
KV_INLINE I add(I a, I b) { return {_mm512_add_epi32(a.x, b.x)}; }
KV_INLINE I low_nibbles(I a) { return {_mm512_and_si512(a.x, _mm512_set1_epi8(15))}; }  // of every byte
KV_INLINE I high_nibbles(I a) { return low_nibbles({_mm512_srli_epi32(a.x, 4)}); }
KV_INLINE V to_f32(I a) { return {_mm512_cvtepi32_ps(a.x)}; }

// The codes of field K, sign-extended; of two bits, what they stand for: 2c - 3.
template <int Bits, int K>
KV_INLINE I field(I line) {
    constexpr int kLow = Bits * K, kLeft = 16 - Bits - kLow;
    if constexpr (Bits == 2) {
        const __m512i moved = K == 0 ? _mm512_slli_epi16(line.x, 1) : _mm512_srli_epi16(line.x, K == 0 ? 0 : kLow - 1);
        const __m512i twice = _mm512_and_si512(moved, _mm512_set1_epi16(6));
        return {_mm512_sub_epi16(twice, _mm512_set1_epi16(3))};
    } else if constexpr (kLeft == 0) {
        return {_mm512_srai_epi16(line.x, kLow)};
    } else {
        return {_mm512_srai_epi16(_mm512_slli_epi16(line.x, kLeft), 16 - Bits)};
    }
}

// What the Bits bits from Shift on of each word stand for, in units of the scale.
template <int Bits, int Shift>
KV_INLINE V code_value(I line) {
    if constexpr (Bits == 2) {
        const __m512i c = _mm512_and_si512(_mm512_srli_epi32(line.x, Shift), _mm512_set1_epi32(3));
        return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(c, c), _mm512_set1_epi32(3)))};
    } else {
        return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line.x, 32 - Bits - Shift), 32 - Bits))};
    }
}

// Two numbers that every lane of codes meets.
struct Pair {
    __m512i x;
};
KV_INLINE Pair spread(const int16_t* pair) {
    int32_t both;
    __builtin_memcpy(&both, pair, 4);
    return {_mm512_set1_epi32(both)};
}
// sum + codes . pair in every lane, exact.
KV_INLINE I dot(I sum, I codes, Pair pair) {
#if defined(KV_ISA_avx512)
    return {_mm512_add_epi32(sum.x, _mm512_madd_epi16(codes.x, pair.x))};
#else
    return {_mm512_dpwssd_epi32(sum.x, codes.x, pair.x)};
#endif
}

// Sixteen numbers below 2^15, rounded to nearest even, each quad in the order 0, 2, 1, 3.
KV_INLINE void store_quads(int16_t* to, V x) {
    const __m256i n = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(n, 0xD8), 0xD8));
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
