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
