// The end of a page's score, whatever its summary: x of ops/score_pages.h from the dot product.
#pragma once

#include "cpu/kernels/math.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// The logit of head g, and `rest` added to it.
template <bool Capped>
KV_INLINE V score_of(const PageQuery& q, int g, V dot, V rest) {
    const V factor = set1(q.factor[g]);
    if constexpr (!Capped) return fma(factor, dot, rest);
    const V cap = set1(q.softcap);
    return add(mul(cap, tanh(div(mul(factor, dot), cap))), rest);
}

// Sixteen pages of head g: x, and their largest per lane so far. `there`: the pages with a visible slot, the others get -inf.
// Returns those of them that cannot be ranked.
KV_INLINE uint16_t put_score(int g, V score, uint16_t there, float* x, float* most) {
    const V minus_inf = set1(-__builtin_inff());
    const uint16_t finite = less(bits_and(score, 0x7FFFFFFFu), set1(__builtin_inff()));
    score = blend(there, score, minus_inf);
    store(x, score);
    store(most + g * 16, max(score, load(most + g * 16)));
    return there & static_cast<uint16_t>(~finite);
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
