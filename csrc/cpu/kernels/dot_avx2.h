// I on AVX2: two registers.
#pragma once

namespace kvstrata::cpu::KV_ISA {
namespace {

struct I {
    __m256i a, b;
};
constexpr int kQkWide = 1;  // pages whose logits are summed at a time: kTile x kQkWide accumulators
constexpr int kPvWide = 2;  // groups of sixteen dims that PV sums at a time, likewise

KV_INLINE I none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
KV_INLINE I load_line(const void* p) {
    const __m256i* halves = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
KV_INLINE void store_line(void* p, I x) {
    __m256i* halves = static_cast<__m256i*>(p);
    _mm256_storeu_si256(halves, x.a);
    _mm256_storeu_si256(halves + 1, x.b);
}
KV_INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
KV_INLINE I low_nibbles(I x) {  // of every byte
    const __m256i low = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)};
}
KV_INLINE I high_nibbles(I x) { return low_nibbles({_mm256_srli_epi32(x.a, 4), _mm256_srli_epi32(x.b, 4)}); }
KV_INLINE V to_f32(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

// The codes of field K, sign-extended; of two bits, what they stand for: 2c - 3.
template <int Bits, int K>
KV_INLINE __m256i half_field(__m256i x) {
    constexpr int kLow = Bits * K, kLeft = 16 - Bits - kLow;
    if constexpr (Bits == 2) {
        const __m256i moved = K == 0 ? _mm256_slli_epi16(x, 1) : _mm256_srli_epi16(x, K == 0 ? 0 : kLow - 1);
        const __m256i twice = _mm256_and_si256(moved, _mm256_set1_epi16(6));
        return _mm256_sub_epi16(twice, _mm256_set1_epi16(3));
    } else if constexpr (kLeft == 0) {
        return _mm256_srai_epi16(x, kLow);
    } else {
        return _mm256_srai_epi16(_mm256_slli_epi16(x, kLeft), 16 - Bits);
    }
}
template <int Bits, int K>
KV_INLINE I field(I line) {
    return {half_field<Bits, K>(line.a), half_field<Bits, K>(line.b)};
}

// What the Bits bits from Shift on of each word stand for, in units of the scale.
template <int Bits, int Shift>
KV_INLINE __m256 half_value(__m256i x) {
    if constexpr (Bits == 2) {
        const __m256i c = _mm256_and_si256(_mm256_srli_epi32(x, Shift), _mm256_set1_epi32(3));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_add_epi32(c, c), _mm256_set1_epi32(3)));
    } else {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 32 - Bits - Shift), 32 - Bits));
    }
}
template <int Bits, int Shift>
KV_INLINE V code_value(I line) {
    return {half_value<Bits, Shift>(line.a), half_value<Bits, Shift>(line.b)};
}

// Two numbers that every lane of codes meets.
struct Pair {
    __m256i x;
};
KV_INLINE Pair spread(const int16_t* pair) {
    int32_t both;
    __builtin_memcpy(&both, pair, 4);
    return {_mm256_set1_epi32(both)};
}
// sum + codes . pair in every lane, exact.
KV_INLINE I dot(I sum, I codes, Pair pair) {
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(codes.a, pair.x)),
            _mm256_add_epi32(sum.b, _mm256_madd_epi16(codes.b, pair.x))};
}

// Sixteen numbers below 2^15, rounded to nearest even, each quad in the order 0, 2, 1, 3.
KV_INLINE void store_quads(int16_t* to, V x) {
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i n = _mm256_permute4x64_epi64(packed, 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(n, 0xD8), 0xD8));
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
