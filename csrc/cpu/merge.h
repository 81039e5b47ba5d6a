// The arithmetic of merge, shared by the op and by attend's own partials.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/kernels.h"

namespace kvstrata::cpu {

inline constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

struct Partial {
    const float* out;
    float lse;
};

// acc[0..d) = sum_j w_j out_j / W, returns m + log W, over parts at(0..n-1) in order; `sink` is a part without value
// (-inf: none). A part with lse = -inf takes no part whatever it holds. A NaN lse wins every comparison, so it shows.
template <class At>
float combine(const Kernels& kernels, int n, At at, float sink, float* acc, int d) {
    float m = sink;
    for (int j = 0; j < n; ++j) {
        const float lse = at(j).lse;
        if (!(lse <= m)) m = lse;
    }
    for (int i = 0; i < d; ++i) acc[i] = 0.0f;
    if (m == kMinusInf) return kMinusInf;
    float total = 0.0f;
    for (int j = 0; j < n; ++j) {
        const Partial part = at(j);
        if (part.lse == kMinusInf) continue;
        const float w = std::exp(part.lse - m);
        kernels.axpy(acc, part.out, w, d);
        total += w;
    }
    if (sink != kMinusInf) total += std::exp(sink - m);
    kernels.divide(acc, total, d);
    return m + std::log(total);
}

}  // namespace kvstrata::cpu
