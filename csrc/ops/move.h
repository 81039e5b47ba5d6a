// A move of one token between slots: a row of the i32 [n, 4] tensor that quantize and compact take.
//
// A move is skipped if either of its pages is -1, whatever else it holds. The moves into one page follow each other
// (skipped ones aside); no slot is written twice, and no page is both read and written.
#pragma once

#include "ops/pool_view.h"

namespace kvstrata::ops {

struct Move {
    PageId from;
    int32_t from_slot;
    PageId to;
    int32_t to_slot;
};

constexpr bool skipped(const Move& move) { return move.from < 0 || move.to < 0; }

}  // namespace kvstrata::ops
