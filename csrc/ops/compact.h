// compact: copies slots between pages of one format, any format, bytes only: elements or codes, scales and position.
//
//   page[to].K[:, to_slot] = page[from].K[:, from_slot]      V, scales and positions likewise
//
// NaN payloads survive. Slots that no move names keep their bytes.
#pragma once

#include "ops/move.h"

namespace kvstrata::ops {

struct CompactParams {
    const Move* moves;      // [n]
    int32_t n_moves;        // n
    int32_t head_dim;       // D
    const PoolView* pools;  // [8]
    int32_t threads;
};

void compact(const CompactParams& params, const Where& where = {});

}  // namespace kvstrata::ops
