// rotate: an orthonormal rotation of vectors that spreads outliers over all dimensions.
//
// D = m * b, b the largest power of two that divides D; index d = i * b + j. x' = R x:
//   1. y_d = s_d * x_d        s_d = +1 if splitmix64(d) is even, else -1
//   2. Walsh-Hadamard over each block of b: butterflies (u, v) -> (u + v, u - v) of strides 1, 2, 4, ..., then times
//      f32(1 / sqrt b)
//   3. if m > 1, for each j: t = f32(2 / m) * (y[j] + y[b + j] + ...), i ascending; y[i * b + j] -= t for each i
// The inverse is step 3, step 2, then times s. Bits are the same everywhere: fixed order, no contraction.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

struct RotateParams {
    const float* x;    // [N, D] contiguous
    float* out;        // [N, D] contiguous; may be x
    int64_t n;         // N
    int32_t head_dim;  // D, a multiple of 16 in 32..512
    bool inverse;
    int32_t threads;
};

void rotate(const RotateParams& params, const Where& where = {});

}  // namespace kvstrata::ops
