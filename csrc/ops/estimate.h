// estimate: attention to pages that are not read, by their summaries of kind mean_value (summarize.h).
//
//   x[g, p]   as select has it (score_pages.h): log of the page's estimated mass, n_p tokens of logit x - log n_p
//   lse[g]    = logsumexp_p x[g, p]                          p over the zone, in its order
//   out[g]    = R^-1 sum_p exp(x[g, p] - lse[g]) v_p         v_p: the page's value mean, rotated as it is stored
//
// out is in the model's space: turned back once, so that it merges with what attend gives. Entries whose summary was made
// from other slots than the visible ones take no part: hidden slots must not show. Nothing left: out 0, lse -inf. x that is
// not finite is refused, as by select; a value mean that is not finite makes out NaN. Sums in f32 in the zone's order.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

struct EstimateRow {                     // one (sequence, KV head)
    const void* q;                       // [G, D] by the stride below, as the model has it
    int64_t q_stride_g;                  // elements
    const unsigned char* const* blocks;  // [ceil(M / 16)] summaries of kind mean_value
    const uint16_t* visible;             // [M] slot masks
    const int32_t* zone;                 // [zone_count] entries, rising; on a CUDA device a -1 ends it
    int32_t entries;                     // M
    int32_t zone_count;
    float* out;  // [G, D] contiguous
    float* lse;  // [G]
    int32_t* unranked =
        nullptr;  // [1] out on a CUDA device alone: the first entry whose x is not finite, or -1; or null
};

struct EstimateParams {
    const EstimateRow* rows;  // [R]
    int32_t n_rows;
    int32_t group;     // G, 1..16
    int32_t head_dim;  // D, a multiple of 16 in 32..512
    DType q_dtype;     // f32, bf16, f16
    float scale;       // finite
    float weight;      // w of select, 0 or more
    float softcap;     // of select; 0: none
    void* workspace;   // estimate_workspace_bytes(params) bytes, 64-byte aligned
    int32_t threads;
};

int64_t estimate_workspace_bytes(const EstimateParams& params, const Where& where = {});
void estimate(const EstimateParams& params, const Where& where = {});

}  // namespace kvstrata::ops
