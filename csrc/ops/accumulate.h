// accumulate: brings scores up to date, in place.
//
//   sum: score = decay * score + mass          max: score = max(decay * score, mass), NaN wins
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

enum class Combine : uint8_t { sum = 0, max = 1 };

struct AccumulateParams {
    float* score;       // f32 [n]
    const float* mass;  // f32 [n]
    int64_t n;
    float decay;  // finite
    Combine combine;
    int32_t threads;
};

void accumulate(const AccumulateParams& params, const Where& where = {});

}  // namespace kvstrata::ops
