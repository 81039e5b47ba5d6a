// Which kernels this level has of its own. The levels above avx512 differ in dot products of formats that no kernel
// uses yet, so their objects only say "as below", and compile to nothing else.
#pragma once

#include "cpu/kernels.h"

#if defined(KV_ISA_scalar) || defined(KV_ISA_avx2) || defined(KV_ISA_avx512)
#define KV_OWN_KERNELS 1
#else
#define KV_OWN_KERNELS 0
#endif
