// choose_chunks: the step of each item on its ladder, for the most sum(w * fidelity) within a budget of costs.
//
//   dc[j, f] = cost[j + 1, f] - cost[j, f]           df[j, f] = fidelity[j + 1, f] - fidelity[j, f]
//   chosen(lambda): item i goes from step j up as long as w * df > lambda * dc           (equal: it stays cheap)
//   lambda: 0 if all of chosen(0) fits; else bisected 64 times between 0 and max(w * df / dc) * (1 + 2^-20), the end
//           that fits
//   fill:   the remaining steps by falling density, the least w * df / dc up to that step, ties by item; each is taken if
//           the one below it was and it fits
//
// f64 throughout, costs in whole numbers. Loses at most the largest single step against the optimum.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

struct ChooseChunksParams {
    const float* w;          // [n], at least 0, finite
    const uint8_t* ladder;   // [n], each item's column f
    const int64_t* cost;     // [J, F] rising in j; what a shorter ladder lacks repeats its last step
    const float* fidelity;   // [J, F]
    int64_t budget;          // at least the sum of cost[0]
    int32_t items;           // n
    int32_t steps, ladders;  // J, F: 1 to 256
    uint8_t* step;           // [n]
    double* level;           // lambda
    int64_t* held;           // sum of the costs
    void* workspace;         // choose_chunks_workspace_bytes(params) bytes, 64-byte aligned
};

int64_t choose_chunks_workspace_bytes(const ChooseChunksParams& params, const Where& where = {});
void choose_chunks(const ChooseChunksParams& params, const Where& where = {});

}  // namespace kvstrata::ops
