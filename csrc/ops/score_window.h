// score_window: what a row's window queries saw of each stored slot, per query head.
//
//   mean = sum_t A[g, t, k, i] / T      var = sum_t (A - mean)^2 / (T - 1), 0 if T = 1         A, T: window.h
//   none:     score[g, k, i] = mean
//   variance: score[g, k, i] = mean + weight * var
//   std:      score[g, k, i] = mean + weight * sqrt(var)
//
// Slots that no query may read: 0, those hidden or of entries of -1 too. T = 0: zeros. A query that may read nothing: its
// A is 0, its lse -inf (or the sink). NaN and Inf in q or in a readable slot show in their own rows only.
//
// Two passes, in units of 32 entries: log-sum-exps, which are merged in the order of the list, then shares. What the first
// pass found is kept for the second as far as 4 MiB a thread go; what has no room is computed again, to the same bits.
// Other memory is bounded by W, never by the length of a row: about 256 KiB a thread at W * D = 64 * 128, and a float per
// unit and query. On CUDA nothing is kept, and the rows' queries lie in memory as operands. Bits depend on the row alone.
#pragma once

#include "ops/window.h"

namespace kvstrata::ops {

enum class Spread : uint8_t { none = 0, variance = 1, std = 2 };

struct ScoreWindowParams : WindowParams {
    Spread spread;
    float weight;            // finite, not negative
    float* score;            // f32 [R, G, M, 16]: row r, head g at score + r * score_stride_r + g * score_stride_g
    int64_t score_stride_r;  // elements
    int64_t score_stride_g;
    float* lse;            // f32 [R, G, T] likewise; natural log
    int64_t lse_stride_r;  // elements
    int64_t lse_stride_g;
};

int64_t score_window_workspace_bytes(const ScoreWindowParams& params, const Where& where = {});
void score_window(const ScoreWindowParams& params, const Where& where = {});

}  // namespace kvstrata::ops
