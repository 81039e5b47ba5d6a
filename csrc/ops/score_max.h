// score_max: the most that a query of each span saw of each stored slot: how much an episode's prompt wants a token.
//
//   out[e, k, i] = exp(max over g, and t in span e, of z[g, t, k, i] - lse[g, t])                 z as in attend.h
//
// lse is given: of all that the query read, its own span too, which is not among the slots. A query whose lse is -inf saw
// nothing and takes no part. Slots that are hidden or of entries of -1, and spans without queries: 0; as everywhere, exp
// is 0 below -87. NaN and Inf show in their own rows only: a NaN in q or lse in every slot of its span, one in a slot in
// this slot of every span; an Inf as exp makes it.
//
// A maximum knows no order: bits of a span are those of its set of queries and of the row's slots alone, and do not depend
// on how they are cut into blocks, threads or calls.
//
// One pass: keys are read from memory once for all spans. Memory is 10 KiB and 576 * D bytes a thread, whatever W, E or M; on
// CUDA it holds all rows' queries as operands, or 64 MiB of them at a time, and keys are read once for each time.
#pragma once

#include "ops/window.h"

namespace kvstrata::ops {

// Of WindowParams: q_pos, sinks, window and the rows' own numbers of queries are not used. Each row has W, of any number.
struct ScoreMaxParams : WindowParams {
    const int32_t* spans;  // [E + 1] rising: span e is the queries spans[e] .. spans[e + 1) of W; others are not read
    int32_t n_spans;       // E
    int32_t queries;       // W
    const float* lse;      // f32 [R, G, W]: row r, head g at lse + r * lse_stride_r + g * lse_stride_g; natural log
    int64_t lse_stride_r;  // elements
    int64_t lse_stride_g;
    float* out;            // f32 [E, R, M, 16]: span e, row r at out + e * out_stride_e + r * out_stride_r
    int64_t out_stride_e;  // elements
    int64_t out_stride_r;
};

int64_t score_max_workspace_bytes(const ScoreMaxParams& params,
                                  const Where& where = {});  // grows with D and threads, and with nothing else
void score_max(const ScoreMaxParams& params, const Where& where = {});

}  // namespace kvstrata::ops
