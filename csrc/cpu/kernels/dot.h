// I: sixteen 32-bit lanes of whole numbers, and codes of quantized pages as pairs of 16-bit numbers in them.
//
// A line of a quantized page holds sixteen words of four bytes; a byte holds 8 / Bits codes of as many successive quads
// of elements. Field k of a word is bits Bits * k of its two halves: a pair of codes of one quad, elements (0, 2) of it
// for the first half of the fields and (1, 3) for the second. So the other operand keeps its quads in the order 0, 2, 1, 3.
#pragma once

#include "cpu/kernels/vec.h"

#if defined(KV_ISA_scalar)
#include "cpu/kernels/dot_scalar.h"
#elif defined(KV_ISA_avx2)
#include "cpu/kernels/dot_avx2.h"
#else
#include "cpu/kernels/dot_avx512.h"
#endif

namespace kvstrata::cpu::KV_ISA {
namespace {

// A line holds, for each slot, a word of 4 * (8 / Bits) dims: dim 4 f + j of them in the field f of byte j; a line of values
// a word for each dim, of so many slots. The dims (or slots) from At on, each with what it stands for, to visit(dim, value).
template <int Bits, int At, class Visit>
KV_INLINE void each_code(I line, Visit visit) {
    if constexpr (At < 4 * (8 / Bits)) {
        visit(At, code_value<Bits, 8 * (At % 4) + Bits*(At / 4)>(line));
        each_code<Bits, At + 1>(line, visit);
    }
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
