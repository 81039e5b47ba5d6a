// V on AVX-512 (F, BW, DQ, VL): one register.
#pragma once

// GCC 12's own header trips its own warning (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

namespace kvstrata::cpu::KV_ISA {
namespace {

struct V {
    __m512 x;
};
// Accumulators in registers: kTile query rows x kChains independent sums in QK, x (even, odd) x kWide in PV: 16 of 32.
constexpr int kTile = 4, kChains = 4, kWide = 2;

KV_INLINE V zero() { return {_mm512_setzero_ps()}; }
KV_INLINE V set1(float s) { return {_mm512_set1_ps(s)}; }
KV_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
KV_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.x); }
KV_INLINE V add(V a, V b) { return {_mm512_add_ps(a.x, b.x)}; }
KV_INLINE V sub(V a, V b) { return {_mm512_sub_ps(a.x, b.x)}; }
KV_INLINE V mul(V a, V b) { return {_mm512_mul_ps(a.x, b.x)}; }
KV_INLINE V div(V a, V b) { return {_mm512_div_ps(a.x, b.x)}; }
KV_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
// As the instructions have it: the second operand if either is NaN.
KV_INLINE V max(V a, V b) { return {_mm512_max_ps(a.x, b.x)}; }
KV_INLINE V min(V a, V b) { return {_mm512_min_ps(a.x, b.x)}; }
KV_INLINE uint16_t less(V a, V b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ); }
KV_INLINE uint16_t differ(V a, V b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_NEQ_UQ); }  // NaN differs
KV_INLINE V blend(uint16_t bits, V yes, V no) { return {_mm512_mask_blend_ps(bits, no.x, yes.x)}; }
KV_INLINE float max_lane(V a) { return _mm512_reduce_max_ps(a.x); }
KV_INLINE V round_even(V a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// y * 2^n for integral n in -127..128.
KV_INLINE V scale2(V y, V n) { return {_mm512_scalef_ps(y.x, n.x)}; }
KV_INLINE V bits_and(V a, uint32_t m) { return {_mm512_and_ps(a.x, _mm512_castsi512_ps(_mm512_set1_epi32(m)))}; }
KV_INLINE V bits_or(V a, V b) { return {_mm512_or_ps(a.x, b.x)}; }
// Lane i and lane i ^ Stride change places.
template <int Stride>
KV_INLINE V swap(V a) {
    if constexpr (Stride == 1) return {_mm512_permute_ps(a.x, 0xB1)};
    if constexpr (Stride == 2) return {_mm512_permute_ps(a.x, 0x4E)};
    if constexpr (Stride == 4) return {_mm512_shuffle_f32x4(a.x, a.x, 0xB1)};
    return {_mm512_shuffle_f32x4(a.x, a.x, 0x4E)};
}
KV_INLINE V negate(uint16_t bits, V a) { return {_mm512_mask_xor_ps(a.x, bits, a.x, _mm512_set1_ps(-0.0f))}; }
// Sixteen signed bytes; stored from integral lanes in -128..127.
KV_INLINE V load_i8(const void* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))))};
}
// Sixteen bytes less 128.
KV_INLINE V load_code(const void* p) {
    const __m128i code = _mm_xor_si128(_mm_loadu_si128(static_cast<const __m128i*>(p)), _mm_set1_epi8(-128));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(code))};
}
KV_INLINE void store_i8(void* p, V a) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.x)));
}
KV_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Sixteen 16-bit elements.
KV_INLINE V load_bf16(const void* p) {
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
KV_INLINE V load_f16(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
KV_INLINE void store_bf16(void* p, V a) {
    const __m512i b = _mm512_castps_si512(a.x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __m512i quiet = _mm512_or_si512(b, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
    const __m512i out = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
KV_INLINE void store_f16(void* p, V a) {
    const __m256i h = _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(static_cast<__m256i*>(p), h);
}

// A 64-byte line of sixteen pairs: the first elements, the second elements.
KV_INLINE void pairs_bf16(const void* line, V& first, V& second) {
    const __m512i x = _mm512_loadu_si512(line);
    first = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
    second = {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
KV_INLINE void pairs_f16(const void* line, V& first, V& second) {
    const __m512i index = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24,
                                           22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i x = _mm512_permutexvar_epi16(index, _mm512_loadu_si512(line));
    first = {_mm512_cvtph_ps(_mm512_castsi512_si256(x))};
    second = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1))};
}

// to[line][i] = from[i][line] for a block of 16 x 16 32-bit words; from[i] at byte `offset`, lines 64 bytes apart.
KV_INLINE void transpose(const void* const* from, int64_t offset, void* to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const char*>(from[i]) + offset);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a[i + c]: in 128-bit lane L, column 4L + c of rows i..i+3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    char* out = static_cast<char*>(to);
    for (int c = 0; c < 4; ++c) {  // 4 x 4 transpose of 128-bit lanes
        const __m512i lo = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88),
                      lo2 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
        const __m512i hi = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xDD),
                      hi2 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xDD);
        _mm512_storeu_si512(out + 64 * c, _mm512_shuffle_i32x4(lo, lo2, 0x88));
        _mm512_storeu_si512(out + 64 * (c + 4), _mm512_shuffle_i32x4(hi, hi2, 0x88));
        _mm512_storeu_si512(out + 64 * (c + 8), _mm512_shuffle_i32x4(lo, lo2, 0xDD));
        _mm512_storeu_si512(out + 64 * (c + 12), _mm512_shuffle_i32x4(hi, hi2, 0xDD));
    }
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
