// V on AVX2, FMA, F16C: two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvstrata::cpu::KV_ISA {
namespace {

struct V {
    __m256 a, b;
};
// Accumulators in registers: kTile query rows x kChains independent sums in QK, x (even, odd) x kWide in PV; two registers
// each: 8 of 16.
constexpr int kTile = 2, kChains = 2, kWide = 1;

KV_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
KV_INLINE V set1(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
KV_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KV_INLINE void store(float* p, V x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
KV_INLINE V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
KV_INLINE V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
KV_INLINE V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
KV_INLINE V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
KV_INLINE V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
// As the instructions have it: the second operand if either is NaN.
KV_INLINE V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
KV_INLINE V min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
KV_INLINE uint16_t less(V x, V y) {
    return static_cast<uint16_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)) |
                                 _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)) << 8);
}
KV_INLINE uint16_t differ(V x, V y) {  // NaN differs
    return static_cast<uint16_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_NEQ_UQ)) |
                                 _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_NEQ_UQ)) << 8);
}
KV_INLINE __m256 lanes_of(int bits) {
    const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits), bit);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit));
}
KV_INLINE V blend(uint16_t bits, V yes, V no) {
    return {_mm256_blendv_ps(no.a, yes.a, lanes_of(bits)), _mm256_blendv_ps(no.b, yes.b, lanes_of(bits >> 8))};
}
KV_INLINE float max_lane(V x) {
    const __m256 m = _mm256_max_ps(x.a, x.b);
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
KV_INLINE V round_even(V x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
KV_INLINE __m256 pow2_half(__m256 n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
// y * 2^n for integral n in -127..128 (2^n is 0 and inf at the ends).
KV_INLINE V scale2(V y, V n) { return {_mm256_mul_ps(y.a, pow2_half(n.a)), _mm256_mul_ps(y.b, pow2_half(n.b))}; }
KV_INLINE V bits_and(V x, uint32_t m) {
    const __m256 k = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(m)));
    return {_mm256_and_ps(x.a, k), _mm256_and_ps(x.b, k)};
}
KV_INLINE V bits_or(V x, V y) { return {_mm256_or_ps(x.a, y.a), _mm256_or_ps(x.b, y.b)}; }
// Lane i and lane i ^ Stride change places.
template <int Stride>
KV_INLINE V swap(V x) {
    if constexpr (Stride == 8) return {x.b, x.a};
    if constexpr (Stride == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
    constexpr int kOrder = Stride == 1 ? 0xB1 : 0x4E;
    return {_mm256_permute_ps(x.a, kOrder), _mm256_permute_ps(x.b, kOrder)};
}
KV_INLINE V negate(uint16_t bits, V x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(x.a, _mm256_and_ps(lanes_of(bits), sign)),
            _mm256_xor_ps(x.b, _mm256_and_ps(lanes_of(bits >> 8), sign))};
}
// Sixteen signed bytes; stored from integral lanes in -128..127.
KV_INLINE V load_i8(const void* p) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
// Sixteen bytes less 128.
KV_INLINE V load_code(const void* p) {
    const __m128i code = _mm_xor_si128(_mm_loadu_si128(static_cast<const __m128i*>(p)), _mm_set1_epi8(-128));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(code)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(code, 8)))};
}
KV_INLINE void store_i8(void* p, V x) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}
KV_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

KV_INLINE __m128i half(const void* p, int i) { return _mm_loadu_si128(static_cast<const __m128i*>(p) + i); }
KV_INLINE __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
// Sixteen 16-bit elements.
KV_INLINE V load_bf16(const void* p) { return {widen_bf16(half(p, 0)), widen_bf16(half(p, 1))}; }
KV_INLINE V load_f16(const void* p) { return {_mm256_cvtph_ps(half(p, 0)), _mm256_cvtph_ps(half(p, 1))}; }
KV_INLINE __m256i round_bf16(__m256 x) {  // in the low 16 bits of each word
    const __m256i b = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
KV_INLINE __m256i narrow(__m256i a, __m256i b) {  // words below 2^16 to sixteen 16-bit elements, in order
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
}
KV_INLINE void store_bf16(void* p, V x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), narrow(round_bf16(x.a), round_bf16(x.b)));
}
KV_INLINE void store_f16(void* p, V x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, kNearest));
    _mm_storeu_si128(static_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(x.b, kNearest));
}

// A 64-byte line of sixteen pairs: the first elements, the second elements.
KV_INLINE void pairs_bf16(const void* line, V& first, V& second) {
    const __m256i a = _mm256_loadu_si256(static_cast<const __m256i*>(line));
    const __m256i b = _mm256_loadu_si256(static_cast<const __m256i*>(line) + 1);
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
}
KV_INLINE V widen_f16(__m256i h) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
KV_INLINE void pairs_f16(const void* line, V& first, V& second) {
    const __m256i a = _mm256_loadu_si256(static_cast<const __m256i*>(line));
    const __m256i b = _mm256_loadu_si256(static_cast<const __m256i*>(line) + 1);
    const __m256i low = _mm256_set1_epi32(0xFFFF);
    first = widen_f16(narrow(_mm256_and_si256(a, low), _mm256_and_si256(b, low)));
    second = widen_f16(narrow(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16)));
}

// An 8 x 8 block of 32-bit words: rows from[0..7] at byte `offset` become lines of `to`, 64 bytes apart.
KV_INLINE void transpose8(const void* const* from, int64_t offset, char* to) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i) {
        a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from[i]) + offset));
    }
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 * c), _mm256_permute2x128_si256(a[c], a[c + 4], 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 * (c + 4)),
                            _mm256_permute2x128_si256(a[c], a[c + 4], 0x31));
    }
}
// to[line][i] = from[i][line] for a block of 16 x 16 32-bit words; from[i] at byte `offset`, lines 64 bytes apart.
KV_INLINE void transpose(const void* const* from, int64_t offset, void* to) {
    char* out = static_cast<char*>(to);
    for (int rows = 0; rows < 2; ++rows) {
        for (int lines = 0; lines < 2; ++lines) {
            transpose8(from + 8 * rows, offset + 32 * lines, out + 512 * lines + 32 * rows);
        }
    }
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
