// Which kernels this level has of its own: KV_OWN_KERNELS all of them, KV_DOT_KERNELS those of whole-number dot products,
// KV_MATRIX_KERNELS those of matrix tiles.
// What a level lacks compiles to nothing and says "as below".
#pragma once

#include "cpu/kernels.h"

#if defined(KV_ISA_scalar) || defined(KV_ISA_avx2) || defined(KV_ISA_avx512)
#define KV_OWN_KERNELS 1
#else
#define KV_OWN_KERNELS 0
#endif
#if KV_OWN_KERNELS || defined(KV_ISA_avx512_vnni)
#define KV_DOT_KERNELS 1
#else
#define KV_DOT_KERNELS 0
#endif
#if defined(KV_ISA_amx) || defined(KV_ISA_amx_soft)
#define KV_MATRIX_KERNELS 1
#else
#define KV_MATRIX_KERNELS 0
#endif
