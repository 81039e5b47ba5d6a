// V: sixteen f32 lanes, one per slot of a page. The kernels are written once over it.
//
// Everything here has internal linkage and is inlined by force: a shared inline body would be emitted once for the
// whole program, for whichever instruction set the linker met first.
#pragma once

#include "cpu/kernels/level.h"

#define KV_INLINE static inline __attribute__((always_inline))
#define KV_INLINE_MEMBER inline __attribute__((always_inline))

#if defined(KV_ISA_scalar)
#include "cpu/kernels/vec_scalar.h"
#elif defined(KV_ISA_avx2)
#include "cpu/kernels/vec_avx2.h"
#else
#include "cpu/kernels/vec_avx512.h"
#endif

namespace kvstrata::cpu::KV_ISA {
namespace {

// The first n < 16 lanes of memory that ends there; the others are 0.
KV_INLINE V load_part(const float* p, int n) {
    float lanes[16] = {};
    __builtin_memcpy(lanes, p, static_cast<unsigned long>(n) * 4);
    return load(lanes);
}
KV_INLINE void store_part(float* p, V x, int n) {
    float lanes[16];
    store(lanes, x);
    __builtin_memcpy(p, lanes, static_cast<unsigned long>(n) * 4);
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
