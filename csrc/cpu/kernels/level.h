// Which kernels this level has of its own: KV_OWN_KERNELS all of them, KV_DOT_KERNELS those of whole-number dot products.
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
