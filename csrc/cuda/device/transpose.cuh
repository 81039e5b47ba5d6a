// The transpose of an 8 x 8 matrix of 16-bit elements across a warp: from the layout of a product's D to that of a B.
#pragma once

#include "cuda/device/warp.cuh"

namespace kvstrata::cuda {

// Lane 4 a + b brings row a, columns 2 b (low half) and 2 b + 1; it gets rows 2 b and 2 b + 1 of column a.
__device__ inline uint32_t transpose8(uint32_t x) {
#if defined(KVSTRATA_EMULATE)
    const int row = 8 * (lane() % 4), column = lane() / 4;
    const uint32_t first = __shfl_sync(kAllLanes, x, row + column / 2);
    const uint32_t second = __shfl_sync(kAllLanes, x, row + 4 + column / 2);
    return __byte_perm(first, second, column % 2 ? 0x7632 : 0x5410);
#else
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
#endif
}

}  // namespace kvstrata::cuda
