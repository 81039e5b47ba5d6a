// choose_states: what each token of a row becomes, from its score and the pages that the row may fill.
//
//   movable = positions >= 0, now not Evicted, not protected; the others keep their state (Evicted where no token is)
//   rank:     score descending, what is not finite last; ties the older token, then the lower index
//   Full:     the first 16 * full_pages movable tokens that are Full stay so
//   target:   of every other movable token max(now, quantized): bits only fall
//   cut:      the longest run of those, by rank, whose targets fill sum_k ceil(n_k / 16) <= quant_pages pages
//   out:      target for the first 16 * ceil(n_k / 16) tokens of each target k (pages begun are filled), else Evicted
//
// Linear in N: rows that fit are not ranked, and a threshold is found by digits of the ranks, not by sorting.
#pragma once

#include "common/types.h"

namespace kvstrata::ops {

struct ChooseStatesRow {       // one (sequence, KV head)
    const float* score;        // [N]
    const uint8_t* now;        // [N], State
    const int32_t* positions;  // [N]; -1: no token, whatever else is there
    const uint8_t* protect;    // [N]; not 0: keeps its state
    uint8_t* out;              // [N], State
    int64_t full_pages;        // at least 0
    int64_t quant_pages;       // at least 0
};

struct ChooseStatesParams {
    const ChooseStatesRow* rows;  // [R]
    int32_t n_rows;
    int32_t tokens;   // N
    State quantized;  // int8, int4 or int2
    void* workspace;  // choose_states_workspace_bytes(params) bytes, 64-byte aligned
    int32_t threads;
};

int64_t choose_states_workspace_bytes(const ChooseStatesParams& params, const Where& where = {});
void choose_states(const ChooseStatesParams& params, const Where& where = {});

}  // namespace kvstrata::ops
