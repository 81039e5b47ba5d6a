// A line of a block of summaries, four channels of sixteen pages as unsigned bytes, times a query's codes of these channels.
//
// VNNI multiplies the bytes as they are; the other levels widen them to pairs of 16 bits, as products of bytes summed in pairs
// would saturate.
#pragma once

#include "cpu/kernels/dot.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

#if defined(KV_ISA_scalar)
KV_INLINE I add_means(I sum, I line, const int8_t* codes, const int16_t*) {
    for (int i = 0; i < 16; ++i) {
        const uint32_t word = static_cast<uint32_t>(line.x[i]);
        for (int c = 0; c < 4; ++c) sum.x[i] += static_cast<int32_t>(word >> (8 * c) & 0xFF) * codes[c];
    }
    return sum;
}
#elif defined(KV_ISA_avx2)
KV_INLINE __m256i half_means(__m256i sum, __m256i x, __m256i even, __m256i odd) {
    const __m256i low = _mm256_and_si256(x, _mm256_set1_epi16(0xFF)), high = _mm256_srli_epi16(x, 8);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd)));
}
KV_INLINE I add_means(I sum, I line, const int8_t*, const int16_t* pairs) {
    int32_t words[2];
    __builtin_memcpy(words, pairs, 8);
    const __m256i even = _mm256_set1_epi32(words[0]), odd = _mm256_set1_epi32(words[1]);
    return {half_means(sum.a, line.a, even, odd), half_means(sum.b, line.b, even, odd)};
}
#elif defined(KV_ISA_avx512)
KV_INLINE I add_means(I sum, I line, const int8_t*, const int16_t* pairs) {
    int32_t words[2];
    __builtin_memcpy(words, pairs, 8);
    const __m512i even = _mm512_set1_epi32(words[0]), odd = _mm512_set1_epi32(words[1]);
    const __m512i low = _mm512_and_si512(line.x, _mm512_set1_epi16(0xFF)), high = _mm512_srli_epi16(line.x, 8);
    return {_mm512_add_epi32(sum.x, _mm512_add_epi32(_mm512_madd_epi16(low, even), _mm512_madd_epi16(high, odd)))};
}
#else
KV_INLINE I add_means(I sum, I line, const int8_t* codes, const int16_t*) {
    int32_t word;
    __builtin_memcpy(&word, codes, 4);
    return {_mm512_dpbusd_epi32(sum.x, line.x, _mm512_set1_epi32(word))};
}
#endif

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
