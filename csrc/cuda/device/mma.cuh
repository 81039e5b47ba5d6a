// Matrix products of a warp: D [16 rows][8 columns] += A [16][K] * B [K][8]. All 32 lanes call it together.
//
// With lane = 4 g + t (g = 0..7, t = 0..3), register r and element j in it, low bits first, a lane holds (PTX ISA, "Matrix
// Fragments for mma.m16n8k16", "... m16n8k32"):
//   16-bit, K 16   A[r]  row g + 8 (r & 1), k 2 t + 8 (r >> 1) + j     B[r]  k 2 t + 8 r + j, column g
//   8-bit,  K 32   A[r]  row g + 8 (r & 1), k 4 t + 16 (r >> 1) + j    B[r]  k 4 t + 16 r + j, column g
//   8-bit,  K 16   A[r]  row g + 8 r, k 4 t + j                        B[0]  k 4 t + j, column g
//   D[r]           row g + 8 (r >> 1), column 2 t + (r & 1)
// Integer sums wrap. Floats: products exact, sums in fp32 in the hardware's own order and rounding; the emulation adds k
// ascending.
#pragma once

#include "cuda/device/warp.cuh"
#if defined(KVSTRATA_EMULATE)
#include "cuda/emulate/mma.h"
#endif

namespace kvstrata::cuda {

#if defined(KVSTRATA_EMULATE)

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulate::mma<emulate::Bf16>("mma_bf16", d, a, b);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulate::mma<emulate::F16>("mma_f16", d, a, b);
}
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulate::mma<emulate::Int8<int8_t>>("mma_s8", d, a, b);
}
inline void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulate::mma<emulate::Int8<uint8_t>>("mma_u8s8", d, a, b);
}
inline void mma_s8_k16(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    emulate::mma<emulate::Int8<int8_t>>("mma_s8_k16", d, a, b);
}
inline void mma_u8s8_k16(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    emulate::mma<emulate::Int8<uint8_t>>("mma_u8s8_k16", d, a, b);
}

#else

// One instruction with four A registers and two B registers, or with two and one; `c` constrains D: "+f" or "+r".
#define KV_MMA_4_2(instruction, c)                                                              \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : c(d[0]), c(d[1]), c(d[2]), c(d[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#define KV_MMA_2_1(instruction, c)                                                  \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
                 : c(d[0]), c(d[1]), c(d[2]), c(d[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]))

__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    KV_MMA_4_2("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
}
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    KV_MMA_4_2("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "+f");
}
__device__ inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    KV_MMA_4_2("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "+r");
}
__device__ inline void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    KV_MMA_4_2("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32", "+r");
}
__device__ inline void mma_s8_k16(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    KV_MMA_2_1("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32", "+r");
}
__device__ inline void mma_u8s8_k16(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    KV_MMA_2_1("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32", "+r");
}

#undef KV_MMA_4_2
#undef KV_MMA_2_1

#endif

}  // namespace kvstrata::cuda
