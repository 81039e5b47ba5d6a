// mass: attention mass per slot, from the logits that attend wrote and the log-sum-exp after the last merge.
//
//   mass[k, i] = reduce over g, t of exp(z[g, t, k, i] - lse[g, t])        reduce: sum, mean (over G*T), max
//
// Fixed order (g outer, t inner), f32. z = -inf gives 0; lse = -inf gives 0.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

enum class Reduce : uint8_t { sum = 0, mean = 1, max = 2 };

struct MassParams {
    const float* logits;  // f32 [R, G, T, M, 16], contiguous
    const float* lse;     // f32 [R, G, T]
    float* mass;          // f32 [R, M, 16]
    int32_t rows, group, queries, entries;
    Reduce reduce;
    int32_t threads;
};

void mass(const MassParams& params, const Where& where = {});

}  // namespace kvstrata::ops
