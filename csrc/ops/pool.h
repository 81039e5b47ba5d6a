// pool: each slot's score becomes that of its neighbourhood, then the mean over query heads.
//
//   near(i) = visible slots j of the row with |pos_j - pos_i| <= kernel / 2
//   avg:  s[g, i] = sum_near score[g, j] / (how many are present, or kernel)         in order of position
//   max:  s[g, i] = max_near score[g, j]                                             NaN wins
//   out[i] = (s[0, i] + s[1, i] + ...) / G                                           0 where hidden
//
// Slots need not lie in the order of their positions: the runs of a row that are in order are merged first (equal positions by
// place). A contiguous row with `kernel` as divisor is a padded average pool.
#pragma once

#include "ops/pool_view.h"

namespace kvstrata::ops {

enum class PoolKind : uint8_t { avg = 0, max = 1 };
enum class PoolDivide : uint8_t { present = 0, kernel = 1 };

struct PoolRow {              // one (sequence, KV head)
    const float* score;       // [G, M, 16], head g at score + g * score_stride_g elements; hidden slots are not read
    int64_t score_stride_g;   // elements
    const PageId* pages;      // [M]; -1: skipped
    const uint16_t* visible;  // [M] slot masks, or null: all slots
    float* out;               // [M, 16]
    int32_t entries;          // M
};

struct PoolParams {
    const PoolRow* rows;  // [R]
    int32_t n_rows;
    int32_t group;   // G
    int32_t kernel;  // odd, positive
    PoolKind kind;
    PoolDivide divide;      // avg only
    const PoolView* pools;  // [8]; only positions are read
    void* workspace;        // pool_workspace_bytes(params) bytes, 64-byte aligned
    int32_t threads;
};

int64_t pool_workspace_bytes(const PoolParams& params, const Where& where = {});
void pool(const PoolParams& params, const Where& where = {});

}  // namespace kvstrata::ops
