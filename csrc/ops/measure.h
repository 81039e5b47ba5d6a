// measure: how a layer's attention looks from its window queries: entropy E, variance V and kurtosis K over the past, the
// n visible slots older than the row's oldest window query, per row and query head (ARKV's statistics). T: window.h.
//
//   sound   positions below `skip` (sinks) are no part of the past; p = A / sum over the past of the query's A
//     E = mean_t(-sum_k p log p) / log n                             0 if n < 2
//     V = sum_k var_t p / sum_k mean_t p^2                           population variance
//     K = (kappa - 1) / (kappa_max - 1)                              kappa = sum_k (m4 / m2) / sum_k m2 over n * p, moments
//                                                                    over t; terms with m2 = 0 dropped, none left: 0;
//                                                                    kappa_max = T - 2 + 1 / (T - 1); 0 if T < 3
//   code    as a public code has it: sums, not shares, and the sinks with the rest
//     E = -sum_t sum_k A log(A + 1e-10)      V = sum_k var_t A, unbiased      K = sum_k m4 / max(m2, 1e-8)^2
//
// T = 0 or n = 0: zeros. Two passes, as in score_window.h; f32 terms, sums of units added in f64 in the
// order of the list. Bits depend on the row alone.
#pragma once

#include "ops/window.h"

namespace kvstrata::ops {

enum class Stats : uint8_t { sound = 0, code = 1 };

struct MeasureParams : WindowParams {  // q_pos is needed
    Stats which;
    int32_t skip;  // sound: positions below it are no part of the past
    float* stats;  // f32 [R, G, 3] contiguous: E, V, K
};

int64_t measure_workspace_bytes(const MeasureParams& params, const Where& where = {});
void measure(const MeasureParams& params, const Where& where = {});

}  // namespace kvstrata::ops
