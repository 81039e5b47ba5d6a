// f32 numbers as two terms of bf16, where a level has bf16 products.
#pragma once

#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// Sixteen numbers as bf16, and what that leaves of them likewise.
KV_INLINE void split(V x, void* high, void* low) {
    const __m256i h = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.x));
    const __m512 kept = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    _mm256_storeu_si256(static_cast<__m256i*>(high), h);
    _mm256_storeu_si256(static_cast<__m256i*>(low),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_sub_ps(x.x, kept))));
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
