// merge: join partial attention results by their log-sum-exp.
//
//   m = max_j lse_j     w_j = exp(lse_j - m)     out = sum_j w_j out_j / sum_j w_j     lse = m + log sum_j w_j
//
// j ascending, natural log, f32. A partial with lse = -inf takes no part, whatever its out holds; only such partials: out
// = 0, lse = -inf. NaN in a partial that takes part shows in its own (row, head) only.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

struct MergeParams {
    const float* const* outs;  // [J] -> f32 [N, D]
    const float* const* lses;  // [J] -> f32 [N]
    int32_t parts;             // J >= 1
    int64_t n;                 // N independent (row, head, query) results
    int32_t head_dim;          // D
    void* out;                 // [N, D] out_dtype; may alias outs[0] if out_dtype is f32
    DType out_dtype;           // f32, bf16, f16
    float* lse;                // f32 [N]; may alias lses[0]; or null
    int32_t threads;
};

void merge(const MergeParams& params, const Where& where = {});

}  // namespace kvstrata::ops
